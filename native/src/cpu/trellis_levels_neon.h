/* trellis_levels_neon.h: what lanes_neon.h takes, for the trellis types. Part r has in byte k the lower four bits of
 * values 8 k + r, in its lower half, and 8 k + r + 4. */
#ifndef TQI_TRELLIS_LEVELS_NEON_H
#define TQI_TRELLIS_LEVELS_NEON_H

#include "quads_neon.h"

#define PARTS 1
#define VALUE_AT(r, h, k) (8 * (k) + (r) + 4 * (h))

typedef struct {
    int8x16_t part[PARTS]; /* high, low */
} levels;

/* The levels in units, for tbl. */
typedef struct {
    uint8x16_t units[4];
    float step;
} level_table;

INLINE level_table load_level_table(int bits, const tqi_codec * codec) {
    level_table c = { .step = TQI_LEVEL_UNIT };
    for (int i = 0; i < (bits < 4 ? 1 : 1 << (bits - 3)); ++i) {
        c.units[i] = vld1q_u8((const uint8_t *) codec->level_units + 16 * i);
    }
    if (bits == 2) { /* what stands above an index's three bits must not matter */
        c.units[0] = vcombine_u8(vget_low_u8(c.units[0]), vget_low_u8(c.units[0]));
    }
    return c;
}

/* w turned left by a constant number of bits. */
#define TURNED(w, n) vsriq_n_u32(vshlq_n_u32(w, n), w, 32 - (n))

/* As find_levels of trellis_lanes.h. */
INLINE quad find_levels(int bits, const uint8x16_t * word, uint32x4_t fifth) {
    const uint32x4_t even_bits = vdupq_n_u32(0x55555555u), even_pairs = vdupq_n_u32(0x33333333u);
    const uint32x4_t t = vreinterpretq_u32_u8(word[0]), t1 = TURNED(t, 1), low = TURNED(t, 2);
    const uint32x4_t high = veorq_u32(veorq_u32(t, t1), TURNED(t, 3));
    const uint32x4_t even = vbslq_u32(even_bits, low, vshlq_n_u32(high, 1)), odd = vbslq_u32(even_bits, t1, high);
    const uint32x4_t first = vreinterpretq_u32_u8(word[1]);
    const uint32x4_t second = bits == 2 ? vshrq_n_u32(first, 1) : vreinterpretq_u32_u8(word[2]);
    quad y;
    y.part[0] = vreinterpretq_u8_u32(vbslq_u32(even_pairs, even, vshlq_n_u32(first, 2)));
    y.part[1] = vreinterpretq_u8_u32(vbslq_u32(even_pairs, odd, vshlq_n_u32(second, 2)));
    y.part[2] = vreinterpretq_u8_u32(vbslq_u32(even_pairs, vshrq_n_u32(even, 2), first));
    y.part[3] = vreinterpretq_u8_u32(vbslq_u32(even_pairs, vshrq_n_u32(odd, 2), second));
    y.top = bits >= 4 ? word[3] : vdupq_n_u8(0);
    y.highest = bits == 5 ? vreinterpretq_u8_u32(fifth) : vdupq_n_u8(0);
    return y;
}

INLINE quad load_tokens(int bits, const uint8_t * const * rows) {
    uint8x16_t x[4], word[4];
    uint32x4_t fifth = vdupq_n_u32(0);
    for (int j = 0; j < 4; ++j) {
        x[j] = load_codes(bits, rows[j]);
    }
    transpose_words(bits < 4 ? bits : 4, x, word);
    if (bits == 5) {
        fifth = vsetq_lane_u32(tqi_load_u32(rows[0] + 18), fifth, 0);
        fifth = vsetq_lane_u32(tqi_load_u32(rows[1] + 18), fifth, 1);
        fifth = vsetq_lane_u32(tqi_load_u32(rows[2] + 18), fifth, 2);
        fifth = vsetq_lane_u32(tqi_load_u32(rows[3] + 18), fifth, 3);
    }
    return find_levels(bits, word, fifth);
}

INLINE quad load_turned(int bits, const uint8_t * const * rows) {
    static const uint8_t turned_bytes[16] = { 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15 };
    const uint8x16_t turned = vld1q_u8(turned_bytes);
    quad x = load_tokens(bits, rows);
    for (int r = 0; r < 4; ++r) {
        x.part[r] = vqtbl1q_u8(x.part[r], turned);
    }
    x.top = bits >= 4 ? vqtbl1q_u8(x.top, turned) : x.top;
    x.highest = bits == 5 ? vqtbl1q_u8(x.highest, turned) : x.highest;
    return x;
}

/* index, with bit `to` of its bytes from bit j of those of bits. */
INLINE uint8x16_t with_bit(uint8x16_t index, uint8x16_t bits, int j, int to) {
    const uint8x16_t moved = to >= j ? bits << (to - j) : bits >> (j - to);
    return vbslq_u8(vdupq_n_u8((uint8_t) (1 << to)), moved, index);
}

INLINE uint8x16_t look_up(int bits, const level_table * c, uint8x16_t index) {
    if (bits <= 3) {
        return vqtbl1q_u8(c->units[0], index);
    }
    if (bits == 4) {
        return vqtbl2q_u8((uint8x16x2_t) { { c->units[0], c->units[1] } }, index);
    }
    return vqtbl4q_u8((uint8x16x4_t) { { c->units[0], c->units[1], c->units[2], c->units[3] } }, index);
}

INLINE levels levels_of(int bits, const level_table * c, uint8x16_t part, uint8x16_t top, uint8x16_t highest, int r,
                        int h) {
    uint8x16_t index = h == 0 ? vandq_u8(part, vdupq_n_u8(15)) : vshrq_n_u8(part, 4);
    index = bits >= 4 ? with_bit(index, top, r + 4 * h, 4) : index;
    index = bits == 5 ? with_bit(index, highest, r + 4 * h, 5) : index;
    return (levels) { { vreinterpretq_s8_u8(look_up(bits, c, index)) } };
}

INLINE void add_sums(float unit, int32x4_t (*sum)[2], float * o) {
    UNROLL
    for (int h = 0; h < 2; ++h) {
        uint8x16_t x[4], y[4];
        for (int r = 0; r < 4; ++r) {
            x[r] = vreinterpretq_u8_s32(sum[r][h]);
        }
        transpose_words(4, x, y);
        for (int m = 0; m < 4; ++m) {
            float * to = o + 8 * m + 4 * h;
            vst1q_f32(to, vfmaq_n_f32(vld1q_f32(to), vcvtq_f32_s32(vreinterpretq_s32_u8(y[m])), unit));
        }
    }
}

#endif
