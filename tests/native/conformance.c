/* conformance.c: runs every kernel of libtqgguf that this machine can run, on any architecture, without Python.
 *
 * Encoded bytes are compared with digests that golden.py computed from tqgguf/reference.py (conformance_golden.h);
 * decoded values and attention with the definitions evaluated in double. Exit status 0: all kernels that could run
 * agree. Kernels that cannot run here are reported as skipped. */
#include "conformance_golden.h"
#include "tqgguf.h"

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures;

static void check(int ok, const char * kernel, const char * what, const char * detail) {
    if (!ok) {
        ++failures;
        printf("FAILED  %-9s %s: %s\n", kernel, what, detail);
    }
}

/* ---- Inputs: the same integers as golden.py's, scaled by powers of two, so every machine gets the same floats ---- */

static uint64_t state;

static uint32_t next(void) { /* splitmix64, upper half */
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t) ((z ^ (z >> 31)) >> 32);
}

/* About normal: the sum of four 16-bit numbers around 0, of standard deviation 37837 / 2^15. */
static float normal(void) {
    const uint32_t a = next(), b = next();
    const int sum = (int) (a >> 16) + (int) (a & 0xffff) + (int) (b >> 16) + (int) (b & 0xffff) - 2 * 65536;
    return (float) sum / 32768.0f;
}

/* GOLDEN_BLOCKS blocks: of varying size from 2^-30 to 2^17, every fourth with a large value, then the edge cases. */
static void make_blocks(float * x) {
    state = 1;
    for (int b = 0; b < GOLDEN_BLOCKS; ++b) {
        const int exponent = b % 4 == 1 ? (int) (next() % 48) - 30 : 0;
        for (int i = 0; i < TQ_BLOCK; ++i) {
            x[b * TQ_BLOCK + i] = ldexpf(normal(), exponent);
        }
        if (b % 4 == 2) {
            x[b * TQ_BLOCK + (int) (next() % TQ_BLOCK)] *= 32.0f;
        }
    }
    for (int i = 0; i < TQ_BLOCK; ++i) {
        x[0 * TQ_BLOCK + i] = 0.0f;
        x[1 * TQ_BLOCK + i] = i % 2 ? -0.0f : 0.0f;
        x[2 * TQ_BLOCK + i] = 1.0f;
        x[3 * TQ_BLOCK + i] = i == 7 ? -5.0f : 0.0f;
        x[4 * TQ_BLOCK + i] = i % 3 ? 65504.0f : -65504.0f;
        x[5 * TQ_BLOCK + i] = ldexpf(1.0f, -24 - i % 3);
        x[6 * TQ_BLOCK + i] = ldexpf(1.0f, -140);
        x[7 * TQ_BLOCK + i] = i % 5 ? x[7 * TQ_BLOCK + i] : NAN;
        x[8 * TQ_BLOCK + i] = i == 3 ? INFINITY : i == 9 ? -INFINITY : x[8 * TQ_BLOCK + i];
        x[9 * TQ_BLOCK + i] = NAN;
        x[10 * TQ_BLOCK + i] = 3e38f;
        x[11 * TQ_BLOCK + i] = i ? 0.0f : ldexpf(1.0f, -22);
    }
}

static uint64_t digest(const uint8_t * bytes, size_t n) { /* FNV-1a, 64 bits */
    uint64_t h = 0xcbf29ce484222325u;
    for (size_t i = 0; i < n; ++i) {
        h = (h ^ bytes[i]) * 0x100000001b3u;
    }
    return h;
}

/* ---- Checks ---- */

static void * allocate(size_t n) {
    void * p = malloc(n > 0 ? n : 1);
    if (p == NULL) {
        fprintf(stderr, "conformance: no memory for %zu bytes\n", n);
        exit(2);
    }
    return p;
}

static uint32_t rotate(uint32_t t, int n) {
    return t << n | t >> (32 - n);
}

