/* threads.c: what tqgguf.h allows several threads to do at once, done by several threads, for the thread sanitizer to
 * watch: the first use of the library, encoding and decoding, attention in two phases, caches of their own, one cache
 * in turn, errors. Results are compared with those of one thread. */
#include "tqgguf.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define N_THREADS 4
#define N_KV 700
#define DIM 64
#define N_HEAD 6
#define N_HEAD_KV 2
#define N_ROUNDS 20

static float k[N_KV * N_HEAD_KV * DIM], v[N_KV * N_HEAD_KV * DIM], q[N_HEAD * DIM];
static float out[N_HEAD * DIM];
static uint8_t k_blocks[sizeof k], v_blocks[sizeof v];
static tq_attn attention;
static void * work;
static pthread_barrier_t barrier;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static tq_cache * shared;
static int failures; /* under the mutex */

static void check(int ok, const char * what) {
    if (!ok) {
        pthread_mutex_lock(&mutex);
        ++failures;
        printf("FAILED: %s (%s)\n", what, tq_last_error());
        pthread_mutex_unlock(&mutex);
    }
}

static void fill(float * x, size_t n, uint32_t state) {
    for (size_t i = 0; i < n; ++i) {
        state = state * 1664525u + 1013904223u;
        x[i] = (float) (int32_t) state / 1073741824.0f;
    }
}

/* Each thread writes its part of the blocks, then attends with the others, then uses caches. */
static void * run(void * argument) {
    const int thread = *(const int *) argument;
    const size_t n = sizeof k / sizeof *k / N_THREADS, row = tq_row_bytes(TQ_TYPE_PQO3, (int64_t) n);
    check(tq_encode(TQ_TYPE_PQO3, 0, k + n * (size_t) thread, (int64_t) n, k_blocks + row * (size_t) thread) == TQ_OK,
          "encode k");
    check(tq_encode(TQ_TYPE_PQO3, 0, v + n * (size_t) thread, (int64_t) n, v_blocks + row * (size_t) thread) == TQ_OK,
          "encode v");
    for (int round = 0; round < N_ROUNDS; ++round) {
        for (int phase = 0; phase < 2; ++phase) {
            pthread_barrier_wait(&barrier);
            check(tq_attn_compute(&attention, phase, thread, N_THREADS, work) == TQ_OK, "attention");
        }
    }
    pthread_barrier_wait(&barrier);

    const tq_cache_config config = { .bits = 3, .head_dim = DIM, .n_head_kv = N_HEAD_KV, .n_layer = 1, .mode = 0 };
    tq_cache * mine = NULL;
    float got[N_HEAD * DIM];
    char want[32];
    check(tq_cache_new(&config, &mine) == TQ_OK, "new cache");
    check(tq_cache_prefill(mine, 0, k, v, N_KV - 1, NULL, NULL) == TQ_OK, "prefill");
    check(tq_cache_decode(mine, 0, k + (N_KV - 1) * N_HEAD_KV * DIM, v + (N_KV - 1) * N_HEAD_KV * DIM, q, N_HEAD,
                          0.125f, got) == TQ_OK,
          "decode");
    for (int i = 0; i < N_HEAD * DIM; ++i) { /* the same blocks, summed in another order */
        check(got[i] - out[i] < 2e-3f && out[i] - got[i] < 2e-3f,
              "a cache's attention is another than that of four threads");
    }
    snprintf(want, sizeof want, "layer %d given", 100 + thread);
    for (int round = 0; round < N_ROUNDS; ++round) {
        check(tq_cache_seq_len(mine, 100 + thread) == TQ_E_ARGUMENT &&
                  strncmp(tq_last_error(), want, strlen(want)) == 0,
              "another's error");
        pthread_mutex_lock(&mutex); /* by one thread at a time */
        const int status = tq_cache_prefill(shared, 0, k, v, 1 + thread, NULL, NULL);
        pthread_mutex_unlock(&mutex);
        check(status == TQ_OK, "the shared cache");
    }
    tq_cache_free(mine);
    return NULL;
}

int main(void) {
    const size_t row = tq_row_bytes(TQ_TYPE_PQO3, DIM);
    const tq_cache_config config = { .bits = 3, .head_dim = DIM, .n_head_kv = N_HEAD_KV, .n_layer = 1, .mode = 0 };
    pthread_t threads[N_THREADS];
    int numbers[N_THREADS];
    fill(k, sizeof k / sizeof *k, 1);
    fill(v, sizeof v / sizeof *v, 2);
    fill(q, sizeof q / sizeof *q, 3);
    attention.q = (tq_attn_operand) { .data = q,
                                      .type = TQ_TYPE_F32,
                                      .head_dim = DIM,
                                      .n_head = N_HEAD,
                                      .n_stream = 1,
                                      .stride_token = sizeof q,
                                      .stride_head = DIM * sizeof *q };
    attention.k = (tq_attn_operand) { .data = k_blocks,
                                      .type = TQ_TYPE_PQO3,
                                      .head_dim = DIM,
                                      .n_head = N_HEAD_KV,
                                      .n_stream = 1,
                                      .stride_token = N_HEAD_KV * row,
                                      .stride_head = row };
    attention.v = attention.k;
    attention.v.data = v_blocks;
    attention.n_q = 1;
    attention.n_kv = N_KV;
    attention.scale = 0.125f;
    attention.out = out;
    attention.out_stride_row = sizeof out;
    attention.out_stride_head = DIM * sizeof *out;
    work = malloc(tq_attn_work_bytes(&attention, N_THREADS));
    if (work == NULL || tq_cache_new(&config, &shared) != TQ_OK ||
        pthread_barrier_init(&barrier, NULL, N_THREADS) != 0) {
        return 2;
    }
    for (int i = 0; i < N_THREADS; ++i) {
        numbers[i] = i;
        if (pthread_create(&threads[i], NULL, run, &numbers[i]) != 0) {
            return 2;
        }
    }
    for (int i = 0; i < N_THREADS; ++i) {
        pthread_join(threads[i], NULL);
    }
    check(tq_cache_seq_len(shared, 0) == N_ROUNDS * (1 + 2 + 3 + 4), "tokens of the shared cache");
    tq_cache_free(shared);
    free(work);
    printf("%d threads on kernel %s, %d failures\n", N_THREADS, tq_kernel_active(), failures);
    return failures > 0;
}
