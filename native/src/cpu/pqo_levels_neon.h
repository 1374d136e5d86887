/* pqo_levels_neon.h: what lanes_neon.h takes, for the PQO types. Each part is a word of a block: its byte k has values
 * 8 r + 2 k and 8 r + 2 k + 1. */
#ifndef TQI_PQO_LEVELS_NEON_H
#define TQI_PQO_LEVELS_NEON_H

#include "quads_neon.h"

#define PARTS 2
#define VALUE_AT(r, h, k) (8 * (r) + 2 * (k) + (h))
#define LEVEL_MAX (127 * 256)

typedef struct {
    int8x16_t part[PARTS]; /* high, low */
} levels;

/* The codebook as integers; step: what 256 stands for, since sums of levels in two bytes leave eight bits out. */
typedef struct {
    int8x16_t part[2];
    float step;
} level_table;

INLINE level_table load_level_table(int bits, const tqi_codec * codec) {
    const float top = fmaxf(-codec->levels[0], codec->levels[codec->n_levels - 1]);
    const float inverse = LEVEL_MAX / top;
    int8_t part[2][16] = { { 0 } };
    for (int i = 0; i < 1 << bits; i += 4) {
        int32_t x[4];
        vst1q_s32(x, vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(codec->levels + i), inverse)));
        for (int j = 0; j < 4; ++j) {
            part[0][i + j] = (int8_t) ((x[j] + 128) >> 8);
            part[1][i + j] = (int8_t) (x[j] - 256 * part[0][i + j]);
        }
    }
    return (level_table) { { vld1q_s8(part[0]), vld1q_s8(part[1]) }, 256.0f * (top / LEVEL_MAX) };
}

/* The indices of a 3-bit block, which cross bytes, as bytes of two indices each, with two bits of no meaning above. */
INLINE uint8x16_t spread_indices(uint8x16_t codes) {
    static const uint8_t halves[16] = { 0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11 };
    static const int16_t right[8] = { 0, -4, 0, -4, 0, -4, 0, -4 };
    const uint16x8_t four = vshlq_u16(vreinterpretq_u16_u8(vqtbl1q_u8(codes, vld1q_u8(halves))), vld1q_s16(right));
    return vreinterpretq_u8_u16(vbslq_u16(vdupq_n_u16(0x00ff), four, vshlq_n_u16(four, 2)));
}

INLINE void load_indices(int bits, const uint8_t * const * rows, uint8x16_t * x) {
    for (int j = 0; j < 4; ++j) {
        x[j] = load_codes(bits, rows[j]);
        x[j] = bits == 3 ? spread_indices(x[j]) : x[j];
    }
}

INLINE quad load_tokens(int bits, const uint8_t * const * rows) {
    uint8x16_t x[4];
    quad y;
    load_indices(bits, rows, x);
    transpose_words(4, x, y.part);
    return y;
}

INLINE quad load_turned(int bits, const uint8_t * const * rows) {
    uint8x16_t x[4];
    quad y;
    load_indices(bits, rows, x);
    const uint8x16_t low02 = vzip1q_u8(x[0], x[2]), low13 = vzip1q_u8(x[1], x[3]);
    const uint8x16_t high02 = vzip2q_u8(x[0], x[2]), high13 = vzip2q_u8(x[1], x[3]);
    y.part[0] = vzip1q_u8(low02, low13);
    y.part[1] = vzip2q_u8(low02, low13);
    y.part[2] = vzip1q_u8(high02, high13);
    y.part[3] = vzip2q_u8(high02, high13);
    return y;
}

INLINE levels levels_of(int bits, const level_table * c, uint8x16_t part, uint8x16_t top, uint8x16_t highest, int r,
                        int h) {
    (void) top, (void) highest, (void) r;
    const uint8x16_t mask = vdupq_n_u8(bits == 3 ? 7 : 15);
    const uint8x16_t index = h == 0      ? vandq_u8(part, mask)
                             : bits == 3 ? vandq_u8(vshrq_n_u8(part, 3), mask)
                                         : vshrq_n_u8(part, 4);
    return (levels) { { vqtbl1q_s8(c->part[0], index), vqtbl1q_s8(c->part[1], index) } };
}

INLINE void add_sums(float unit, int32x4_t (*sum)[2], float * o) {
    UNROLL
    for (int r = 0; r < 4; ++r, o += 8) {
        const float32x4_t even = vcvtq_f32_s32(sum[r][0]), odd = vcvtq_f32_s32(sum[r][1]);
        vst1q_f32(o, vfmaq_n_f32(vld1q_f32(o), vzip1q_f32(even, odd), unit));
        vst1q_f32(o + 4, vfmaq_n_f32(vld1q_f32(o + 4), vzip2q_f32(even, odd), unit));
    }
}

#endif
