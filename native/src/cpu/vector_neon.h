/* vector_neon.h: the vocabulary of vector.h in AArch64 Advanced SIMD. A vector is a pair of registers: with eight
 * lanes, as in AVX2, a lane of the trellis search is a candidate and a group of eight indices fills a vector. */
#ifndef TQI_VECTOR_NEON_H
#define TQI_VECTOR_NEON_H

#include "vector.h"

#include <arm_neon.h>

#define LANES 8
#define SUMS 12

typedef struct {
    float32x4_t v[2];
} vec;

typedef struct {
    uint32x4_t v[2];
} words;

typedef words truth; /* true is -1 */

/* name(a), and name(a, b): one instruction for each of the two registers. */
#define UNARY(type, name, of, instruction)                                                                             \
    INLINE type name(of a) {                                                                                           \
        return (type) { { instruction(a.v[0]), instruction(a.v[1]) } };                                                \
    }
#define BINARY(type, name, of, instruction)                                                                            \
    INLINE type name(of a, of b) {                                                                                     \
        return (type) { { instruction(a.v[0], b.v[0]), instruction(a.v[1], b.v[1]) } };                                \
    }

#define v_load_all(p) v_set1(*(p))
#define v_per_block(p, stride) v_set1(*(p))

INLINE vec v_set1(float x) {
    return (vec) { { vdupq_n_f32(x), vdupq_n_f32(x) } };
}

INLINE vec v_load(const float * p) {
    return (vec) { { vld1q_f32(p), vld1q_f32(p + 4) } };
}

INLINE void v_store(float * p, vec a) {
    vst1q_f32(p, a.v[0]);
    vst1q_f32(p + 4, a.v[1]);
}

INLINE vec v_load_f16(const uint16_t * p) {
    const float16x8_t h = vreinterpretq_f16_u16(vld1q_u16(p));
    return (vec) { { vcvt_f32_f16(vget_low_f16(h)), vcvt_high_f32_f16(h) } };
}

INLINE void v_store_f16(uint16_t * p, vec a) {
    vst1q_u16(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(a.v[0]), a.v[1])));
}

BINARY(vec, v_add, vec, vaddq_f32)
BINARY(vec, v_sub, vec, vsubq_f32)
BINARY(vec, v_mul, vec, vmulq_f32)
BINARY(vec, v_div, vec, vdivq_f32)
BINARY(vec, v_min, vec, vminq_f32)
BINARY(vec, v_max, vec, vmaxq_f32)
UNARY(vec, v_abs, vec, vabsq_f32)

INLINE vec v_fma(vec a, vec b, vec c) {
    return (vec) { { vfmaq_f32(c.v[0], a.v[0], b.v[0]), vfmaq_f32(c.v[1], a.v[1], b.v[1]) } };
}

UNARY(vec, v_round, vec, vrndnq_f32)
BINARY(truth, v_less, vec, vcltq_f32)

INLINE truth v_not_less(vec a, vec b) {
    return (truth) { { vmvnq_u32(vcltq_f32(a.v[0], b.v[0])), vmvnq_u32(vcltq_f32(a.v[1], b.v[1])) } };
}

BINARY(truth, v_equal, vec, vceqq_f32)

INLINE vec v_select(truth which, vec yes, vec no) {
    return (vec) { { vbslq_f32(which.v[0], yes.v[0], no.v[0]), vbslq_f32(which.v[1], yes.v[1], no.v[1]) } };
}

INLINE float32x4_t keep4(uint32x4_t which, float32x4_t a) {
    return vreinterpretq_f32_u32(vandq_u32(which, vreinterpretq_u32_f32(a)));
}

INLINE vec v_keep(truth which, vec a) {
    return (vec) { { keep4(which.v[0], a.v[0]), keep4(which.v[1], a.v[1]) } };
}

INLINE int v_lane(const truth * which, int j) {
    return (int) (tqi_load_u32((const uint8_t *) which + 4 * j) & 1u);
}

