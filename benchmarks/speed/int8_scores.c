/* int8_scores.c: would 8-bit integer products make the scores q . k of a pqo3 cache faster than f32 ones?
 *
 *     cc -O3 -march=native -Inative/include benchmarks/speed/int8_scores.c -Ltqgguf/lib -ltqgguf -lm -o build/int8_scores
 *     LD_LIBRARY_PATH=tqgguf/lib build/int8_scores
 *
 * Times one pass over the keys of a head (head_dim 128, 512 keys, so in L1 and L2) for 1, 2, 4 and 8 query vectors, with
 * the inner loops of the library's f32 way and of an integer way: q quantised to int8 per block of 32, codebook rounded to
 * int8, indices widened to bytes and looked up by pshufb, products by pmaddubsw (AVX2) or vpdpbusd (AVX-512 VNNI). Prints
 * ns per block and the relative error of the scores against double. */
#include "tqgguf.h"

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { DIM = 128, BLOCKS = DIM / 32, KEYS = 512, BLOCK_BYTES = 14, ROW = BLOCKS * BLOCK_BYTES, MAX_Q = 8, RUNS = 301 };

static float levels[8], signs[32];
static int8_t levels8[16];
static float level_step;
static uint8_t keys[KEYS * ROW + 64];
static float q[MAX_Q][DIM];   /* transformed */
static int8_t q8[MAX_Q][DIM]; /* in the order in which index_bytes delivers values */
static float q_step[MAX_Q][BLOCKS];
static int32_t q_sum[MAX_Q][BLOCKS][8];
static float scores[MAX_Q][KEYS];

#define INLINE static inline __attribute__((always_inline))

INLINE float sum8(__m256 v) {
    __m128 r = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    r = _mm_add_ps(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(_mm_add_ss(r, _mm_movehdup_ps(r)));
}

INLINE float scale_of(const uint8_t * in) {
    uint16_t h;
    memcpy(&h, in, 2);
    return _cvtsh_ss(h);
}

/* f32, as avx2.c does it */
INLINE void f32_way(int n_q) {
    const __m256 table = _mm256_loadu_ps(levels);
    for (int t = 0; t < KEYS; ++t) {
        const uint8_t * in = keys + t * ROW;
        __m256 total[MAX_Q];
        for (int i = 0; i < n_q; ++i) {
            total[i] = _mm256_setzero_ps();
        }
        for (int b = 0; b < BLOCKS; ++b, in += BLOCK_BYTES) {
            const __m256 d = _mm256_set1_ps(scale_of(in));
            __m256 v[4];
            for (int g = 0; g < 4; ++g) {
                int32_t word;
                memcpy(&word, in + 2 + (g < 3 ? 3 * g : 8), 4);
                const __m256i shift = g < 3 ? _mm256_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21)
                                            : _mm256_setr_epi32(8, 11, 14, 17, 20, 23, 26, 29);
                v[g] = _mm256_permutevar8x32_ps(table, _mm256_srlv_epi32(_mm256_set1_epi32(word), shift));
            }
            for (int i = 0; i < n_q; ++i) {
                const float * x = q[i] + 32 * b;
                __m256 p = _mm256_mul_ps(v[0], _mm256_loadu_ps(x));
                p = _mm256_fmadd_ps(v[1], _mm256_loadu_ps(x + 8), p);
                p = _mm256_fmadd_ps(v[2], _mm256_loadu_ps(x + 16), p);
                p = _mm256_fmadd_ps(v[3], _mm256_loadu_ps(x + 24), p);
                total[i] = _mm256_fmadd_ps(d, p, total[i]);
            }
        }
        for (int i = 0; i < n_q; ++i) {
            scores[i][t] = sum8(total[i]);
        }
    }
}

/* The 32 indices of a block as bytes, in an order of its own (value_order below): a pair of bytes to each 16-bit lane, the
 * index moved to the top by a multiplication and down again. */
INLINE __m256i index_bytes(const uint8_t * qs) {
    const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) (const void *) qs));
    const __m256i place0 = _mm256_setr_epi8(0, 1, 0, 1, 0, 1, 1, 2, 1, 2, 1, 2, 2, 3, 2, 3, 3, 4, 3, 4, 3, 4, 4, 5, 4,
                                            5, 4, 5, 5, 6, 5, 6);
    const __m256i place1 = _mm256_add_epi8(place0, _mm256_set1_epi8(6));
    /* bit 3j of a group of 24: shifts 0, 3, 6, 1, 4, 7, 2, 5 within the pair of bytes; 13 - shift to the left */
    const __m256i up = _mm256_setr_epi16(1 << 13, 1 << 10, 1 << 7, 1 << 12, 1 << 9, 1 << 6, 1 << 11, 1 << 8, 1 << 13,
                                         1 << 10, 1 << 7, 1 << 12, 1 << 9, 1 << 6, 1 << 11, 1 << 8);
    const __m256i lo = _mm256_srli_epi16(_mm256_mullo_epi16(_mm256_shuffle_epi8(bytes, place0), up), 13);
    const __m256i hi = _mm256_srli_epi16(_mm256_mullo_epi16(_mm256_shuffle_epi8(bytes, place1), up), 13);
    return _mm256_packus_epi16(lo, hi);
}

static const uint8_t value_order[32] = { 0, 1, 2,  3,  4,  5,  6,  7,  16, 17, 18, 19, 20, 21, 22, 23,
                                         8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31 };

