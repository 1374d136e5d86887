/* transform.h: the orthonormal 32-point Walsh-Hadamard transform with its sign table, scalar form.
 *
 * The stage order h = 1, 2, 4, 8, 16 and the reduction order of tqi_sum32 are part of the format: encoders on every
 * instruction set must follow them to give the same bytes. */
#ifndef TQI_TRANSFORM_H
#define TQI_TRANSFORM_H

#include "codebook.h"

/* y <- H32 y / sqrt(32), in place. */
static inline void tqi_hadamard32(float * y) {
    for (int h = 1; h < TQ_BLOCK; h *= 2) {
        for (int i = 0; i < TQ_BLOCK; i += 2 * h) {
            for (int j = i; j < i + h; ++j) {
                const float a = y[j];
                const float b = y[j + h];
                y[j] = a + b;
                y[j + h] = a - b;
            }
        }
    }
    for (int i = 0; i < TQ_BLOCK; ++i) {
        y[i] *= TQI_RSQRT_BLOCK;
    }
}

static inline void tqi_apply_signs(float * y) {
    for (int i = 0; i < TQ_BLOCK; ++i) {
        y[i] *= tqi_signs[i];
    }
}

/* In place, one block. */
static inline void tqi_transform(tqi_sign_order order, float * y) {
    if (order == TQI_SIGNS_FIRST) {
        tqi_apply_signs(y);
        tqi_hadamard32(y);
    } else {
        tqi_hadamard32(y);
        tqi_apply_signs(y);
    }
}

/* Sum in a halving tree: p[i] += p[i + h] for h = 16, 8, 4, 2, 1. Destroys p. */
static inline float tqi_sum32(float * p) {
    for (int h = TQ_BLOCK / 2; h > 0; h /= 2) {
        for (int i = 0; i < h; ++i) {
            p[i] = p[i] + p[i + h];
        }
    }
    return p[0];
}

#endif
