/* format.cuh: blocks, words and scalars; native/src/format.h says what they mean. */
#ifndef TQ_FORMAT_CUH
#define TQ_FORMAT_CUH

#include "simt.cuh"

#if !defined(_Static_assert)
#    define _Static_assert static_assert
#endif
extern "C" {
#include "../src/codebook.h"
}

/* Threads that work on a block together: thread l of a team has the values l, l + 8, l + 16 and l + 24, so that f32 rows are
 * read in whole sectors, two stages of the transform need no exchange, and a trellis team has a thread per candidate. */
#define TQ_TEAM 8
#define TQ_VALUES (TQ_BLOCK / TQ_TEAM)

TQ_HD uint32_t tq_float_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

TQ_HD float tq_bits_float(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

/* In integers rather than by conversion instructions where bytes depend on it, as in format.h. */
TQ_HD uint16_t tq_f32_to_f16(float f) {
    const uint32_t u = tq_float_bits(f), sign = (u >> 16) & 0x8000u, abs = u & 0x7fffffffu;
    if (abs >= 0x47800000u) {
        return (uint16_t) (sign | (abs > 0x7f800000u ? 0x7e00u : 0x7c00u));
    }
    if (abs < 0x38800000u) {
        return (uint16_t) (sign | (tq_float_bits(tq_bits_float(abs) + 0.5f) - 0x3f000000u));
    }
    return (uint16_t) (sign | ((abs - 0x38000000u + 0xfffu + ((abs >> 13) & 1u)) >> 13));
}

TQ_HD float tq_f16_to_f32(uint16_t h) {
    const uint32_t sign = (uint32_t) (h & 0x8000u) << 16, exp = (h >> 10) & 0x1fu, man = h & 0x3ffu;
    if (exp == 0) {
        return tq_bits_float(sign | tq_float_bits((float) man * 5.9604644775390625e-8f));
    }
    return tq_bits_float(sign | (exp == 31 ? 0x7f800000u : (exp + 112) << 23) | man << 13);
}

TQ_HD float tq_bf16_to_f32(uint16_t h) {
    return tq_bits_float((uint32_t) h << 16);
}

/* Nearest even; NaN stays NaN. */
TQ_HD uint16_t tq_f32_to_bf16(float f) {
    const uint32_t u = tq_float_bits(f);
    return (uint16_t) ((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 64u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

TQ_HD float tq_sanitize(float x) {
    return !(x == x) ? 0.0f : x > TQI_F16_MAX ? TQI_F16_MAX : x < -TQI_F16_MAX ? -TQI_F16_MAX : x;
}

/* The f16 scale that decoders use: not finite -> 0. */
TQ_HD uint16_t tq_finite_scale(uint16_t h) {
    return (h & 0x7c00u) == 0x7c00u ? (uint16_t) 0 : h;
}

/* The sign table, bit i set where value i is negated. */
#define TQ_SIGN_BITS 0xb1a6d4b2u

TQ_HD float tq_apply_sign(float x, int i) {
    return tq_bits_float(tq_float_bits(x) ^ (TQ_SIGN_BITS >> i & 1u) << 31);
}

TQ_HD uint32_t tq_rotate(uint32_t t, int n) {
    return t << n | t >> (32 - n);
}
TQ_HD uint32_t tq_subset_low(uint32_t t) {
    return tq_rotate(t, 2);
}
TQ_HD uint32_t tq_subset_high(uint32_t t) {
    return t ^ tq_rotate(t, 1) ^ tq_rotate(t, 3);
}
TQ_HD int tq_subset_of(uint32_t t, int i) {
    return (int) (2 * (tq_subset_high(t) >> i & 1u) + (tq_subset_low(t) >> i & 1u));
}

/* A block's words after its scale; three of them at 3 bits. Blocks lie at even addresses. */
TQ_HD void tq_load_words(const uint8_t * block, int bits, uint32_t * words) {
    const uint16_t * halves = (const uint16_t *) (const void *) (block + 2);
    TQ_UNROLL
    for (int i = 0; i < 4; ++i) {
        words[i] = i < bits ? halves[2 * i] | (uint32_t) halves[2 * i + 1] << 16 : 0;
    }
}

/* index: value l + 8 m of a PQO block. */
TQ_HD int tq_unpack_index(int bits, const uint32_t * words, int l, int m) {
    if (bits == 4) {
        return (int) (words[m] >> (4 * l) & 15u);
    }
    const uint32_t group = m == 0   ? words[0]
                           : m == 1 ? words[0] >> 24 | words[1] << 8
                           : m == 2 ? words[1] >> 16 | words[2] << 16
                                    : words[2] >> 8;
    return (int) (group >> (3 * l) & 7u);
}

/* groups[m]: the indices of values 8 m .. 8 m + 7 side by side -> the block's words. */
TQ_HD void tq_pack(int bits, const uint32_t * groups, uint32_t * words) {
    words[0] = bits == 4 ? groups[0] : groups[0] | groups[1] << 24;
    words[1] = bits == 4 ? groups[1] : groups[1] >> 8 | groups[2] << 16;
    words[2] = bits == 4 ? groups[2] : groups[2] >> 16 | groups[3] << 8;
    words[3] = bits == 4 ? groups[3] : 0;
}

/* The level of value i of a trellis block. */
TQ_HD int tq_unpack_level(const uint32_t * words, int i) {
    const uint32_t e = (i % 2 ? words[2] : words[1]) >> (i & ~1) & 3u;
    return (int) (4 * (e + 4 * (words[3] >> i & 1u))) + tq_subset_of(words[0], i);
}

#endif
