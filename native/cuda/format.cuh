/* format.cuh: blocks, words and scalars; native/src/format.h says what they mean. */
#ifndef TQI_FORMAT_CUH
#define TQI_FORMAT_CUH

#include "simt.cuh"

/* Threads that work on a block together: thread l of a team has the values l, l + 8, l + 16 and l + 24, so that f32
 * rows are read in whole sectors, two stages of the transform need no exchange, and a trellis team has a thread per
 * candidate. */
#define TQI_TEAM 8
#define TQI_VALUES (TQ_BLOCK / TQI_TEAM)

TQI_HD float tqi_bf16_to_f32(uint16_t h) {
    return tqi_bits_float((uint32_t) h << 16);
}

/* Nearest even; NaN stays NaN. */
TQI_HD uint16_t tqi_f32_to_bf16(float f) {
    const uint32_t u = tqi_float_bits(f);
    return (uint16_t) ((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 64u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

/* The f16 scale that decoders use: not finite -> 0. */
TQI_HD uint16_t tqi_finite_scale(uint16_t h) {
    return (h & 0x7c00u) == 0x7c00u ? (uint16_t) 0 : h;
}

/* The sign table, bit i set where value i is negated. */
#define TQI_SIGN_BITS 0xb1a6d4b2u

TQI_HD float tqi_apply_sign(float x, int i) {
    return tqi_bits_float(tqi_float_bits(x) ^ (TQI_SIGN_BITS >> i & 1u) << 31);
}

TQI_HD uint32_t tqi_rotate(uint32_t t, int n) {
    return t << n | t >> (32 - n);
}
TQI_HD uint32_t tqi_subset_low(uint32_t t) {
    return tqi_rotate(t, 2);
}
TQI_HD uint32_t tqi_subset_high(uint32_t t) {
    return t ^ tqi_rotate(t, 1) ^ tqi_rotate(t, 3);
}
TQI_HD int tqi_subset_of(uint32_t t, int i) {
    return (int) (2 * (tqi_subset_high(t) >> i & 1u) + (tqi_subset_low(t) >> i & 1u));
}

/* A block's words after its scale: as many as bits. Blocks lie at even addresses. words: (TQI_MAX_WORDS). */
TQI_HD void tqi_load_words(const uint8_t * block, int bits, uint32_t * words) {
    const uint16_t * halves = (const uint16_t *) (const void *) (block + 2);
    TQI_UNROLL
    for (int i = 0; i < TQI_MAX_WORDS; ++i) {
        words[i] = i < bits ? halves[2 * i] | (uint32_t) halves[2 * i + 1] << 16 : 0;
    }
}

/* index: value l + 8 m of a PQO block. */
TQI_HD int tqi_unpack_index(int bits, const uint32_t * words, int l, int m) {
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
TQI_HD void tqi_pack(int bits, const uint32_t * groups, uint32_t * words) {
    words[0] = bits == 4 ? groups[0] : groups[0] | groups[1] << 24;
    words[1] = bits == 4 ? groups[1] : groups[1] >> 8 | groups[2] << 16;
    words[2] = bits == 4 ? groups[2] : groups[2] >> 16 | groups[3] << 8;
    words[3] = bits == 4 ? groups[3] : 0;
    words[4] = 0;
}

/* The level of value i of a trellis block. */
TQI_HD int tqi_unpack_level(int bits, const uint32_t * words, int i) {
    return (int) (4 * tqi_trellis_e(bits, words, i)) + tqi_subset_of(words[0], i);
}

/* The row of a tail that a token goes to; tokens and rows are below 2^31. */
TQI_HD int tqi_tail_row_of(int64_t n_recent, int64_t n_first, int token) {
    return token < n_first ? (int) n_recent + token : (int) ((uint32_t) token % (uint32_t) n_recent);
}

#endif