/* The index of value i's level, from the index bytes of its block. */
static unsigned level_index(int type, const uint8_t * qs, int i) {
    unsigned index = 0;
    if (type == TQ_TYPE_PQO3 || type == TQ_TYPE_PQO4) {
        const int bits = type == TQ_TYPE_PQO3 ? 3 : 4;
        for (int k = 0; k < bits; ++k) {
            const int at = bits * i + k;
            index |= (unsigned) ((qs[at / 8] >> (at % 8)) & 1) << k;
        }
        return index;
    }
    uint32_t t;
    memcpy(&t, qs, sizeof t);
    index = rotate(t, 2) >> i & 1;
    index |= ((t ^ rotate(t, 1) ^ rotate(t, 3)) >> i & 1) << 1;
    if (type == TQ_TYPE_PQT2) {
        return index | ((unsigned) qs[4 + i / 8] >> (i % 8) & 1) << 2;
    }
    index |= ((unsigned) qs[4 + i / 8 + 4 * (i % 2)] >> (i % 8 & 6) & 3) << 2;
    const size_t n_words = tq_row_bytes(type, TQ_BLOCK) / 4;
    for (size_t word = 3; word < n_words; ++word) {
        index |= ((unsigned) qs[4 * word + (size_t) i / 8] >> (i % 8) & 1) << (word + 1);
    }
    return index;
}

/* In place, the Hadamard matrix of order 32, not normalised. */
static void hadamard(double * v) {
    for (int s = 1; s < TQ_BLOCK; s *= 2) {
        for (int i = 0; i < TQ_BLOCK; ++i) {
            if (!(i & s)) {
                const double a = v[i], b = v[i + s];
                v[i] = a + b;
                v[i + s] = a - b;
            }
        }
    }
}

static void check_blocks(const char * kernel) {
    const int64_t n = (int64_t) GOLDEN_BLOCKS * TQ_BLOCK;
    float * x = allocate((size_t) n * sizeof(float));
    float * y = allocate((size_t) n * sizeof(float) + 4);
    make_blocks(x);
    for (size_t g = 0; g < sizeof golden / sizeof golden[0]; ++g) {
        const int type = golden[g].type, mode = golden[g].mode;
        const size_t bytes = tq_row_bytes(type, n), block = tq_row_bytes(type, TQ_BLOCK);
        char name[64], detail[128];
        uint8_t * whole = allocate(bytes + 1);
        uint8_t * blocks = whole + 1; /* unaligned on purpose */
        snprintf(name, sizeof name, "%s %s", tq_type_name(type), tq_mode_name(mode));

        check(tq_encode(type, mode, x, n, blocks) == TQ_OK, kernel, name, tq_last_error());
        snprintf(detail, sizeof detail, "encoded bytes have digest %016llx, the oracle's %016llx",
                 (unsigned long long) digest(blocks, bytes), (unsigned long long) golden[g].digest);
        check(digest(blocks, bytes) == golden[g].digest, kernel, name, detail);

        /* a decoded block equals the definition */
        float levels[64], signs[TQ_BLOCK];
        tq_codebook(type, mode, levels, NULL);
        tq_signs(signs);
        check(tq_decode(type, mode, blocks, n, y) == TQ_OK, kernel, name, tq_last_error());
        double worst = 0.0;
        for (int b = 0; b < GOLDEN_BLOCKS; ++b) {
            const uint8_t * in = blocks + (size_t) b * block;
            double v[TQ_BLOCK], size = 0.0;
            uint16_t h;
            memcpy(&h, in, 2);
            const int e = (h >> 10) & 31, m = h & 1023;
            const double d = (h & 0x8000 ? -1.0 : 1.0) * (e ? ldexp(1024 + m, e - 25) : ldexp(m, -24));
            for (int i = 0; i < TQ_BLOCK; ++i) {
                v[i] = d * (double) levels[level_index(type, in + 2, i)] *
                       (mode == TQ_MODE_SEARCH ? 1.0 : (double) signs[i]);
            }
            hadamard(v);
            for (int i = 0; i < TQ_BLOCK; ++i) {
                size = fmax(size, fabs(v[i]));
            }
            for (int i = 0; i < TQ_BLOCK && size > 0.0; ++i) {
                const double want = v[i] / sqrt(32.0) * (mode == TQ_MODE_SEARCH ? (double) signs[i] : 1.0);
                worst = fmax(worst, fabs((double) y[b * TQ_BLOCK + i] - want) / (size / sqrt(32.0)));
            }
        }
        snprintf(detail, sizeof detail,
                 "decoded values differ from the definition by up to %.2e of the block's largest", worst);
        check(worst < 1e-6, kernel, name, detail);
        free(whole);
    }
    free(x);
    free(y);
}

typedef struct {
    int k_type, v_type, dk, dv, n_head, n_head_kv, n_q, n_kv, n_threads;
    int masked, sinks, softcap, alibi;
    int tail; /* recent rows of f16 that K and V have where their type may; 0: none */
} shape;

