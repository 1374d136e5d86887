/* fuzz.h: what the fuzz targets share. A target is one function over arbitrary bytes, LLVMFuzzerTestOneInput: libFuzzer
 * calls it (make fuzz), and replay.c, which calls it for saved inputs (make test). A broken promise ends the
 * process. */
#ifndef TQ_FUZZ_H
#define TQ_FUZZ_H

#include "tqgguf.h"

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size);

#define REQUIRE(condition, ...)                                                                                        \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: broken: %s: ", __FILE__, __LINE__, #condition);                                    \
            fprintf(stderr, __VA_ARGS__);                                                                              \
            fprintf(stderr, " (%s)\n", tq_kernel_active());                                                            \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

/* The kernels that this machine can run, portable first: the others are compared with it. */
#define MAX_KERNELS 8
static const char * kernels[MAX_KERNELS];
static int n_kernels;

static inline void find_kernels(void) {
    for (int i = tq_kernel_count() - 1; n_kernels == 0 && i >= 0; --i) {
        for (; i >= 0; --i) {
            if (tq_kernel_supported(i)) {
                kernels[n_kernels++] = tq_kernel_name(i);
            }
        }
    }
}

static inline void use_kernel(int i) {
    if (tq_kernel_force(kernels[i]) != TQ_OK) {
        abort();
    }
}

/* Bounds on what rounding does to the sums of attention, for any values (tqgguf.h states what it does to normal ones).
 * Kernels sum in f32; avx512 and avx2 sum integers, of 14 bits at least for the levels of keys and for q, of 13 and 14
 * bits for those of values and for their weights: each block adds half of 1 / 8191 of its largest possible level times a sum over 32
 * channels or a tile's tokens, and that is sqrt(32) times a length at most. */
#define F32_TOLERANCE 1e-5
#define TILE 64

static inline int sums_integers(void) {
    return strncmp(tq_kernel_active(), "avx", 3) == 0;
}

/* Of a dot product of q with a block, or more, of length k; reach is its scale times the outermost level. */
static inline double dot_bound(double q, double k, double reach) {
    return q * (F32_TOLERANCE * k + (sums_integers() ? 5.6569 / 16382 * (k + reach) : 0.0));
}

/* The largest magnitude of a codec's levels. */
static inline double outermost(int type, int mode) {
    float levels[64];
    const int n = tq_codebook(type, mode, levels, NULL);
    return n > 0 ? fmax(fabs((double) levels[0]), fabs((double) levels[n - 1])) : 0.0;
}

/* The scale of a block, as decoders use it, without its sign. */
static inline double scale_of(const uint8_t * block) {
    uint16_t d;
    memcpy(&d, block, sizeof d);
    const int e = d >> 10 & 31, m = d & 1023;
    return e == 31 ? 0.0 : e > 0 ? ldexp(1024 + m, e - 25) : ldexp(m, -24);
}

typedef struct {
    int type, mode;
} codec;

static const codec codecs[] = {
    { TQ_TYPE_PQO3, TQ_MODE_SEARCH },  { TQ_TYPE_PQO4, TQ_MODE_SEARCH }, { TQ_TYPE_PQO3, TQ_MODE_MAXNORM },
    { TQ_TYPE_PQO4, TQ_MODE_MAXNORM }, { TQ_TYPE_PQO3, TQ_MODE_L2NORM }, { TQ_TYPE_PQO4, TQ_MODE_L2NORM },
    { TQ_TYPE_PQT3, TQ_MODE_SEARCH },  { TQ_TYPE_PQT4, TQ_MODE_SEARCH }, { TQ_TYPE_PQT2, TQ_MODE_SEARCH },
    { TQ_TYPE_PQT5, TQ_MODE_SEARCH },
};
#define N_CODECS ((int) (sizeof codecs / sizeof codecs[0]))
#define N_PQO 6 /* of them; the others are trellis types, whose encoder is ten times as slow */

static inline uint16_t load_u16(const void * p) {
    uint16_t u;
    memcpy(&u, p, sizeof u);
    return u;
}

/* The bytes of an input, one after another; zeros when it is at its end. */
typedef struct {
    const uint8_t * at;
    size_t left;
} bytes;

static inline uint8_t take(bytes * in) {
    if (in->left == 0) {
        return 0;
    }
    in->left--;
    return *in->at++;
}

static inline int take_below(bytes * in, int n) {
    return take(in) % n;
}

static inline uint32_t take_u32(bytes * in) {
    uint32_t u = 0;
    for (int i = 0; i < 4; ++i) {
        u |= (uint32_t) take(in) << (8 * i);
    }
    return u;
}

static inline float take_float(bytes * in) {
    const uint32_t u = take_u32(in);
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

/* Goes on for ever after the end of an input: xorshift32, so that a short input can describe a long array. */
static inline uint32_t scramble(uint32_t * state) {
    *state ^= *state << 13;
    *state ^= *state >> 17;
    *state ^= *state << 5;
    return *state;
}

#endif
