/* lanes_avx512.h: the vocabulary of lanes.h and trellis_lanes.h in AVX-512 with VBMI and VNNI.
 *
 * vpdpbusd makes four products a dword, of bytes without sign and bytes with one: levels have OFFSET added, and an
 * integer is 256 high + low. low is its lower byte, taken for signed; high the upper byte of the integer plus 128. */
#ifndef TQI_LANES_AVX512_H
#define TQI_LANES_AVX512_H

#include "vector_avx512.h"

#include <math.h>

#define N_LANES 4
#define MOST 4
#define OFFSET_BITS 7
#define LARGEST (127 * 256)

#define w_load(p) _mm512_loadu_si512(p)
#define w_set1(x) _mm512_set1_epi32(x)
#define w_lane(p) _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) (const void *) (p)))
#define w_sub(a, b) _mm512_sub_epi32(a, b)
#define w_max(a, b) _mm512_max_epu32(a, b)
#define w_shl(a, n) _mm512_slli_epi32(a, n)
#define w_shr(a, n) _mm512_srli_epi32(a, n)
#ifdef __clang__ /* takes a literal alone for _mm512_rol_epi32, and makes one instruction of two shifts by a constant */
#    define w_rol(a, n)                                                                                                \
        _mm512_or_si512(_mm512_slli_epi32(a, (unsigned) (n)), _mm512_srli_epi32(a, (32u - (unsigned) (n)) & 31))
#else
#    define w_rol(a, n) _mm512_rol_epi32(a, n)
#endif
#define w_xor3(a, b, c) _mm512_ternarylogic_epi32(a, b, c, 0x96)
#define w_select(mask, yes, no) _mm512_ternarylogic_epi32(mask, yes, no, 0xca)
#define w_shuffle(a, at) _mm512_shuffle_epi8(a, at)
#define w_swap1(a) _mm512_shuffle_epi32(a, _MM_PERM_CDAB)
#define w_swap2(a) _mm512_shuffle_epi32(a, _MM_PERM_BADC)
#define w_low32(a, b) _mm512_unpacklo_epi32(a, b)
#define w_high32(a, b) _mm512_unpackhi_epi32(a, b)
#define w_low64(a, b) _mm512_unpacklo_epi64(a, b)
#define w_high64(a, b) _mm512_unpackhi_epi64(a, b)
#define w_round(v) _mm512_cvtps_epi32(v)
#define v_from(w) _mm512_cvtepi32_ps(w)
#define w_cast(v) _mm512_castps_si512(v)
#define v_cast(w) _mm512_castsi512_ps(w)

#include "lanes.h"

#include "blocks_avx512.h"

typedef blocks16 token_blocks;
#define load_blocks(bits, wide, at, stride, n_tok, n) load_blocks16(1, bits, wide, at, stride, n_tok, n)

INLINE void v_store_first(float * to, int n, vec a) {
    _mm512_mask_storeu_ps(to, (__mmask16) (n < 16 ? (1u << n) - 1u : 0xffffu), a);
}

/* The first n of four tokens' floats in the dwords of each lane (wide 2: of eight, the second four in lanes 2 and 3). */
INLINE vec spread_tokens(int wide, const float * x, int n) {
    const words at = wide == 4 ? _mm512_broadcast_i32x4(_mm_setr_epi32(0, 1, 2, 3))
                               : _mm512_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7);
    return _mm512_permutexvar_ps(at, _mm512_maskz_loadu_ps((__mmask16) ((1u << n) - 1u), x));
}

/* For vpermb, which looks up by six bits, the levels in units, OFFSET added: what stands above a level's own bits does
 * not matter. */
typedef words level_table;

INLINE level_table load_level_table(int bits, const tqi_codec * codec) {
    const words units = _mm512_loadu_si512(codec->level_units);
    const words all = bits == 2   ? _mm512_permutexvar_epi8(_mm512_set1_epi64(0x0706050403020100), units)
                      : bits == 3 ? _mm512_broadcast_i32x4(_mm512_castsi512_si128(units))
                      : bits == 4 ? _mm512_broadcast_i64x4(_mm512_castsi512_si256(units))
                                  : units;
    return _mm512_xor_si512(all, _mm512_set1_epi8((char) (1 << OFFSET_BITS)));
}

INLINE words units_of(int bits, const level_table * c, words nibble, words top, words highest, int j) {
    words index = j < 4 ? nibble : w_shr(nibble, 4);
    if (bits >= 4) {
        index = w_select(_mm512_set1_epi8(0x0f), index, w_rol(top, (4 - j) & 31));
    }
    if (bits == 5) {
        index = w_select(_mm512_set1_epi8(0x1f), index, w_rol(highest, (5 - j) & 31));
    }
    return _mm512_permutexvar_epi8(index, *c);
}

typedef struct {
    words low, high;
} sums;

INLINE sums sums_of(words a) {
    return (sums) { a, w_zero() };
}

INLINE void add_products(sums * s, words units, const words * parts) {
    s->low = _mm512_dpbusd_epi32(s->low, units, parts[0]);
    s->high = _mm512_dpbusd_epi32(s->high, units, parts[1]);
}

INLINE words join(sums s) {
    return w_add(w_shl(s.high, 8), s.low);
}

INLINE void split(words integers, words * parts) {
    static const uint8_t low[16] = { 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12 };
    static const uint8_t high[16] = { 1, 5, 9, 13, 1, 5, 9, 13, 1, 5, 9, 13, 1, 5, 9, 13 };
    parts[0] = w_shuffle(integers, w_lane(low));
    parts[1] = w_shuffle(w_add(integers, w_set1(128)), w_lane(high));
}

/* Adds sums to n blocks of o: lane b of rows[m][h] is values 8 m + 4 h to 8 m + 4 h + 3 of block b (wide 2: of b % 2). */
INLINE void add_rows(int wide, __m512 (*rows)[2], int n, float * o) {
    for (int g = 0; g < 2; ++g) { /* values 16 g .. 16 g + 15 of all blocks */
        const __m512 *a = rows[2 * g], *b = rows[2 * g + 1];
        const __m512 a01 = _mm512_shuffle_f32x4(a[0], a[1], 0x44), a23 = _mm512_shuffle_f32x4(a[0], a[1], 0xee);
        const __m512 b01 = _mm512_shuffle_f32x4(b[0], b[1], 0x44), b23 = _mm512_shuffle_f32x4(b[0], b[1], 0xee);
        const __m512 sum[4] = { _mm512_shuffle_f32x4(a01, b01, 0x88), _mm512_shuffle_f32x4(a01, b01, 0xdd),
                                _mm512_shuffle_f32x4(a23, b23, 0x88), _mm512_shuffle_f32x4(a23, b23, 0xdd) };
        for (int k = 0; k < n; ++k) {
            float * to = o + k * TQ_BLOCK + 16 * g;
            const __m512 more = wide == 2 ? _mm512_add_ps(sum[k], sum[k + 2]) : sum[k];
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), more));
        }
    }
}

#endif
