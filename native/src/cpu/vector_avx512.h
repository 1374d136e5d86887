/* vector_avx512.h: the vocabulary of vector.h in AVX-512 F, BW, DQ and VL. */
#ifndef TQI_VECTOR_AVX512_H
#define TQI_VECTOR_AVX512_H

#include "vector.h"

#include <immintrin.h>

#define LANES 16
#define SUMS 24

typedef __m512 vec;
typedef __m512i words;
typedef __mmask16 truth;

#define v_set1(x) _mm512_set1_ps(x)
#define v_load(p) _mm512_loadu_ps(p)
#define v_load_all(p) _mm512_set1_ps(*(p))
#define v_store(p, a) _mm512_storeu_ps(p, a)
#define v_load_f16(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) (const void *) (p)))
#define v_store_f16(p, a) _mm256_storeu_si256((__m256i *) (void *) (p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT))
#define v_add(a, b) _mm512_add_ps(a, b)
#define v_sub(a, b) _mm512_sub_ps(a, b)
#define v_mul(a, b) _mm512_mul_ps(a, b)
#define v_div(a, b) _mm512_div_ps(a, b)
#define v_min(a, b) _mm512_min_ps(a, b)
#define v_max(a, b) _mm512_max_ps(a, b)
#define v_abs(a) _mm512_abs_ps(a)
#define v_fma(a, b, c) _mm512_fmadd_ps(a, b, c)
#define v_round(a) _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define v_scale(keep, a, n) _mm512_maskz_scalef_ps(keep, a, n)
#define v_highest(a) _mm512_reduce_max_ps(a)
#define v_lookup(table, index) _mm512_permutexvar_ps(index, _mm512_castps256_ps512(_mm256_loadu_ps(table)))
#define v_lookup16(table, index) _mm512_permutexvar_ps(index, _mm512_loadu_ps(table))
#define v_per_block(p, stride) _mm512_mask_blend_ps(0xff00, _mm512_set1_ps((p)[0]), _mm512_set1_ps((p)[stride]))
#define v_less(a, b) _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ)
#define v_not_less(a, b) _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ)
#define v_equal(a, b) _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ)
#define v_select(which, yes, no) _mm512_mask_blend_ps(which, no, yes)
#define v_keep(which, a) _mm512_maskz_mov_ps(which, a)
#define v_lane(which, j) (*(which) >> (j) & 1)
#define w_zero() _mm512_setzero_si512()
#define w_add(a, b) _mm512_add_epi32(a, b)
#define w_store(p, a) _mm512_storeu_si512(p, a)
#define w_bits(w) _mm512_maskz_set1_epi32((__mmask16) (w), 1)
#define w_count(n, which) _mm512_mask_add_epi32(n, which, n, _mm512_set1_epi32(1))
#define f16_to_f32(h) _cvtsh_ss(h)
#define f32_to_f16(x) ((uint16_t) _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))

INLINE float v_sum(vec a) {
    const __m256 q = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 r = _mm_add_ps(_mm256_castps256_ps128(q), _mm256_extractf128_ps(q, 1));
    r = _mm_add_ps(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(_mm_add_ss(r, _mm_movehdup_ps(r)));
}

/* One stage of butterflies: the lanes of the mask get partner - self, the others self + partner. */
INLINE vec v_stage(vec a, vec partner, __mmask16 minus) {
    return v_fma(a, v_select(minus, v_set1(-1.0f), v_set1(1.0f)), partner);
}

INLINE vec v_hadamard(vec a) {
    a = v_stage(a, _mm512_permute_ps(a, 0xb1), 0xaaaa);
    a = v_stage(a, _mm512_permute_ps(a, 0x4e), 0xcccc);
    a = v_stage(a, _mm512_shuffle_f32x4(a, a, 0xb1), 0xf0f0);
    return v_stage(a, _mm512_shuffle_f32x4(a, a, 0x4e), 0xff00);
}

#endif