static float from_f16(uint16_t h) {
    const int e = (h >> 10) & 31, m = h & 1023;
    const float a = e == 31 ? INFINITY : e ? ldexpf((float) (1024 + m), e - 25) : ldexpf((float) m, -24);
    return h & 0x8000 ? -a : a;
}

/* n rows of dim values: encoded into *data (1 byte off alignment for blocks), their decoded values into x. */
static uint8_t * make_rows(int type, int64_t n, float * x) {
    uint8_t * data = allocate((size_t) n * 4 + 1);
    for (int64_t i = 0; i < n; ++i) {
        x[i] = normal();
    }
    if (type == TQ_TYPE_F32) {
        memcpy(data, x, (size_t) n * 4);
    } else if (type == TQ_TYPE_F16) {
        for (int64_t i = 0; i < n; ++i) { /* normal() has 18 bits; f16 keeps 11: cut it to values f16 holds */
            const float cut = ldexpf(floorf(ldexpf(x[i], 8)), -8);
            int e = 0;
            const float f = frexpf(fabsf(cut), &e);
            const uint16_t h = cut == 0.0f ? 0 : (uint16_t) (((e + 14) << 10) + (int) (ldexpf(f, 11) - 1024.0f));
            const uint16_t s = (uint16_t) (h | (cut < 0.0f ? 0x8000 : 0));
            memcpy(data + 2 * i, &s, 2);
            x[i] = from_f16(s);
        }
    } else {
        tq_encode(type, TQ_MODE_SEARCH, x, n, data + 1);
        tq_decode(type, TQ_MODE_SEARCH, data + 1, n, x);
    }
    return data;
}

#define TAIL_FIRST 2

/* In place, the inverse of the block transform of mode search, in double. */
static void inverse_transform(float * x) {
    float signs[TQ_BLOCK];
    double y[TQ_BLOCK];
    tq_signs(signs);
    for (int i = 0; i < TQ_BLOCK; ++i) {
        y[i] = (double) x[i];
    }
    hadamard(y);
    for (int i = 0; i < TQ_BLOCK; ++i) {
        x[i] = (float) (y[i] / sqrt(32.0) * (double) signs[i]);
    }
}

/* Gives an operand of n_kv tokens a tail with fresh values, which go into x: (n_kv, dim), too. Every fifth token owns
 * no row. */
static void make_tail(tq_attn_operand * o, int n_kv, int n_recent, int64_t dim, float * x) {
    const int n_row = n_recent + TAIL_FIRST;
    if (n_recent == 0 || o->type < TQ_TYPE_PQO3) {
        return;
    }
    uint16_t * rows = allocate((size_t) n_row * (size_t) dim * 2);
    int32_t * owner = allocate((size_t) n_row * 4);
    memset(owner, 0, (size_t) n_row * 4);
    for (int t = 0; t < n_kv; ++t) {
        const int64_t row = tq_tail_row(n_recent, TAIL_FIRST, t);
        float y[576 * 8];
        for (int i = 0; i < dim; ++i) {
            y[i] = normal();
        }
        tq_tail_encode(o->type, TQ_MODE_SEARCH, y, dim, rows + row * dim);
        owner[row] = t % 5 == 4 ? 0 : t + 1;
    }
    for (int row = 0; row < n_row; ++row) {
        float * to = x + (int64_t) (owner[row] - 1) * dim;
        for (int64_t i = 0; i < dim && owner[row] > 0; ++i) {
            to[i] = from_f16(rows[row * dim + i]);
        }
        for (int64_t b = 0; b < dim / TQ_BLOCK && owner[row] > 0; ++b) {
            inverse_transform(to + b * TQ_BLOCK);
        }
    }
    o->tail = (tq_attn_tail) { .data = rows,
                               .owner = owner,
                               .n_recent = n_recent,
                               .n_first = TAIL_FIRST,
                               .stride_row = (size_t) dim * 2,
                               .stride_head = (size_t) o->head_dim * 2 };
}

