/* trellis_neon.c: the trellis types in AArch64 Advanced SIMD. */
#include "vector_neon.h"

#include "trellis_search.h"

/* The levels' units for tbl, which looks up in 16 bytes or 32: entry e % 4 + 4 * subset + 16 * (e / 4). */
typedef uint8x16x2_t decoder;

INLINE decoder load_decoder(int bits, const tqi_codec * codec) {
    static const uint8_t order[16] = { 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15 };
    decoder c = vld1q_u8_x2((const uint8_t *) codec->level_units);
    (void) bits;
    c.val[0] = vqtbl1q_u8(c.val[0], vld1q_u8(order));
    c.val[1] = vqtbl1q_u8(c.val[1], vld1q_u8(order));
    return c;
}

typedef words codes; /* a block's levels in units: byte k of word j is value 8 k + j */

INLINE words turn(words w, const int32_t * left, const int32_t * rest) {
    return w_or(w_shift(w, left), w_shift(w, rest));
}

INLINE codes open_block(int bits, const decoder * c, const uint8_t * in) {
    /* four bits of t, those of values i - 3 to i, determine the subset of value i; here times 4 */
    static const uint8_t subsets[16] = { 0, 8, 4, 12, 8, 0, 12, 4, 8, 0, 12, 4, 0, 8, 4, 12 };
    static const int32_t left[8] = { 3, 2, 1, 0, -1, -2, -3, -4 }; /* and the rest of the word right */
    static const int32_t rest[8] = { -29, -30, -31, 32, 31, 30, 29, 28 };
    static const int64_t pairs[4] = { 0, -2, -4, -6 };
    static const int32_t top_left[8] = { 4, 3, 2, 1, 0, -1, -2, -3 };
    static const int32_t top_rest[8] = { -28, -29, -30, -31, 32, 31, 30, 29 };
    const words t = turn(w_set1(tqi_load_u32(in + 2)), left, rest);
    uint64_t even_odd;
    words found;
    memcpy(&even_odd, in + 6, sizeof even_odd);
    UNROLL
    for (int i = 0; i < 2; ++i) {
        const uint8x16_t four = vandq_u8(vreinterpretq_u8_u32(t.v[i]), vdupq_n_u8(15));
        const uint64x2_t low = vshlq_u64(vdupq_n_u64(even_odd), vld1q_s64(pairs + 2 * i));
        const uint8x16_t subset = vqtbl1q_u8(vld1q_u8(subsets), four);
        uint8x16_t index = vorrq_u8(subset, vandq_u8(vreinterpretq_u8_u64(low), vdupq_n_u8(3)));
        if (bits == 4) {
            const words top = turn(w_set1(tqi_load_u32(in + 14)), top_left, top_rest);
            index = vorrq_u8(index, vandq_u8(vreinterpretq_u8_u32(top.v[i]), vdupq_n_u8(16)));
        }
        found.v[i] = vreinterpretq_u32_u8(bits == 3 ? vqtbl1q_u8(c->val[0], index) : vqtbl2q_u8(*c, index));
    }
    return found;
}

INLINE float32x4_t values4(uint32x4_t units, int g) {
    const int32x4_t x = vshlq_s32(vreinterpretq_s32_u32(units), vdupq_n_s32(24 - 8 * g));
    return vcvtq_f32_s32(vshrq_n_s32(x, 24));
}

INLINE vec values(int bits, const decoder * c, codes units, int g) {
    (void) bits, (void) c;
    return (vec) { { values4(units.v[0], g), values4(units.v[1], g) } };
}

#define LEVEL_UNIT TQI_LEVEL_UNIT
#define DECODE_AHEAD 1
#include "fused.h"
#include "steps.h"

const tqi_steps tqi_trellis_neon = { encode, unpack, scores, accumulate };