INLINE float32x4_t power4(float32x4_t n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
}

INLINE vec v_scale(truth keep, vec a, vec n) {
    return v_keep(keep, v_mul(a, (vec) { { power4(n.v[0]), power4(n.v[1]) } }));
}

INLINE float v_sum(vec a) {
    const float32x4_t h = vaddq_f32(a.v[0], a.v[1]);
    return vaddv_f32(vadd_f32(vget_low_f32(h), vget_high_f32(h)));
}

INLINE float v_highest(vec a) {
    return vmaxvq_f32(vmaxq_f32(a.v[0], a.v[1]));
}

/* Butterflies inside a register: of neighbours, then of halves. */
INLINE float32x4_t hadamard4(float32x4_t a) {
    const float32x4_t even = vtrn1q_f32(a, a), odd = vtrn2q_f32(a, a);
    const float32x4_t s = vtrn1q_f32(vaddq_f32(even, odd), vsubq_f32(even, odd));
    const float32x2_t low = vget_low_f32(s), high = vget_high_f32(s);
    return vcombine_f32(vadd_f32(low, high), vsub_f32(low, high));
}

INLINE vec v_hadamard(vec a) {
    const float32x4_t low = hadamard4(a.v[0]), high = hadamard4(a.v[1]);
    return (vec) { { vaddq_f32(low, high), vsubq_f32(low, high) } };
}

/* The positions of the four bytes of floats number index in a table. */
INLINE uint8x16_t bytes_at(uint32x4_t index) {
    return vreinterpretq_u8_u32(vmlaq_n_u32(vdupq_n_u32(0x03020100u), index, 0x04040404u));
}

INLINE vec v_lookup(const float * table, words index) {
    const uint8x16x2_t bytes = vld1q_u8_x2((const uint8_t *) (const void *) table);
    return (vec) { { vreinterpretq_f32_u8(vqtbl2q_u8(bytes, bytes_at(index.v[0]))),
                     vreinterpretq_f32_u8(vqtbl2q_u8(bytes, bytes_at(index.v[1]))) } };
}

INLINE vec v_lookup16(const float * table, words index) {
    const uint8x16x4_t bytes = vld1q_u8_x4((const uint8_t *) (const void *) table);
    return (vec) { { vreinterpretq_f32_u8(vqtbl4q_u8(bytes, bytes_at(index.v[0]))),
                     vreinterpretq_f32_u8(vqtbl4q_u8(bytes, bytes_at(index.v[1]))) } };
}

INLINE words w_zero(void) {
    return (words) { { vdupq_n_u32(0), vdupq_n_u32(0) } };
}

BINARY(words, w_add, words, vaddq_u32)

INLINE void w_store(int32_t * p, words a) {
    vst1q_s32(p, vreinterpretq_s32_u32(a.v[0]));
    vst1q_s32(p + 4, vreinterpretq_s32_u32(a.v[1]));
}

/* Each lane of w shifted left by its own number of bits, right where that is negative. */
INLINE words w_shift(words w, const int32_t * left) {
    return (words) { { vshlq_u32(w.v[0], vld1q_s32(left)), vshlq_u32(w.v[1], vld1q_s32(left + 4)) } };
}

INLINE words w_set1(uint32_t w) {
    return (words) { { vdupq_n_u32(w), vdupq_n_u32(w) } };
}

BINARY(words, w_and, words, vandq_u32)
BINARY(words, w_or, words, vorrq_u32)

INLINE words w_bits(uint32_t w) {
    static const int32_t right[8] = { 0, -1, -2, -3, -4, -5, -6, -7 };
    return w_and(w_shift(w_set1(w), right), w_set1(1));
}

BINARY(words, w_count, words, vsubq_u32) /* true is -1 */

INLINE float f16_to_f32(uint16_t h) {
    return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h))), 0);
}

INLINE uint16_t f32_to_f16(float x) {
    return vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(x))), 0);
}

#endif