static void check_attention(const char * kernel, shape s) {
    char name[160], detail[128];
    snprintf(name, sizeof name, "attention %s/%s dk %d dv %d heads %d/%d n_q %d n_kv %d threads %d tail %d%s%s%s%s",
             tq_type_name(s.k_type), tq_type_name(s.v_type), s.dk, s.dv, s.n_head, s.n_head_kv, s.n_q, s.n_kv,
             s.n_threads, s.tail, s.masked ? " mask" : "", s.sinks ? " sinks" : "", s.softcap ? " softcap" : "",
             s.alibi ? " alibi" : "");
    state = 2;
    const int64_t nq = (int64_t) s.n_q * s.n_head * s.dk, nk = (int64_t) s.n_kv * s.n_head_kv * s.dk,
                  nv = (int64_t) s.n_kv * s.n_head_kv * s.dv, no = (int64_t) s.n_q * s.n_head * s.dv;
    float *q = allocate((size_t) nq * 4), *k = allocate((size_t) nk * 4), *v = allocate((size_t) nv * 4);
    float *out = allocate((size_t) no * 4), *sinks = allocate((size_t) s.n_head * 4);
    uint16_t * mask = allocate((size_t) s.n_q * (size_t) s.n_kv * 2);
    double * score = allocate((size_t) s.n_kv * sizeof(double));
    double * sum = allocate((size_t) s.dv * sizeof(double));
    for (int64_t i = 0; i < nq; ++i) {
        q[i] = normal();
    }
    for (int i = 0; i < s.n_head; ++i) {
        sinks[i] = normal();
    }
    uint8_t * k_data = make_rows(s.k_type, nk, k);
    uint8_t * v_data = make_rows(s.v_type, nv, v);
    for (int r = 0; r < s.n_q; ++r) {
        for (int t = 0; t < s.n_kv; ++t) { /* causal, with holes; row 0 of several rows sees nothing */
            const int hidden = t > s.n_kv - s.n_q + r || next() % 7 == 0 || (s.n_q > 1 && r == 0);
            mask[(size_t) r * (size_t) s.n_kv + (size_t) t] = hidden ? 0xfc00u : s.alibi ? 0xc000u /* -2 */ : 0;
        }
    }
    for (int64_t i = 0; i < no; ++i) {
        out[i] = NAN;
    }
    const int k_shift = s.k_type >= TQ_TYPE_PQO3, v_shift = s.v_type >= TQ_TYPE_PQO3;
    const size_t k_row = tq_row_bytes(s.k_type, s.dk), v_row = tq_row_bytes(s.v_type, s.dv);
    tq_attn a;
    memset(&a, 0, sizeof a);
    a.q = (tq_attn_operand) { .data = q,
                              .type = TQ_TYPE_F32,
                              .head_dim = s.dk,
                              .n_head = s.n_head,
                              .n_stream = 1,
                              .stride_token = (size_t) (s.n_head * s.dk) * 4,
                              .stride_head = (size_t) s.dk * 4 };
    a.k = (tq_attn_operand) { .data = k_data + k_shift,
                              .type = s.k_type,
                              .head_dim = s.dk,
                              .n_head = s.n_head_kv,
                              .n_stream = 1,
                              .stride_token = k_row * (size_t) s.n_head_kv,
                              .stride_head = k_row };
    a.v = (tq_attn_operand) { .data = v_data + v_shift,
                              .type = s.v_type,
                              .head_dim = s.dv,
                              .n_head = s.n_head_kv,
                              .n_stream = 1,
                              .stride_token = v_row * (size_t) s.n_head_kv,
                              .stride_head = v_row };
    make_tail(&a.k, s.n_kv, s.tail, (int64_t) s.n_head_kv * s.dk, k);
    make_tail(&a.v, s.n_kv, s.tail, (int64_t) s.n_head_kv * s.dv, v);
    a.n_q = s.n_q;
    a.n_kv = s.n_kv;
    a.scale = 1.0f / sqrtf((float) s.dk);
    a.softcap = s.softcap ? 3.0f : 0.0f;
    a.max_bias = s.alibi ? 8.0f : 0.0f;
    a.sinks = s.sinks ? sinks : NULL;
    a.mask = s.masked ? mask : NULL;
    a.n_mask_head = 1;
    a.n_mask_stream = 1;
    a.mask_stride_row = (size_t) s.n_kv * 2;
    a.out = out;
    a.out_stride_row = (size_t) (s.n_head * s.dv) * 4;
    a.out_stride_head = (size_t) s.dv * 4;
    const size_t work_bytes = tq_attn_work_bytes(&a, s.n_threads);
    uint8_t * work = allocate(work_bytes);
    memset(work, 0xff, work_bytes); /* NaN: nothing may be read before it is written */
    for (int n = 1; n <= s.n_threads; ++n) {
        check(tq_attn_work_bytes(&a, n) <= work_bytes, kernel, name, "fewer threads need more scratch");
    }
    check(work_bytes > 0, kernel, name, tq_last_error());
    for (int phase = 0; phase < 2; ++phase) {
        for (int t = 0; t < s.n_threads; ++t) {
            check(tq_attn_compute(&a, phase, t, s.n_threads, work) == TQ_OK, kernel, name, tq_last_error());
        }
    }

    double error = 0.0, norm = 0.0;
    int n2 = 1;
    while (2 * n2 <= s.n_head) {
        n2 *= 2;
    }
    for (int r = 0; r < s.n_q; ++r) {
        for (int h = 0; h < s.n_head; ++h) {
            const int kv = h / (s.n_head / s.n_head_kv);
            const double slope = !s.alibi ? 1.0
                                 : h < n2 ? pow(2.0, -8.0 / n2 * (h + 1))
                                          : pow(2.0, -4.0 / n2 * (2 * (h - n2) + 1));
            double max = s.sinks ? (double) sinks[h] : -INFINITY, total = 0.0;
            for (int t = 0; t < s.n_kv; ++t) {
                double x = 0.0;
                for (int i = 0; i < s.dk; ++i) {
                    x += (double) q[((int64_t) r * s.n_head + h) * s.dk + i] *
                         (double) k[((int64_t) t * s.n_head_kv + kv) * s.dk + i];
                }
                x /= sqrt(s.dk);
                x = s.softcap ? 3.0 * tanh(x / 3.0) : x;
                if (s.masked) {
                    const uint16_t m = mask[(size_t) r * (size_t) s.n_kv + (size_t) t];
                    x += slope * (m == 0xfc00u ? -INFINITY : m ? -2.0 : 0.0);
                }
                score[t] = x;
                max = fmax(max, x);
            }
            memset(sum, 0, (size_t) s.dv * sizeof(double));
            for (int t = 0; t < s.n_kv; ++t) {
                const double p = max == -INFINITY ? 0.0 : exp(score[t] - max);
                total += p;
                for (int i = 0; i < s.dv; ++i) {
                    sum[i] += p * (double) v[((int64_t) t * s.n_head_kv + kv) * s.dv + i];
                }
            }
            total += s.sinks ? exp((double) sinks[h] - max) : 0.0;
            for (int i = 0; i < s.dv; ++i) {
                const double want = total > 0.0 ? sum[i] / total : 0.0;
                const double got = (double) out[((int64_t) r * s.n_head + h) * s.dv + i];
                error += isfinite(got) ? (got - want) * (got - want) : INFINITY;
                norm += want * want;
            }
        }
    }
    /* measured: at most 1.6e-6 (fp32 sums of up to 32768 terms); 3.6e-4 where 16-bit integers are summed */
    const int integers = strcmp(kernel, "portable") != 0 && strcmp(kernel, "neon") != 0;
    const double tolerance = integers ? 1e-3 : 5e-6;
    const double relative = norm > 0.0 ? sqrt(error / norm) : sqrt(error);
    snprintf(detail, sizeof detail, "relative error %.2e", relative);
    check(relative < tolerance, kernel, name, detail);
    free(q);
    free(k);
    free(v);
    free(out);
    free(sinks);
    free(mask);
    free(score);
    free(sum);
    free(k_data);
    free(v_data);
    free(work);
    free((void *) a.k.tail.data);
    free((void *) a.k.tail.owner);
    free((void *) a.v.tail.data);
    free((void *) a.v.tail.owner);
}

