/* transform.cuh: the block transform on values that are spread over threads. Every element sees the same additions in
 * the same order as in native/src/transform.h, so the results are the same to the bit where nothing is contracted. */
#ifndef TQI_TRANSFORM_CUH
#define TQI_TRANSFORM_CUH

#include "format.cuh"

/* One butterfly of which this thread has one side. */
TQI_D float tqi_butterfly(float x, int lane, int h) {
    const float other = tqi_exchange(x, h);
    return fmaf(x, lane & h ? -1.0f : 1.0f, other); /* exact but for the one rounding that a sum has */
}

/* A team's block; l: the thread in its team. */
TQI_D void tqi_hadamard32(float * v, int l) {
    TQI_UNROLL
    for (int h = 1; h < TQI_TEAM; h *= 2) {
        TQI_UNROLL
        for (int m = 0; m < TQI_VALUES; ++m) {
            v[m] = tqi_butterfly(v[m], l, h);
        }
    }
    const float a = v[0] + v[1], b = v[0] - v[1], c = v[2] + v[3], d = v[2] - v[3];
    v[0] = (a + c) * TQI_RSQRT_BLOCK;
    v[1] = (b + d) * TQI_RSQRT_BLOCK;
    v[2] = (a - c) * TQI_RSQRT_BLOCK;
    v[3] = (b - d) * TQI_RSQRT_BLOCK;
}

TQI_D void tqi_apply_signs(float * v, int l) {
    TQI_UNROLL
    for (int m = 0; m < TQI_VALUES; ++m) {
        v[m] = tqi_apply_sign(v[m], l + TQI_TEAM * m);
    }
}

TQI_D void tqi_transform(int signs_first, float * v, int l) {
    if (signs_first) {
        tqi_apply_signs(v, l);
    }
    tqi_hadamard32(v, l);
    if (!signs_first) {
        tqi_apply_signs(v, l);
    }
}

/* The inverse of one order is the other one. */
TQI_D void tqi_inverse_transform(int signs_first, float * v, int l) {
    tqi_transform(!signs_first, v, l);
}

/* The same where lane i of a warp has value i. */
TQI_D float tqi_transform_warp(int signs_first, float x, int lane) {
    x = signs_first ? tqi_apply_sign(x, lane) : x;
    TQI_UNROLL
    for (int h = 1; h < TQ_BLOCK; h *= 2) {
        x = tqi_butterfly(x, lane, h);
    }
    x *= TQI_RSQRT_BLOCK;
    return signs_first ? x : tqi_apply_sign(x, lane);
}

/* The same where 16 lanes have two values each, i and i + 1. Whichever bits of i a lane's number has, in whatever
 * order: sums of 32 are the same but for rounding. */
TQI_D void tqi_transform_pairs(int signs_first, float * v, int lane, int i) {
    TQI_UNROLL
    for (int m = 0; m < 2; ++m) {
        v[m] = signs_first ? tqi_apply_sign(v[m], i + m) : v[m];
        TQI_UNROLL
        for (int h = 1; h < TQ_BLOCK / 2; h *= 2) {
            v[m] = tqi_butterfly(v[m], lane, h);
        }
    }
    const float a = v[0] * TQI_RSQRT_BLOCK, b = v[1] * TQI_RSQRT_BLOCK;
    v[0] = a + b;
    v[1] = a - b;
    TQI_UNROLL
    for (int m = 0; m < 2 && !signs_first; ++m) {
        v[m] = tqi_apply_sign(v[m], i + m);
    }
}

/* The halving tree of tqi_sum32 over a team's 32 numbers. Sums are exchanged both ways and a + b = b + a, so that every
 * thread ends with the one result. */
TQI_D float tqi_sum32(const float * p) {
    float sum = (p[0] + p[2]) + (p[1] + p[3]);
    TQI_UNROLL
    for (int h = TQI_TEAM / 2; h > 0; h /= 2) {
        sum = sum + tqi_exchange(sum, h);
    }
    return sum;
}

TQI_D void tqi_bounds32(const float * v, float * max, float * min) {
    *max = fmaxf(fmaxf(v[0], v[1]), fmaxf(v[2], v[3]));
    *min = fminf(fminf(v[0], v[1]), fminf(v[2], v[3]));
    TQI_UNROLL
    for (int h = TQI_TEAM / 2; h > 0; h /= 2) {
        *max = fmaxf(*max, tqi_exchange(*max, h));
        *min = fminf(*min, tqi_exchange(*min, h));
    }
}

/* Sum, and largest, of the lanes whose numbers differ in bits from FIRST up to, not including, LAST. */
template <int FIRST, int LAST> TQI_D float tqi_add_lanes(float x) {
    TQI_UNROLL
    for (int h = FIRST; h < LAST; h *= 2) {
        x += tqi_exchange(x, h);
    }
    return x;
}

template <int FIRST, int LAST> TQI_D float tqi_largest_of_lanes(float x) {
    TQI_UNROLL
    for (int h = FIRST; h < LAST; h *= 2) {
        x = fmaxf(x, tqi_exchange(x, h));
    }
    return x;
}

/* All bits that any thread of the team has. */
TQI_D uint32_t tqi_gather(uint32_t bits) {
    TQI_UNROLL
    for (int h = TQI_TEAM / 2; h > 0; h /= 2) {
        bits |= tqi_exchange(bits, h);
    }
    return bits;
}

#endif
