// A stand-in for libnccl.so.2 and libcuda.so.1 in one, for machines without a GPU.
//
// Memory of the "device" is ordinary memory, and a stream is a thread that does one job after the
// other, some time after it was given. Ranks are threads or processes: bytes go through a board in
// shared memory that has the name in the unique id. It does no more than what the tests of this
// target call, and is as unkind as the real ones may be: calls are not launched before somebody
// has asked for the state of the communicator a few times; a job whose peer does not come, or has
// come with something else, waits until it is aborted; sums are added from the last rank down. What
// it is given wrongly it keeps as a complaint, which tests read.

#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { RANKS_MAX = 8, PIECE = 16 << 10, OPS_MAX = 64, LAUNCH_LOOKS = 2, JOB_US = 100 };
enum { SUCCESS = 0, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, IN_PROGRESS = 7 };
enum { NOT_READY = 600 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char complaint[256];
static atomic_int left;

static int complain(const char *format, ...) {
    va_list list;
    va_start(list, format);
    pthread_mutex_lock(&lock);
    if (!complaint[0]) vsnprintf(complaint, sizeof complaint, format, list);
    pthread_mutex_unlock(&lock);
    va_end(list);
    return INVALID_ARGUMENT;
}

// What was given wrongly first, or an empty string.
const char *fake_complaint(void) { return complaint; }

// Communicators, streams, events and pieces of memory that there are.
int fake_left(void) { return left; }

// What goes wrong for a rank: the state of its communicator becomes `code` with its job number
// `job`, which is never done. Zero is no error: the job hangs all the same.
static struct { int armed, code, job; } faults[RANKS_MAX];

void fake_fault(int rank, int code, int job) {
    faults[rank].code = code;
    faults[rank].job = job;
    faults[rank].armed = 1;
}

// Whether the end of a communicator hangs.
static atomic_int ends_hang;
void fake_hang_ends(int hang) { ends_hang = hang; }

void fake_reset(void) {
    memset(faults, 0, sizeof faults);
    ends_hang = 0;
    complaint[0] = 0;
}

// Ranks meet on a board: a box for each pair, which holds a piece of a message.
struct box {
    atomic_int full;
    uint64_t tag, length;
    unsigned char bytes[PIECE];
};

struct board {
    atomic_int arrived, finished;
    struct box boxes[RANKS_MAX][RANKS_MAX];
};

struct comm {
    int rank, ranks, looks, jobs, finalizing;
    atomic_int state, aborted, running;
    char name[128];
    struct board *board;
    struct job *launching;
};

enum kind { ALL_REDUCE = 1, REDUCE, REDUCE_SCATTER, ALL_GATHER, BROADCAST, SEND, RECEIVE };

// A message of a job, in pieces.
struct part {
    int sends, peer;
    uint64_t tag;
    unsigned char *at;
    size_t length, done;
};

// A copy on the device, before the messages.
struct move {
    void *to;
    const void *from;
    size_t bytes;
};

// An addition that follows the messages.
struct sum {
    unsigned char *scratch, *into;
    size_t count;
    int type, ranks;
};

struct copy {
    size_t from_x, from_y;
    unsigned from_type;
    const void *from_host;
    uint64_t from;
    void *from_array;
    size_t from_pitch, to_x, to_y;
    unsigned to_type;
    void *to_host;
    uint64_t to;
    void *to_array;
    size_t to_pitch, width, height;
};

struct job {
    struct comm *comm;
    struct stream *stream;
    struct copy copy;
    int hangs, moves, parts, sums;
    struct move move[OPS_MAX];
    struct part part[OPS_MAX * RANKS_MAX];
    struct sum sum[OPS_MAX];
    struct job *next;
};

struct stream {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct job *first, **last;
    uint64_t given, done;
    int stop;
};

struct event {
    struct stream *stream;
    uint64_t after;
};

static _Thread_local int depth;
static _Thread_local struct job *grouped;

// One step of a message; whether something was done. Messages of a pair follow each other.
static int step(struct comm *comm, struct part *part) {
    struct board *board = comm->board;
    struct box *box = part->sends ? &board->boxes[comm->rank][part->peer]
                                  : &board->boxes[part->peer][comm->rank];
    size_t rest = part->length - part->done;
    size_t piece = rest < PIECE ? rest : PIECE;
    if (part->sends) {
        if (atomic_load(&box->full)) return 0;
        box->tag = part->tag;
        box->length = part->length;
        memcpy(box->bytes, part->at + part->done, piece);
        atomic_store(&box->full, 1);
    } else {
        if (!atomic_load(&box->full)) return 0;
        // Ranks that want different things wait for each other for ever.
        if (box->tag != part->tag || box->length != part->length) return 0;
        memcpy(part->at + part->done, box->bytes, piece);
        atomic_store(&box->full, 0);
    }
    part->done += piece;
    return 1;
}

// One turn through the messages that are their pairs' next; whether all are done.
static int turn(struct job *job, int *moved) {
    int sending[RANKS_MAX] = {0}, receiving[RANKS_MAX] = {0}, all = 1;
    for (int i = 0; i < job->parts; i++) {
        struct part *part = &job->part[i];
        if (part->done == part->length) continue;
        all = 0;
        int *busy = part->sends ? sending : receiving;
        if (busy[part->peer]++ == 0) *moved |= step(job->comm, part);
    }
    return all;
}

static float number(const unsigned char *at, int type) {
    uint32_t bits;
    uint16_t half;
    float value;
    if (type == 9) {
        memcpy(&half, at, 2);
        bits = (uint32_t)half << 16;
        memcpy(&value, &bits, 4);
    } else {
        memcpy(&value, at, 4);
    }
    return value;
}

static size_t size_of(int type) {
    switch (type) {
    case 1: return 1;
    case 6: case 9: return 2;
    case 2: case 7: return 4;
    }
    complain("type %d", type);
    return 1;
}

static void add(struct sum *sum) {
    size_t size = size_of(sum->type);
    for (size_t i = 0; i < sum->count; i++) {
        float total = 0;
        int32_t whole = 0;
        for (int rank = sum->ranks - 1; rank >= 0; rank--) {
            unsigned char *at = sum->scratch + (rank * sum->count + i) * size;
            if (sum->type == 2) {
                int32_t value;
                memcpy(&value, at, 4);
                whole += value;
            } else {
                total += number(at, sum->type);
            }
        }
        if (sum->type == 2) {
            memcpy(sum->into + i * 4, &whole, 4);
        } else if (sum->type == 7) {
            memcpy(sum->into + i * 4, &total, 4);
        } else {
            // Without rounding: tests add what needs none.
            uint32_t bits;
            memcpy(&bits, &total, 4);
            uint16_t half = bits >> 16;
            memcpy(sum->into + i * 2, &half, 2);
        }
    }
    free(sum->scratch);
}

static void run(struct job *job) {
    usleep(JOB_US);
    struct comm *comm = job->comm;
    if (!comm) {
        for (size_t row = 0; row < job->copy.height; row++)
            memcpy((char *)job->copy.to + row * job->copy.to_pitch,
                   (char *)job->copy.from + row * job->copy.from_pitch, job->copy.width);
        return;
    }
    for (int i = 0; i < job->moves; i++)
        memmove(job->move[i].to, job->move[i].from, job->move[i].bytes);
    int moved = 0;
    while (!atomic_load(&comm->aborted) && (job->hangs || !turn(job, &moved))) {
        if (!moved) usleep(20);
        moved = 0;
    }
    for (int i = 0; i < job->sums; i++) {
        if (atomic_load(&comm->aborted)) free(job->sum[i].scratch);
        else add(&job->sum[i]);
    }
    atomic_fetch_sub(&comm->running, 1);
}

static void *work(void *argument) {
    struct stream *stream = argument;
    pthread_mutex_lock(&stream->lock);
    for (;;) {
        while (!stream->first && !stream->stop) pthread_cond_wait(&stream->changed, &stream->lock);
        struct job *job = stream->first;
        if (!job) break;
        stream->first = job->next;
        if (!stream->first) stream->last = &stream->first;
        pthread_mutex_unlock(&stream->lock);
        run(job);
        free(job);
        pthread_mutex_lock(&stream->lock);
        stream->done++;
    }
    pthread_mutex_unlock(&stream->lock);
    return NULL;
}

static void give(struct job *job) {
    struct stream *stream = job->stream;
    pthread_mutex_lock(&stream->lock);
    job->next = NULL;
    *stream->last = job;
    stream->last = &job->next;
    stream->given++;
    pthread_cond_signal(&stream->changed);
    pthread_mutex_unlock(&stream->lock);
}

// NCCL.

struct unique_id { char bytes[128]; };

struct config {
    size_t size;
    unsigned magic, version;
    int blocking, cluster;
};

int ncclGetVersion(int *version) {
#ifdef FAKE_OLD
    *version = 21212;
#else
    *version = 22003;
#endif
    return SUCCESS;
}

const char *ncclGetErrorString(int code) {
    switch (code) {
    case SYSTEM_ERROR: return "a system error of the fake";
    case INVALID_ARGUMENT: return "an invalid argument of the fake";
    case INVALID_USAGE: return "an invalid usage of the fake";
    case 1: return "a device's error of the fake";
    case 6: return "a peer's error of the fake";
    }
    return "an error of the fake";
}

const char *ncclGetLastError(struct comm *comm) { return comm ? "the last error" : ""; }

int ncclGetUniqueId(struct unique_id *id) {
    static atomic_int count;
    memset(id, 0, sizeof *id);
    snprintf(id->bytes, sizeof id->bytes, "/fake-nccl-%d-%d", getpid(), atomic_fetch_add(&count, 1));
    int file = shm_open(id->bytes, O_CREAT | O_EXCL | O_RDWR, 0600);
    if (file < 0 || ftruncate(file, sizeof(struct board))) return SYSTEM_ERROR;
    close(file);
    return SUCCESS;
}

int ncclCommInitRankConfig(struct comm **made, int ranks, struct unique_id id, int rank,
                           struct config *config) {
    if (!made || !config || config->magic != 0xcafebeef || config->version < 21400 ||
        config->size < 20 || config->size > sizeof *config || config->blocking != 0)
        return complain("a configuration that is none, or blocks");
    if (rank < 0 || rank >= ranks || ranks > RANKS_MAX) return complain("rank %d of %d", rank, ranks);
    int file = shm_open(id.bytes, O_RDWR, 0600);
    if (file < 0) return complain("a unique id that was not made: %.64s", id.bytes);
    struct board *board =
        mmap(NULL, sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (board == MAP_FAILED) return SYSTEM_ERROR;
    struct comm *comm = calloc(1, sizeof *comm);
    comm->rank = rank;
    comm->ranks = ranks;
    comm->board = board;
    snprintf(comm->name, sizeof comm->name, "%s", id.bytes);
    if (atomic_fetch_add(&board->arrived, 1) + 1 == ranks) shm_unlink(comm->name);
    atomic_fetch_add(&left, 1);
    *made = comm;
    return IN_PROGRESS;
}

int ncclCommGetAsyncError(struct comm *comm, int *state) {
    *state = comm->state;
    if (comm->state != SUCCESS) return SUCCESS;
    *state = IN_PROGRESS;
    if (atomic_load(&comm->board->arrived) < comm->ranks) return SUCCESS;
    if (comm->launching && --comm->looks <= 0) {
        struct job *job = comm->launching;
        comm->launching = NULL;
        give(job);
    }
    int finishing = comm->finalizing && atomic_load(&comm->board->finished) < comm->ranks;
    if (!comm->launching && !finishing) *state = SUCCESS;
    return SUCCESS;
}

static void release(struct comm *comm) {
    while (atomic_load(&comm->running)) usleep(20);
    munmap(comm->board, sizeof *comm->board);
    free(comm);
    atomic_fetch_sub(&left, 1);
}

#ifndef FAKE_INCOMPLETE
int ncclCommFinalize(struct comm *comm) {
    if (comm->launching || comm->finalizing) return complain("finalised while in progress");
    while (atomic_load(&comm->running)) usleep(20);
    comm->finalizing = 1;
    atomic_fetch_add(&comm->board->finished, 1);
    return IN_PROGRESS;
}
#endif

int ncclCommDestroy(struct comm *comm) {
    if (!comm->finalizing) complain("destroyed without an end");
    release(comm);
    return SUCCESS;
}

int ncclCommAbort(struct comm *comm) {
    while (ends_hang) usleep(1000);
    if (atomic_load(&comm->board->arrived) < comm->ranks) shm_unlink(comm->name);
    atomic_store(&comm->aborted, 1);
    if (comm->launching) {
        for (int i = 0; i < comm->launching->sums; i++) free(comm->launching->sum[i].scratch);
        free(comm->launching);
        atomic_fetch_sub(&comm->running, 1);
    }
    release(comm);
    return SUCCESS;
}

static int launch(struct job *job) {
    struct comm *comm = job->comm;
    int number = comm->jobs++;
    if (faults[comm->rank].armed && faults[comm->rank].job == number) {
        job->hangs = 1;
        if (faults[comm->rank].code) comm->state = faults[comm->rank].code;
    }
    atomic_fetch_add(&comm->running, 1);
    comm->launching = job;
    comm->looks = LAUNCH_LOOKS;
    return IN_PROGRESS;
}

int ncclGroupStart(void) {
    depth++;
    return SUCCESS;
}

int ncclGroupEnd(void) {
    if (depth-- <= 0) return complain("the end of no group");
    struct job *job = grouped;
    if (depth > 0 || !job) return SUCCESS;
    grouped = NULL;
    return launch(job);
}

static void add_part(struct job *job, int sends, int peer, uint64_t tag, void *at, size_t length) {
    job->part[job->parts++] = (struct part){sends, peer, tag, at, length, 0};
}

static void add_move(struct job *job, void *to, const void *from, size_t bytes) {
    job->move[job->moves++] = (struct move){to, from, bytes};
}

// A call: `from` and `into` are what the kind makes of them, `peer` a root or the other rank.
static int call(enum kind kind, const void *from, void *into, size_t count, int type, int operation,
                int peer, struct comm *comm, struct stream *stream) {
    if (!comm || !stream || (!from && kind != RECEIVE) || !into)
        return complain("call %d with nothing", kind);
    if (operation) return complain("operation %d", operation);
    if (count == 0) return complain("call %d of no numbers", kind);
    if (peer < 0 || peer >= comm->ranks) return complain("peer %d of %d", peer, comm->ranks);
    if (comm->launching || comm->finalizing || atomic_load(&comm->board->arrived) < comm->ranks) {
        complain("call %d while another is in progress", kind);
        return INVALID_USAGE;
    }
    struct job *job = depth > 0 ? grouped : NULL;
    if (!job) {
        job = calloc(1, sizeof *job);
        job->comm = comm;
        job->stream = stream;
        if (depth > 0) grouped = job;
    }
    if (job->comm != comm || job->stream != stream) return complain("a group of two");
    size_t bytes = count * size_of(type);
    int me = comm->rank, ranks = comm->ranks;
    uint64_t tag = (uint64_t)(kind == RECEIVE ? SEND : kind) << 32 | (uint64_t)type;
    unsigned char *own = (unsigned char *)from, *all = into;
    if (kind == SEND) {
        add_part(job, 1, peer, tag, own, bytes);
    } else if (kind == RECEIVE) {
        add_part(job, 0, peer, tag, all, bytes);
    } else if (kind == BROADCAST) {
        for (int rank = 0; rank < ranks && me == peer; rank++)
            if (rank != me) add_part(job, 1, rank, tag, own, bytes);
        if (me == peer) add_move(job, into, from, bytes);
        else add_part(job, 0, peer, tag, all, bytes);
    } else if (kind == ALL_GATHER) {
        add_move(job, all + me * bytes, own, bytes);
        for (int rank = 0; rank < ranks; rank++) {
            if (rank == me) continue;
            add_part(job, 1, rank, tag, own, bytes);
            add_part(job, 0, rank, tag, all + rank * bytes, bytes);
        }
    } else {
        int keeps = kind != REDUCE || peer == me;
        unsigned char *scratch = keeps ? malloc(ranks * bytes) : NULL;
        size_t part = kind == REDUCE_SCATTER ? bytes : 0;
        for (int rank = 0; rank < ranks; rank++) {
            if (rank == me) {
                if (keeps) add_move(job, scratch + me * bytes, own + me * part, bytes);
                continue;
            }
            if (kind != REDUCE || peer == rank)
                add_part(job, 1, rank, tag, own + rank * part, bytes);
            if (keeps) add_part(job, 0, rank, tag, scratch + rank * bytes, bytes);
        }
        if (keeps) job->sum[job->sums++] = (struct sum){scratch, into, count, type, ranks};
    }
    return depth > 0 ? SUCCESS : launch(job);
}

int ncclAllReduce(const void *from, void *into, size_t count, int type, int operation,
                  struct comm *comm, struct stream *stream) {
    return call(ALL_REDUCE, from, into, count, type, operation, 0, comm, stream);
}

int ncclReduce(const void *from, void *into, size_t count, int type, int operation, int root,
               struct comm *comm, struct stream *stream) {
    return call(REDUCE, from, into, count, type, operation, root, comm, stream);
}

int ncclReduceScatter(const void *from, void *into, size_t count, int type, int operation,
                      struct comm *comm, struct stream *stream) {
    return call(REDUCE_SCATTER, from, into, count, type, operation, 0, comm, stream);
}

int ncclAllGather(const void *from, void *into, size_t count, int type, struct comm *comm,
                  struct stream *stream) {
    return call(ALL_GATHER, from, into, count, type, 0, 0, comm, stream);
}

int ncclBroadcast(const void *from, void *into, size_t count, int type, int root, struct comm *comm,
                  struct stream *stream) {
    return call(BROADCAST, from, into, count, type, 0, root, comm, stream);
}

int ncclSend(const void *from, size_t count, int type, int peer, struct comm *comm,
             struct stream *stream) {
    return call(SEND, from, (void *)from, count, type, 0, peer, comm, stream);
}

int ncclRecv(void *into, size_t count, int type, int peer, struct comm *comm,
             struct stream *stream) {
    return call(RECEIVE, NULL, into, count, type, 0, peer, comm, stream);
}

// The driver. What the tests themselves need to have memory and streams is here too.

static _Thread_local int context;

int cuInit(unsigned flags) { return flags; }

int cuDriverGetVersion(int *version) {
    *version = 12040;
    return SUCCESS;
}

int cuDeviceGetCount(int *count) {
    *count = RANKS_MAX;
    return SUCCESS;
}

int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return ordinal < RANKS_MAX ? SUCCESS : 101;
}

int cuDeviceGetName(char *name, int length, int device) {
    snprintf(name, length, "no device %d", device);
    return SUCCESS;
}

int cuGetErrorString(int code, const char **words) {
    *words = code == 700 ? "an address that is none" : "an error of the fake";
    return SUCCESS;
}

int cuDevicePrimaryCtxRetain(void **made, int device) {
    *made = (void *)(intptr_t)(device + 1);
    return SUCCESS;
}

int cuDevicePrimaryCtxRelease_v2(int device) { return device < RANKS_MAX ? SUCCESS : 101; }

int cuCtxSetCurrent(void *made) {
    context = (int)(intptr_t)made;
    return SUCCESS;
}

int cuMemAlloc_v2(uint64_t *address, size_t bytes) {
    if (!context) return complain("memory without a context");
    *address = (uint64_t)malloc(bytes);
    atomic_fetch_add(&left, 1);
    return SUCCESS;
}

int cuMemFree_v2(uint64_t address) {
    free((void *)address);
    atomic_fetch_sub(&left, 1);
    return SUCCESS;
}

int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t bytes) {
    memcpy((void *)to, from, bytes);
    return SUCCESS;
}