static int check_kernel(const char * kernel) {
    static const int pairs[][2] = { { TQ_TYPE_PQO3, TQ_TYPE_PQO3 }, { TQ_TYPE_PQO4, TQ_TYPE_PQO4 },
                                    { TQ_TYPE_PQO4, TQ_TYPE_PQO3 }, { TQ_TYPE_PQO3, TQ_TYPE_F16 },
                                    { TQ_TYPE_F16, TQ_TYPE_PQO4 },  { TQ_TYPE_F32, TQ_TYPE_PQO3 },
                                    { TQ_TYPE_PQT3, TQ_TYPE_PQT3 }, { TQ_TYPE_PQT4, TQ_TYPE_PQT4 },
                                    { TQ_TYPE_PQO4, TQ_TYPE_PQT3 }, { TQ_TYPE_PQT4, TQ_TYPE_PQO3 },
                                    { TQ_TYPE_F16, TQ_TYPE_PQT3 },  { TQ_TYPE_PQT2, TQ_TYPE_PQT2 },
                                    { TQ_TYPE_PQT5, TQ_TYPE_PQT5 }, { TQ_TYPE_PQT5, TQ_TYPE_PQT2 } };
    int n = 0;
    check_blocks(kernel);
    for (size_t p = 0; p < sizeof pairs / sizeof pairs[0]; ++p) {
        const shape base = { .k_type = pairs[p][0],
                             .v_type = pairs[p][1],
                             .dk = 64,
                             .dv = 64,
                             .n_head = 4,
                             .n_head_kv = 2,
                             .n_q = 1,
                             .n_kv = 300,
                             .n_threads = 2,
                             .masked = 1 };
        for (int dim = 32; dim <= 576; dim += dim < 256 ? 32 : 320) { /* every step to 256, and 576 over 512 */
            shape s = base;
            s.dk = dim;
            s.dv = dim == 576 ? 512 : dim;
            for (s.n_q = 1; s.n_q <= 19; s.n_q += 9) {
                s.n_head = dim == 96 ? 2 : 8; /* GQA 1, 4, 8 */
                s.n_head_kv = dim == 128 ? 1 : 2;
                check_attention(kernel, s);
                ++n;
            }
        }
        for (int group = 1; group <= 12; ++group) { /* every fused width and beyond */
            shape s = base;
            s.n_head = 2 * group;
            s.n_kv = 65 + group;
            s.masked = group % 2;
            check_attention(kernel, s);
            ++n;
        }
        static const int lengths[] = { 0, 1, 2, 3, 31, 63, 64, 65, 127, 129, 511, 777, 2049 };
        for (size_t l = 0; l < sizeof lengths / sizeof lengths[0]; ++l) {
            shape s = base;
            s.n_kv = lengths[l];
            s.n_threads = 1 + (int) l % 5;
            s.sinks = (int) l % 2;
            s.softcap = (int) l % 3 == 1;
            s.alibi = (int) l % 4 == 1;
            check_attention(kernel, s);
            s.n_q = 5;
            s.n_threads = 64; /* more threads than rows */
            check_attention(kernel, s);
            n += 2;
        }
        for (int group = 1; group <= 9;
             ++group) { /* every fused width and beyond, with a tail that wraps, or takes everything */
            shape s = base;
            s.n_head = 2 * group;
            s.n_kv = 61 * group;
            s.tail = group % 3 == 0 ? 1024 : 37;
            s.masked = group % 2;
            check_attention(kernel, s);
            ++n;
        }
    }
    shape s = { .k_type = TQ_TYPE_PQO3,
                .v_type = TQ_TYPE_PQO4,
                .dk = 128,
                .dv = 128,
                .n_head = 2,
                .n_head_kv = 1,
                .n_q = 1,
                .n_kv = 32768,
                .n_threads = 3 };
    check_attention(kernel, s);
    /* four threads need no partial results here, three do */
    s = (shape) { .k_type = TQ_TYPE_PQO3,
                  .v_type = TQ_TYPE_PQO3,
                  .dk = 64,
                  .dv = 64,
                  .n_head = 8,
                  .n_head_kv = 4,
                  .n_q = 1,
                  .n_kv = 777,
                  .n_threads = 4 };
    check_attention(kernel, s);
    return n + 2;
}

/* Arguments: the kernels to run, all if there are none. */
int main(int argc, char ** argv) {
    int ran = 0;
    for (int i = 0; i < tq_kernel_count(); ++i) {
        const char * kernel = tq_kernel_name(i);
        int asked = argc == 1;
        for (int j = 1; j < argc; ++j) {
            asked |= strcmp(argv[j], kernel) == 0;
        }
        if (!asked) {
            continue;
        }
        if (!tq_kernel_supported(i)) {
            printf("skipped %-9s this CPU cannot run it\n", kernel);
            continue;
        }
        if (tq_kernel_force(kernel) != TQ_OK || strcmp(tq_kernel_active(), kernel) != 0) {
            check(0, kernel, "force", tq_last_error());
            continue;
        }
        const int before = failures, n = check_kernel(kernel);
        printf("%s  %-9s %d codecs, %d attention shapes\n", failures == before ? "passed" : "FAILED", kernel,
               (int) (sizeof golden / sizeof golden[0]), n);
        fflush(stdout);
        ++ran;
    }
    printf("%d kernels ran, %d failures\n", ran, failures);
    return failures > 0 || ran == 0;
}
