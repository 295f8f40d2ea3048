/* What libfabric does when it is linked directly: the peer that crates/fabric/src/link/ofi is
 * measured beside. Two processes ping-pong remote writes with immediate data, then stream them.
 *
 *   cc -O2 -o probe tools/ofi/probe.c -lfabric
 *   probe PROVIDER OWN-ADDRESS LEADER-ADDRESS [first]
 *
 * Prints the median of 8 bytes one way in microseconds, and GB/s of pieces of 1 MiB. */
#include <arpa/inet.h>
#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PINGS = 4000, PIECES = 500, PIECE = 1 << 20, WINDOW = 8, TURNS = 2, PORT = 7010 };
struct card {
    uint64_t start, key;
    char name[512];
};

static struct fid_cq *cq;
static long seen, done;

static void check(const char *what, long code) {
    if (code < 0) {
        fprintf(stderr, "%s: %s\n", what, fi_strerror((int)-code));
        exit(1);
    }
}

static void progress(void) {
    struct fi_cq_data_entry entries[16];
    ssize_t got = fi_cq_read(cq, entries, 16);
    if (got == -FI_EAGAIN) return;
    check("fi_cq_read", got);
    for (int i = 0; i < got; i++) {
        if (entries[i].flags & FI_REMOTE_CQ_DATA) seen++;
        else done++;
    }
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static struct fid_ep *ep;
static struct fid_mr *mr;
static struct card theirs;
static char *source;
static fi_addr_t peer;
static long posted;

static void put(size_t offset, size_t bytes) {
    static struct fi_context2 contexts[64];
    ssize_t code;
    do {
        code = fi_writedata(ep, source, bytes, fi_mr_desc(mr), 7, peer, theirs.start + offset,
                            theirs.key, &contexts[posted % 64]);
        if (code == -FI_EAGAIN) progress();
    } while (code == -FI_EAGAIN);
    check("fi_writedata", code);
    posted++;
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static int meet(const char *leader, int first) {
    int s = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(PORT)};
    inet_pton(AF_INET, leader, &at.sin_addr);
    if (!first) {
        for (int i = 0; connect(s, (void *)&at, sizeof at) && i < 500; i++) {
            usleep(20000);
            close(s);
            s = socket(AF_INET, SOCK_STREAM, 0);
        }
        return s;
    }
    setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    check("bind", bind(s, (void *)&at, sizeof at));
    check("listen", listen(s, 1));
    return accept(s, NULL, NULL);
}

int main(int argc, char **argv) {
    if (argc < 4) return 2;
    int first = argc > 4;
    struct fi_info *hints = fi_allocinfo(), *info;
    hints->caps = FI_MSG | FI_RMA;
    hints->mode = FI_CONTEXT | FI_CONTEXT2;
    hints->ep_attr->type = FI_EP_RDM;
    hints->domain_attr->threading = FI_THREAD_DOMAIN;
    hints->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY;
    hints->fabric_attr->prov_name = strdup(argv[1]);
    check("fi_getinfo", fi_getinfo(FI_VERSION(1, 17), argv[2], NULL, FI_SOURCE, hints, &info));
    struct fid_fabric *fabric;
    struct fid_domain *domain;
    struct fid_av *av;
    struct fi_av_attr av_attr = {.type = FI_AV_TABLE};
    struct fi_cq_attr cq_attr = {.size = 4096, .format = FI_CQ_FORMAT_DATA};
    check("fi_fabric", fi_fabric(info->fabric_attr, &fabric, NULL));
    check("fi_domain", fi_domain(fabric, info, &domain, NULL));
    check("fi_av_open", fi_av_open(domain, &av_attr, &av, NULL));
    check("fi_cq_open", fi_cq_open(domain, &cq_attr, &cq, NULL));
    check("fi_endpoint", fi_endpoint(domain, info, &ep, NULL));
    check("fi_ep_bind", fi_ep_bind(ep, &av->fid, 0));
    check("fi_ep_bind", fi_ep_bind(ep, &cq->fid, FI_TRANSMIT | FI_RECV));
    check("fi_enable", fi_enable(ep));
    char *arena = aligned_alloc(4096, (size_t)WINDOW * PIECE);
    source = aligned_alloc(4096, PIECE);
    memset(arena, 1, (size_t)WINDOW * PIECE);
    memset(source, 1, PIECE);
    struct fid_mr *remote;
    check("fi_mr_reg", fi_mr_reg(domain, arena, (size_t)WINDOW * PIECE, FI_REMOTE_WRITE, 0, 1, 0,
                                 &remote, NULL));
    check("fi_mr_reg", fi_mr_reg(domain, source, PIECE, FI_WRITE, 0, 2, 0, &mr, NULL));
    struct card own = {0};
    size_t length = sizeof own.name;
    own.start = info->domain_attr->mr_mode & FI_MR_VIRT_ADDR ? (uint64_t)arena : 0;
    own.key = fi_mr_key(remote);
    check("fi_getname", fi_getname(&ep->fid, own.name, &length));
    int s = meet(argv[3], first);
    if (write(s, &own, sizeof own) != sizeof own) return 1;
    if (recv(s, &theirs, sizeof theirs, MSG_WAITALL) != sizeof theirs) return 1;
    check("fi_av_insert", fi_av_insert(av, theirs.name, 1, &peer, 0, NULL) - 1);

    for (int turn = 0; turn < TURNS; turn++) {
        static double times[PINGS];
        long base = seen;
        for (int i = 0; i < PINGS; i++) {
            double begun = now();
            if (first) put(0, 8);
            while (seen - base <= i) progress();
            if (!first) put(0, 8);
            times[i] = (now() - begun) / 2 * 1e6;
        }
        qsort(times, PINGS, sizeof times[0], compare);
        base = seen;
        double begun = now();
        for (int i = 0; i < PIECES; i++) {
            if (first) {
                while (seen - base < i + 1 - WINDOW) progress();
                put((size_t)(i % WINDOW) * PIECE, PIECE);
                while (done < posted) progress();
            } else {
                while (seen - base <= i) progress();
                put(0, 0);
            }
        }
        while (first && seen - base < PIECES) progress();
        double rate = (double)PIECE * PIECES / (now() - begun) / 1e9;
        if (first) printf("libfabric linked %.2f us %.2f GB/s\n", times[PINGS / 2], rate);
        fflush(stdout);
    }
    return 0;
}
