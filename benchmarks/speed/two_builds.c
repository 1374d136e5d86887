/* two_builds.c: attention of two builds of libtqgguf in turn, so that a drift of the machine hits both alike.
 *
 *     cc -O2 -Inative/include benchmarks/speed/two_builds.c -o two_builds -ldl -lm
 *     ./two_builds OLD/libtqgguf.so NEW/libtqgguf.so avx512 300,302 128:2:1:4096 64:3:1:4096
 *
 * Arguments: kernel, type numbers, and shapes as head_dim:query heads per KV head:query rows:keys, of 8 KV heads. Prints
 * ns per block of K or V of both (lower quartiles of 31 runs on one thread), the median of the runs' ratios with its
 * quartiles, and how far the outputs are apart. */
#define _GNU_SOURCE
#include "tqgguf.h"

#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define N_HEAD_KV 8
#define RUNS 31
#define ROWS_AT_ONCE 1024

typedef struct {
    int (*compute)(const tq_attn *, int, int, int, void *);
    size_t (*work_bytes)(const tq_attn *, int);
    int (*encode)(int, int, const float *, int64_t, void *);
    size_t (*row_bytes)(int, int64_t);
} build;

typedef struct {
    int dim, group, n_q, n_kv;
} shape;

static void * checked(void * found, const char * what) {
    if (found == NULL) {
        fprintf(stderr, "two_builds: %s: %s\n", what, dlerror());
        exit(1);
    }
    return found;
}

static build open_build(const char * path, const char * kernel) {
    void * library = checked(dlmopen(LM_ID_NEWLM, path, RTLD_NOW), path);
    int (*force)(const char *);
    build b;
    *(void **) &force = checked(dlsym(library, "tq_kernel_force"), path);
    *(void **) &b.compute = checked(dlsym(library, "tq_attn_compute"), path);
    *(void **) &b.work_bytes = checked(dlsym(library, "tq_attn_work_bytes"), path);
    *(void **) &b.encode = checked(dlsym(library, "tq_encode"), path);
    *(void **) &b.row_bytes = checked(dlsym(library, "tq_row_bytes"), path);
    if (force(kernel) != TQ_OK) {
        fprintf(stderr, "two_builds: %s has no kernel %s that runs here\n", path, kernel);
        exit(1);
    }
    return b;
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double) t.tv_sec + 1e-9 * (double) t.tv_nsec;
}

static int ascending(const void * a, const void * b) {
    const double x = *(const double *) a, y = *(const double *) b;
    return (x > y) - (x < y);
}

static void fill(float * x, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        const double u = (rand() + 1.0) / (RAND_MAX + 2.0), v = rand() / (double) RAND_MAX;
        x[i] = (float) (sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v));
    }
}

static uint8_t * encoded(const build * b, int type, shape s) {
    const size_t row = b->row_bytes(type, s.dim), n = (size_t) s.n_kv * N_HEAD_KV;
    uint8_t * blocks = checked(malloc(n * row), "memory");
    float * x = checked(malloc(sizeof *x * (size_t) s.dim * ROWS_AT_ONCE), "memory");
    for (size_t i = 0; i < n; i += ROWS_AT_ONCE) {
        const size_t n_rows = n - i < ROWS_AT_ONCE ? n - i : ROWS_AT_ONCE;
        fill(x, n_rows * (size_t) s.dim);
        b->encode(type, 0, x, (int64_t) n_rows * s.dim, blocks + i * row);
    }
    free(x);
    return blocks;
}

