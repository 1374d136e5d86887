/* trellis_neon.c: the trellis types in AArch64 Advanced SIMD. */
#include "vector_neon.h"

#include "trellis_search.h"

/* The levels' units for tbl, which looks up in up to 64 bytes: entry e % 4 + 4 * subset + 16 * (e / 4). */
typedef uint8x16x4_t decoder;

INLINE decoder load_decoder(int bits, const tqi_codec * codec) {
    static const uint8_t order[16] = { 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15 };
    decoder c = vld1q_u8_x4((const uint8_t *) codec->level_units);
    (void) bits;
    UNROLL
    for (int i = 0; i < 4; ++i) {
        c.val[i] = vqtbl1q_u8(c.val[i], vld1q_u8(order));
    }
    return c;
}

typedef words codes; /* a block's levels in units: byte k of word j is value 8 k + j */

INLINE words turn(words w, const int32_t * left, const int32_t * rest) {
    return w_or(w_shift(w, left), w_shift(w, rest));
}

INLINE uint8x16_t look_up(int bits, const decoder * c, uint8x16_t index) {
    const uint8x16x2_t two = { { c->val[0], c->val[1] } };
    return bits <= 3 ? vqtbl1q_u8(c->val[0], index) : bits == 4 ? vqtbl2q_u8(two, index) : vqtbl4q_u8(*c, index);
}

INLINE codes open_block(int bits, const decoder * c, const uint8_t * in) {
    /* four bits of t, those of values i - 3 to i, determine the subset of value i; here times 4 */
    static const uint8_t subsets[16] = { 0, 8, 4, 12, 8, 0, 12, 4, 8, 0, 12, 4, 0, 8, 4, 12 };
    static const int32_t left[8] = { 3, 2, 1, 0, -1, -2, -3, -4 }; /* and the rest of the word right */
    static const int32_t rest[8] = { -29, -30, -31, 32, 31, 30, 29, 28 };
    static const int64_t pairs[4] = { 0, -2, -4, -6 };
    static const int32_t top_left[8] = { 4, 3, 2, 1, 0, -1, -2, -3 };
    static const int32_t top_rest[8] = { -28, -29, -30, -31, 32, 31, 30, 29 };
    static const int32_t low_left[8] = { 0, -1, -2, -3, -4, -5, -6, -7 };
    static const int32_t highest_left[8] = { 5, 4, 3, 2, 1, 0, -1, -2 };
    static const int32_t highest_rest[8] = { -27, -28, -29, -30, -31, 32, 31, 30 };
    const words t = turn(w_set1(tqi_load_u32(in + 2)), left, rest);
    uint64_t even_odd = 0;
    words found, low = w_zero(), top = w_zero(), highest = w_zero();
    if (bits == 2) {
        low = w_shift(w_set1(tqi_load_u32(in + 6)), low_left);
    } else {
        memcpy(&even_odd, in + 6, sizeof even_odd);
    }
    if (bits >= 4) {
        top = turn(w_set1(tqi_load_u32(in + 14)), top_left, top_rest);
    }
    if (bits == 5) {
        highest = turn(w_set1(tqi_load_u32(in + 18)), highest_left, highest_rest);
    }
    UNROLL
    for (int i = 0; i < 2; ++i) {
        const uint8x16_t four = vandq_u8(vreinterpretq_u8_u32(t.v[i]), vdupq_n_u8(15));
        const uint64x2_t pair = vshlq_u64(vdupq_n_u64(even_odd), vld1q_s64(pairs + 2 * i));
        uint8x16_t index = vqtbl1q_u8(vld1q_u8(subsets), four);
        index = vorrq_u8(index, bits == 2 ? vandq_u8(vreinterpretq_u8_u32(low.v[i]), vdupq_n_u8(1))
                                          : vandq_u8(vreinterpretq_u8_u64(pair), vdupq_n_u8(3)));
        index = vorrq_u8(index, vandq_u8(vreinterpretq_u8_u32(top.v[i]), vdupq_n_u8(16)));
        index = vorrq_u8(index, vandq_u8(vreinterpretq_u8_u32(highest.v[i]), vdupq_n_u8(32)));
        found.v[i] = vreinterpretq_u32_u8(look_up(bits, c, index));
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
#define BY_BITS TQI_BY_TRELLIS_BITS
#include "steps.h"

const tqi_steps tqi_trellis_neon = { encode, unpack, load_query, scores, accumulate, NULL };

void tqi_trellis_encode_neon(const tqi_codec * codec, const float * x, int64_t n_blocks, uint8_t * blocks) {
    encode(codec, x, n_blocks, blocks);
}

void tqi_trellis_unpack_neon(const tqi_codec * codec, const uint8_t * blocks, int64_t n_blocks, float * y) {
    unpack(codec, blocks, n_blocks, y);
}
