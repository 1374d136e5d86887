/* count_attention.c: attention of libtqgguf, for benchmarks/speed/instructions.py, which counts what it executes.
 *
 *     count_attention KERNEL TYPE HEAD_DIM KV_HEADS GROUP ROWS KEYS REPEATS
 *
 * Attention of ROWS query rows over KEYS keys of KV_HEADS heads and GROUP query heads each, REPEATS times. Under an
 * emulator that counts, the difference of two REPEATS is what one attention takes. On x86-64 it counts itself: a parent
 * process steps through the attention, and prints the instructions of all REPEATS. */
#define _GNU_SOURCE
#include "tqgguf.h"

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#if defined(__x86_64__)
#    include <signal.h>
#    include <sys/ptrace.h>
#    include <sys/wait.h>
#    include <unistd.h>
#endif

static void * allocate(size_t n) {
    void * p = malloc(n);
    if (p == NULL) {
        fprintf(stderr, "count_attention: no memory for %zu bytes\n", n);
        exit(1);
    }
    return p;
}

static void fill(float * x, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        int sum = 0;
        for (int j = 0; j < 4; ++j) {
            sum += rand() % 65536;
        }
        x[i] = (float) (sum - 131072) / 32768.0f;
    }
}

static uint8_t * encoded(int type, int64_t n) {
    float * x = allocate((size_t) n * sizeof *x);
    uint8_t * blocks = allocate(tq_row_bytes(type, n));
    fill(x, (size_t) n);
    if (tq_encode(type, TQ_MODE_SEARCH, x, n, blocks) != TQ_OK) {
        fprintf(stderr, "count_attention: %s\n", tq_last_error());
        exit(1);
    }
    free(x);
    return blocks;
}

static void compute(const tq_attn * args, int repeats, void * work) {
    for (int i = 0; i < repeats; ++i) {
        if (tq_attn_compute(args, 0, 0, 1, work) != TQ_OK) {
            fprintf(stderr, "count_attention: %s\n", tq_last_error());
            exit(1);
        }
    }
}

#if defined(__x86_64__)
static void count(const tq_attn * args, int repeats, void * work) {
    const pid_t child = fork();
    if (child == 0) {
        ptrace(PTRACE_TRACEME, 0, NULL, NULL);
        raise(SIGSTOP);
        compute(args, repeats, work);
        raise(SIGSTOP);
        _exit(0);
    }
    long n = 0;
    int status;
    waitpid(child, &status, 0);
    while (ptrace(PTRACE_SINGLESTEP, child, NULL, NULL) == 0 && waitpid(child, &status, 0) == child &&
           WIFSTOPPED(status) && WSTOPSIG(status) == SIGTRAP) {
        ++n;
    }
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    printf("%ld\n", n);
}
#else
#    define count compute
#endif

int main(int argc, char ** argv) {
    if (argc != 9 || tq_kernel_force(argv[1]) != TQ_OK) {
        fprintf(stderr, "usage: count_attention KERNEL TYPE HEAD_DIM KV_HEADS GROUP ROWS KEYS REPEATS; %s\n",
                argc == 9 ? tq_last_error() : "eight arguments");
        return 2;
    }
    const int type = atoi(argv[2]), dim = atoi(argv[3]), n_head_kv = atoi(argv[4]), group = atoi(argv[5]),
              n_q = atoi(argv[6]), n_kv = atoi(argv[7]);
    const size_t row = tq_row_bytes(type, dim), n_head = (size_t) (n_head_kv * group);
    const size_t n_out = (size_t) n_q * n_head * (size_t) dim;
    float *q = allocate(n_out * sizeof *q), *out = allocate(n_out * sizeof *out);
    fill(q, n_out);
    const tq_attn_operand queries = { .data = q,
                                      .type = TQ_TYPE_F32,
                                      .head_dim = dim,
                                      .n_head = (int64_t) n_head,
                                      .n_stream = 1,
                                      .stride_token = 4 * n_head * (size_t) dim,
                                      .stride_head = 4 * (size_t) dim };
    const tq_attn_operand keys = { .data = encoded(type, (int64_t) n_kv * n_head_kv * dim),
                                   .type = type,
                                   .head_dim = dim,
                                   .n_head = n_head_kv,
                                   .n_stream = 1,
                                   .stride_token = (size_t) n_head_kv * row,
                                   .stride_head = row };
    tq_attn args = { .q = queries,
                     .k = keys,
                     .v = keys,
                     .n_q = n_q,
                     .n_kv = n_kv,
                     .scale = 1.0f / sqrtf((float) dim),
                     .out = out,
                     .out_stride_row = queries.stride_token,
                     .out_stride_head = queries.stride_head };
    args.v.data = encoded(type, (int64_t) n_kv * n_head_kv * dim);
    void * work = allocate(tq_attn_work_bytes(&args, 1));
    compute(&args, 1, work); /* what happens but once */
    count(&args, atoi(argv[8]), work);
    return 0;
}