int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t bytes) {
    memcpy(to, (void *)from, bytes);
    return SUCCESS;
}

int cuStreamCreate(struct stream **made, unsigned flags) {
    if (!context || flags > 1) return complain("a stream without a context");
    struct stream *stream = calloc(1, sizeof *stream);
    pthread_mutex_init(&stream->lock, NULL);
    pthread_cond_init(&stream->changed, NULL);
    stream->last = &stream->first;
    if (pthread_create(&stream->thread, NULL, work, stream)) return SYSTEM_ERROR;
    pthread_setname_np(stream->thread, "fake-stream");
    atomic_fetch_add(&left, 1);
    *made = stream;
    return SUCCESS;
}

int cuStreamDestroy_v2(struct stream *stream) {
    pthread_mutex_lock(&stream->lock);
    stream->stop = 1;
    pthread_cond_signal(&stream->changed);
    pthread_mutex_unlock(&stream->lock);
    pthread_join(stream->thread, NULL);
    free(stream);
    atomic_fetch_sub(&left, 1);
    return SUCCESS;
}

static int reached(struct stream *stream, uint64_t count) {
    pthread_mutex_lock(&stream->lock);
    int ready = stream->done >= count;
    pthread_mutex_unlock(&stream->lock);
    return ready ? SUCCESS : NOT_READY;
}

