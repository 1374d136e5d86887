/* vector_avx2.h: the vocabulary of vector.h in AVX2, FMA and F16C. */
#ifndef TQI_VECTOR_AVX2_H
#define TQI_VECTOR_AVX2_H

#include "vector.h"

#include <immintrin.h>

#define LANES 8
#define SUMS 12

typedef __m256 vec;
typedef __m256i words;
typedef __m256 truth;

#define v_set1(x) _mm256_set1_ps(x)
#define v_load(p) _mm256_loadu_ps(p)
#define v_load_all(p) _mm256_broadcast_ss(p)
#define v_store(p, a) _mm256_storeu_ps(p, a)
#define v_load_f16(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (const void *) (p)))
#define v_store_f16(p, a) _mm_storeu_si128((__m128i *) (void *) (p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT))
#define v_add(a, b) _mm256_add_ps(a, b)
#define v_sub(a, b) _mm256_sub_ps(a, b)
#define v_mul(a, b) _mm256_mul_ps(a, b)
#define v_div(a, b) _mm256_div_ps(a, b)
#define v_min(a, b) _mm256_min_ps(a, b)
#define v_max(a, b) _mm256_max_ps(a, b)
#define v_abs(a) _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a)
#define v_fma(a, b, c) _mm256_fmadd_ps(a, b, c)
#define v_round(a) _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define v_lookup(table, index) _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index)
#define v_per_block(p, stride) _mm256_broadcast_ss(p)
#define v_less(a, b) _mm256_cmp_ps(a, b, _CMP_LT_OQ)
#define v_not_less(a, b) _mm256_cmp_ps(a, b, _CMP_NLT_UQ)
#define v_equal(a, b) _mm256_cmp_ps(a, b, _CMP_EQ_OQ)
#define v_select(which, yes, no) _mm256_blendv_ps(no, yes, which)
#define v_keep(which, a) _mm256_and_ps(which, a)
#define w_zero() _mm256_setzero_si256()
#define w_add(a, b) _mm256_add_epi32(a, b)
#define w_store(p, a) _mm256_storeu_si256((__m256i *) (void *) (p), a)
#define w_count(n, which) _mm256_sub_epi32(n, _mm256_castps_si256(which)) /* true is -1 */
#define f16_to_f32(h) _cvtsh_ss(h)
#define f32_to_f16(x) ((uint16_t) _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))

INLINE vec v_scale(truth keep, vec a, vec n) {
    const words power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return v_keep(keep, _mm256_mul_ps(a, _mm256_castsi256_ps(power)));
}

INLINE vec v_lookup16(const float * table, words index) {
    const vec upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    return v_select(upper, v_lookup(table + 8, index), v_lookup(table, index));
}

INLINE float v_sum(vec a) {
    __m128 r = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    r = _mm_add_ps(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(_mm_add_ss(r, _mm_movehdup_ps(r)));
}

INLINE float v_highest(vec a) {
    __m128 r = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    r = _mm_max_ps(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(_mm_max_ss(r, _mm_movehdup_ps(r)));
}

/* One stage of butterflies: the lanes whose sign is -1 get partner - self, the others self + partner. */
INLINE vec v_stage(vec a, vec partner, vec sign) {
    return v_fma(a, sign, partner);
}

INLINE vec v_hadamard(vec a) {
    const vec sign1 = _mm256_setr_ps(1.0f, -1.0f, 1.0f, -1.0f, 1.0f, -1.0f, 1.0f, -1.0f);
    const vec sign2 = _mm256_setr_ps(1.0f, 1.0f, -1.0f, -1.0f, 1.0f, 1.0f, -1.0f, -1.0f);
    const vec sign4 = _mm256_setr_ps(1.0f, 1.0f, 1.0f, 1.0f, -1.0f, -1.0f, -1.0f, -1.0f);
    a = v_stage(a, _mm256_permute_ps(a, 0xb1), sign1);
    a = v_stage(a, _mm256_permute_ps(a, 0x4e), sign2);
    return v_stage(a, _mm256_permute2f128_ps(a, a, 1), sign4);
}

INLINE int v_lane(const truth * which, int j) {
    return (int) (tqi_load_u32((const uint8_t *) which + 4 * j) & 1u);
}

INLINE words w_bits(uint32_t w) {
    const words right = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32((int) w), right), _mm256_set1_epi32(1));
}

#endif
