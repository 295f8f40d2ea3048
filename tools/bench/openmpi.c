/* What Open MPI's collectives cost among two ranks, for `cargo bench -p pomona-fabric`.
 *
 *     mpicc -O2 -o openmpi tools/bench/openmpi.c
 *
 * Reads lines "reduce BYTES CALLS" or "gather BYTES CALLS" from its arguments, three each, and
 * prints the microseconds of a call, the writing of its input included, as the median of batches. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BATCHES 21

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv) {
    int rank, ranks;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    for (int i = 1; i + 2 < argc; i += 3) {
        int reduce = strcmp(argv[i], "reduce") == 0;
        int count = atoi(argv[i + 1]) / 4, calls = atoi(argv[i + 2]);
        float *in = malloc(count * 4), *out = malloc((size_t)ranks * count * 4);
        double times[BATCHES];
        memset(out, 0, (size_t)ranks * count * 4);
        for (int batch = -1; batch < BATCHES; batch++) {
            MPI_Barrier(MPI_COMM_WORLD);
            double start = MPI_Wtime();
            for (int call = 0; call < calls; call++) {
                for (int k = 0; k < count; k++) in[k] = (float)call;
                if (reduce)
                    MPI_Allreduce(in, out, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
                else
                    MPI_Allgather(in, count, MPI_FLOAT, out, count, MPI_FLOAT, MPI_COMM_WORLD);
            }
            if (batch >= 0) times[batch] = (MPI_Wtime() - start) * 1e6 / calls;
        }
        qsort(times, BATCHES, sizeof times[0], by_size);
        if (rank == 0) printf("%f\n", times[BATCHES / 2]);
        free(in);
        free(out);
    }
    MPI_Finalize();
    return 0;
}