static uint64_t given(struct stream *stream) {
    pthread_mutex_lock(&stream->lock);
    uint64_t count = stream->given;
    pthread_mutex_unlock(&stream->lock);
    return count;
}

int cuStreamQuery(struct stream *stream) { return reached(stream, given(stream)); }

int cuEventCreate(struct event **made, unsigned flags) {
    if (!context || flags & 1) return complain("an event without a context");
    *made = calloc(1, sizeof **made);
    atomic_fetch_add(&left, 1);
    return SUCCESS;
}

int cuEventRecord(struct event *event, struct stream *stream) {
    *event = (struct event){stream, given(stream)};
    return SUCCESS;
}

int cuEventQuery(struct event *event) {
    return event->stream ? reached(event->stream, event->after) : SUCCESS;
}

int cuEventDestroy_v2(struct event *event) {
    free(event);
    atomic_fetch_sub(&left, 1);
    return SUCCESS;
}

int cuMemcpy2DAsync_v2(const struct copy *copy, struct stream *stream) {
    if (copy->from_type != 4 || copy->to_type != 4 || copy->from_x || copy->from_y || copy->to_x ||
        copy->to_y || copy->width > copy->from_pitch || copy->width > copy->to_pitch)
        return complain("a copy of %zu columns", copy->width);
    struct job *job = calloc(1, sizeof *job);
    job->stream = stream;
    job->copy = *copy;
    give(job);
    return SUCCESS;
}