static void compare(const build * b, int type, shape s) {
    const size_t row = b->row_bytes(type, s.dim), n_head = (size_t) N_HEAD_KV * (size_t) s.group;
    const size_t n_out = (size_t) s.n_q * n_head * (size_t) s.dim;
    uint8_t *k = encoded(b, type, s), *v = encoded(b, type, s);
    float * q = checked(malloc(n_out * sizeof *q), "memory");
    float * out[2] = { checked(calloc(n_out, sizeof *q), "memory"), checked(calloc(n_out, sizeof *q), "memory") };
    double time[2][RUNS], ratio[RUNS], apart = 0.0, largest = 0.0;
    tq_attn args = { 0 };
    fill(q, n_out);
    args.q = (tq_attn_operand) { .data = q,
                                 .type = TQ_TYPE_F32,
                                 .head_dim = s.dim,
                                 .n_head = (int64_t) n_head,
                                 .n_stream = 1,
                                 .stride_token = 4 * n_head * (size_t) s.dim,
                                 .stride_head = 4 * (size_t) s.dim };
    args.k = (tq_attn_operand) { .data = k,
                                 .type = type,
                                 .head_dim = s.dim,
                                 .n_head = N_HEAD_KV,
                                 .n_stream = 1,
                                 .stride_token = N_HEAD_KV * row,
                                 .stride_head = row };
    args.v = args.k;
    args.v.data = v;
    args.n_q = s.n_q;
    args.n_kv = s.n_kv;
    args.scale = 1.0f / sqrtf((float) s.dim);
    args.out_stride_row = args.q.stride_token;
    args.out_stride_head = args.q.stride_head;
    void * work = checked(malloc(b[0].work_bytes(&args, 1) + b[1].work_bytes(&args, 1)), "memory");
    const double n_blocks = 2.0 * s.n_kv * N_HEAD_KV * s.dim / TQ_BLOCK;
    const int repeats = 1 + (int) (2e6 / (n_blocks * s.group * s.n_q));
    for (int run = -1; run < RUNS; ++run) { /* the first one warms up */
        for (int j = 0; j < 2; ++j) {
            const int i = run < 0 ? j : (j + run) % 2;
            const double start = seconds();
            args.out = out[i];
            for (int r = 0; r < repeats; ++r) {
                b[i].compute(&args, 0, 0, 1, work);
            }
            if (run >= 0) {
                time[i][run] = (seconds() - start) / repeats;
            }
        }
    }
    for (int run = 0; run < RUNS; ++run) {
        ratio[run] = time[1][run] / time[0][run];
    }
    for (size_t i = 0; i < n_out; ++i) {
        apart = fmax(apart, fabs((double) out[0][i] - (double) out[1][i]));
        largest = fmax(largest, fabs((double) out[0][i]));
    }
    qsort(time[0], RUNS, sizeof(double), ascending);
    qsort(time[1], RUNS, sizeof(double), ascending);
    qsort(ratio, RUNS, sizeof(double), ascending);
    printf("type %d, %d:%d:%d:%d: %.3f, %.3f ns per block; ratio %.3f (%.3f to %.3f); outputs %.1e of %.1e apart\n",
           type, s.dim, s.group, s.n_q, s.n_kv, time[0][RUNS / 4] / n_blocks * 1e9, time[1][RUNS / 4] / n_blocks * 1e9,
           ratio[RUNS / 2], ratio[RUNS / 4], ratio[3 * RUNS / 4], apart, largest);
    fflush(stdout);
    free(k);
    free(v);
    free(q);
    free(out[0]);
    free(out[1]);
    free(work);
}

int main(int argc, char ** argv) {
    if (argc < 6) {
        fprintf(stderr, "usage: two_builds OLD.so NEW.so KERNEL TYPE,... DIM:GROUP:ROWS:KEYS...\n");
        return 2;
    }
    const build b[2] = { open_build(argv[1], argv[3]), open_build(argv[2], argv[3]) };
    for (char * type = strtok(argv[4], ","); type != NULL; type = strtok(NULL, ",")) {
        for (int i = 5; i < argc; ++i) {
            shape s;
            if (sscanf(argv[i], "%d:%d:%d:%d", &s.dim, &s.group, &s.n_q, &s.n_kv) != 4) {
                fprintf(stderr, "two_builds: %s given; a shape is DIM:GROUP:ROWS:KEYS\n", argv[i]);
                return 2;
            }
            compare(b, atoi(type), s);
        }
    }
    return 0;
}