INLINE void int8_way(int n_q, int vnni) {
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) (const void *) levels8));
    const __m256i offset = _mm256_set1_epi8((char) 0x80), ones = _mm256_set1_epi16(1);
    for (int t = 0; t < KEYS; ++t) {
        const uint8_t * in = keys + t * ROW;
        __m256 total[MAX_Q];
        for (int i = 0; i < n_q; ++i) {
            total[i] = _mm256_setzero_ps();
        }
        for (int b = 0; b < BLOCKS; ++b, in += BLOCK_BYTES) {
            const float d = scale_of(in);
            const __m256i c = _mm256_shuffle_epi8(table, index_bytes(in + 2));
            const __m256i u = vnni ? _mm256_xor_si256(c, offset) : _mm256_abs_epi8(c);
            for (int i = 0; i < n_q; ++i) {
                const __m256i x = _mm256_loadu_si256((const __m256i *) (const void *) (q8[i] + 32 * b));
                __m256i p;
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
                if (vnni) { /* (c + 128) . x - 128 sum x */
                    p = _mm256_dpbusd_epi32(_mm256_loadu_si256((const __m256i *) (const void *) q_sum[i][b]), u, x);
                } else
#endif
                {
                    p = _mm256_madd_epi16(_mm256_maddubs_epi16(u, _mm256_sign_epi8(x, c)), ones);
                }
                total[i] = _mm256_fmadd_ps(_mm256_set1_ps(d * q_step[i][b]), _mm256_cvtepi32_ps(p), total[i]);
            }
        }
        for (int i = 0; i < n_q; ++i) {
            scores[i][t] = sum8(total[i]) * level_step;
        }
    }
}

static void run(int way, int n_q) {
#define N_Q(n)                                                                                                         \
    case n:                                                                                                            \
        way == 0 ? f32_way(n) : way == 1 ? int8_way(n, 0) : int8_way(n, 1);                                            \
        break;
    switch (n_q) { N_Q(1) N_Q(2) N_Q(4) N_Q(8) default : abort(); }
}

static int by_size(const void * a, const void * b) {
    return (*(const double *) a > *(const double *) b) - (*(const double *) a < *(const double *) b);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double) t.tv_sec * 1e9 + (double) t.tv_nsec;
}

static float normal(void) {
    float s = -6.0f;
    for (int i = 0; i < 12; ++i) {
        s += (float) rand() / (float) RAND_MAX;
    }
    return s;
}

int main(void) {
    float x[DIM];
    tq_codebook(TQ_TYPE_PQO3, TQ_MODE_SEARCH, levels, NULL);
    tq_signs(signs);
    level_step = levels[7] / 127.0f;
    for (int i = 0; i < 16; ++i) {
        levels8[i] = (int8_t) lrintf(levels[i % 8] / level_step);
    }
    for (int t = 0; t < KEYS; ++t) {
        for (int i = 0; i < DIM; ++i) {
            x[i] = normal();
        }
        tq_encode(TQ_TYPE_PQO3, TQ_MODE_SEARCH, x, DIM, keys + t * ROW);
    }
    for (int i = 0; i < MAX_Q; ++i) {
        for (int j = 0; j < DIM; ++j) {
            q[i][j] = normal(); /* as good as transformed: normal values stay normal */
        }
        for (int b = 0; b < BLOCKS; ++b) {
            float top = 0.0f;
            int sum[8] = { 0 };
            for (int j = 0; j < 32; ++j) {
                top = fmaxf(top, fabsf(q[i][32 * b + j]));
            }
            q_step[i][b] = top / 127.0f;
            for (int j = 0; j < 32; ++j) {
                q8[i][32 * b + j] = (int8_t) lrintf(q[i][32 * b + value_order[j]] / q_step[i][b]);
                sum[j / 4] += q8[i][32 * b + j];
            }
            for (int j = 0; j < 8; ++j) {
                q_sum[i][b][j] = -128 * sum[j];
            }
        }
    }
    const char * names[] = { "f32 vpermps", "int8 pmaddubsw", "int8 vpdpbusd" };
    printf("%-16s %8s %8s %8s %8s   relative error of the scores\n", "ns per block", "1 query", "2", "4", "8");
    for (int way = 0; way < 3; ++way) {
#if !defined(__AVX512VNNI__) || !defined(__AVX512VL__)
        if (way == 2) {
            printf("%-16s this build has no AVX-512 VNNI\n", names[way]);
            continue;
        }
#endif
        printf("%-16s", names[way]);
        for (int n_q = 1; n_q <= MAX_Q; n_q *= 2) {
            double ns[RUNS];
            for (int r = 0; r < RUNS; ++r) {
                const double start = now();
                run(way, n_q);
                ns[r] = now() - start;
            }
            qsort(ns, RUNS, sizeof ns[0], by_size);
            printf(" %8.2f", ns[RUNS / 2] / (KEYS * BLOCKS));
        }
        double error = 0.0, norm = 0.0;
        for (int t = 0; t < KEYS; ++t) {
            for (int i = 0; i < MAX_Q; ++i) {
                double want = 0.0;
                for (int b = 0; b < BLOCKS; ++b) {
                    const uint8_t * in = keys + t * ROW + b * BLOCK_BYTES;
                    for (int j = 0; j < 32; ++j) {
                        const int at = 3 * j,
                                  index = ((in[2 + at / 8] | (at / 8 < 11 ? in[3 + at / 8] << 8 : 0)) >> (at % 8)) & 7;
                        want += (double) scale_of(in) * (double) levels[index] * (double) q[i][32 * b + j];
                    }
                }
                error += (scores[i][t] - want) * (scores[i][t] - want);
                norm += want * want;
            }
        }
        printf("   %.1e\n", sqrt(error / norm));
    }
    return 0;
}
