/* trellis_avx512.c: the trellis types in AVX-512. Two blocks are searched at once. Attention multiplies f32: it takes 2.1 times
 * what avx512.c takes for PQO with its sums of 16-bit integers. */
#include "transform.h"
#include "trellis.h"

#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

/* ---- Encode ---- */

#define LANES 16
typedef __m512 lanes;
typedef __m512i words;
typedef __mmask16 truth;

#define lanes_set1(x) _mm512_set1_ps(x)
#define lanes_load(x) _mm512_loadu_ps(x)
#define lanes_store(x, a) _mm512_storeu_ps(x, a)
#define lanes_add(a, b) _mm512_add_ps(a, b)
#define lanes_sub(a, b) _mm512_sub_ps(a, b)
#define lanes_mul(a, b) _mm512_mul_ps(a, b)
#define lanes_min(a, b) _mm512_min_ps(a, b)
#define lanes_max(a, b) _mm512_max_ps(a, b)
#define lanes_per_block(x, stride) _mm512_mask_blend_ps(0xff00, _mm512_set1_ps((x)[0]), _mm512_set1_ps((x)[stride]))
#define lanes_lookup(table, index) _mm512_permutexvar_ps(index, _mm512_castps256_ps512(_mm256_loadu_ps(table)))
#define words_zero() _mm512_setzero_si512()
#define words_add(a, b) _mm512_add_epi32(a, b)
#define words_store(x, a) _mm512_storeu_si512(x, a)
#define words_bits(w) _mm512_maskz_set1_epi32((__mmask16) (w), 1)
#define words_count(n, a, b) _mm512_mask_add_epi32(n, truth_less(a, b), n, _mm512_set1_epi32(1))
#define truth_less(a, b) _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ)
#define truth_equal(a, b) _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ)
#define truth_select(which, yes, no) _mm512_mask_blend_ps(which, no, yes)
#define truth_lane(which, j) (*(which) >> (j) & 1)

#include "trellis_search.h"

void tqi_trellis_search_avx512(const tqi_codec * codec, const float * y, int64_t n_blocks, uint8_t * blocks) {
    const subset_tables c = load_subsets(codec);
    for (int64_t b = 0; b < n_blocks;
         b += N_BLOCKS, y += N_BLOCKS * TQ_BLOCK, blocks += N_BLOCKS * codec->block_bytes) {
        const int n_used = n_blocks - b < N_BLOCKS ? 1 : N_BLOCKS;
        float last[N_BLOCKS * TQ_BLOCK]; /* an odd last block twice */
        const float * from = y;
        if (n_used < N_BLOCKS) {
            memcpy(last, y, TQ_BLOCK * sizeof(float));
            memcpy(last + TQ_BLOCK, y, TQ_BLOCK * sizeof(float));
            from = last;
        }
        if (codec->bits == 3) {
            encode_blocks(4, codec, &c, from, n_used, blocks);
        } else {
            encode_blocks(8, codec, &c, from, n_used, blocks);
        }
    }
}

/* ---- Decode ---- */

/* The levels' units for vpermb, which looks up by five bits: entry e % 4 + 4 * subset + 16 * (e / 4). */
INLINE __m256i load_units(const tqi_codec * codec) {
    const __m256i order =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    return _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i *) (const void *) codec->level_units), order);
}

INLINE __m256i word8(const uint8_t * at) {
    return _mm256_set1_epi32((int) tqi_load_u32(at));
}

#define OR_AND(a, b, c) _mm256_ternarylogic_epi32(a, b, c, 0xf8) /* a | (b & c) */

/* A block's levels in units: byte k of word j is value 8 k + j. */
INLINE __m256i units32(int bits, __m256i units, const uint8_t * block) {
    /* four bits of t, those of values i - 3 to i, determine the subset of value i; here times 4 */
    const __m256i subsets =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 8, 4, 12, 8, 0, 12, 4, 8, 0, 12, 4, 0, 8, 4, 12));
    const __m256i turned = _mm256_rorv_epi32(word8(block + 2), _mm256_setr_epi32(29, 30, 31, 0, 1, 2, 3, 4));
    const __m256i subset = _mm256_shuffle_epi8(subsets, _mm256_and_si256(turned, _mm256_set1_epi8(15)));
    int64_t even_odd;
    memcpy(&even_odd, block + 6, sizeof even_odd);
    const __m256i pairs = _mm256_srlv_epi64(_mm256_set1_epi64x(even_odd), _mm256_setr_epi64x(0, 2, 4, 6));
    __m256i index = OR_AND(subset, pairs, _mm256_set1_epi8(3));
    if (bits == 4) {
        const __m256i top = _mm256_rorv_epi32(word8(block + 14), _mm256_setr_epi32(28, 29, 30, 31, 0, 1, 2, 3));
        index = OR_AND(index, top, _mm256_set1_epi8(16));
    }
    return _mm256_permutexvar_epi8(index, units);
}

typedef struct {
    __m512 v[2]; /* values 0..15, 16..31 */
} block;

INLINE block values32(__m256i units) {
    const __m512i twice = _mm512_broadcast_i64x4(units);
    const __m512i left = _mm512_setr_epi32(24, 24, 24, 24, 24, 24, 24, 24, 16, 16, 16, 16, 16, 16, 16, 16);
    const __m512i last = _mm512_setr_epi32(8, 8, 8, 8, 8, 8, 8, 8, 0, 0, 0, 0, 0, 0, 0, 0);
    return (block) { {
        _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_sllv_epi32(twice, left), 24)),
        _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_sllv_epi32(twice, last), 24)),
    } };
}

/* The scale as all decoders use it, for levels in units. */
INLINE __m512 unit_scale(const uint8_t * in) {
    const uint16_t h = tqi_load_u16(in);
    return _mm512_set1_ps((h & 0x7c00u) == 0x7c00u ? 0.0f : TQI_LEVEL_UNIT * _cvtsh_ss(h));
}

INLINE void unpack_rows(int bits, const tqi_codec * codec, const uint8_t * blocks, int64_t n_blocks, float * y) {
    const __m256i units = load_units(codec);
    for (int64_t b = 0; b < n_blocks; ++b, y += TQ_BLOCK, blocks += 4 * bits + 2) {
        const __m512 d = unit_scale(blocks);
        const block x = values32(units32(bits, units, blocks));
        _mm512_storeu_ps(y, _mm512_mul_ps(d, x.v[0]));
        _mm512_storeu_ps(y + 16, _mm512_mul_ps(d, x.v[1]));
    }
}

void tqi_trellis_unpack_avx512(const tqi_codec * codec, const uint8_t * blocks, int64_t n_blocks, float * y) {
    if (codec->bits == 3) {
        unpack_rows(3, codec, blocks, n_blocks, y);
    } else {
        unpack_rows(4, codec, blocks, n_blocks, y);
    }
}

/* ---- Attention ---- */

INLINE void scores_rows(int bits, int n_q, const tqi_codec * codec, const uint8_t * k, size_t stride, int n_tok,
                        const float * q, int n_blocks, float * s, int ld) {
    const __m256i units = load_units(codec);
    for (int t = 0; t < n_tok; ++t) {
        const uint8_t * in = k + (size_t) t * stride;
        __m512 total[TQI_MAX_FUSED];
        tqi_prefetch(in + TQI_AHEAD * stride, (size_t) (n_blocks * (4 * bits + 2)));
        for (int i = 0; i < n_q; ++i) {
            total[i] = _mm512_setzero_ps();
        }
        for (int b = 0; b < n_blocks; ++b, in += 4 * bits + 2) {
            const __m512 d = unit_scale(in);
            const block x = values32(units32(bits, units, in));
            for (int i = 0; i < n_q; ++i) {
                const float * qi = q + (i * n_blocks + b) * TQ_BLOCK;
                const __m512 p = _mm512_mul_ps(x.v[0], _mm512_loadu_ps(qi));
                total[i] = _mm512_fmadd_ps(d, _mm512_fmadd_ps(x.v[1], _mm512_loadu_ps(qi + 16), p), total[i]);
            }
        }
        for (int i = 0; i < n_q; ++i) {
            s[i * ld + t] = _mm512_reduce_add_ps(total[i]);
        }
    }
}

/* A block column keeps its sums for n_q vectors in registers over all tokens. */
INLINE void accumulate_rows(int bits, int n_q, const tqi_codec * codec, const uint8_t * v, size_t stride, int n_tok,
                            const float * p, int ld, int n_blocks, float * o) {
    const __m256i units = load_units(codec);
    for (int b = 0; b < n_blocks; ++b, v += 4 * bits + 2, o += TQ_BLOCK) {
        const uint8_t * in = v;
        __m512 sum[TQI_MAX_FUSED][2];
        for (int i = 0; i < n_q; ++i) {
            sum[i][0] = _mm512_loadu_ps(o + i * n_blocks * TQ_BLOCK);
            sum[i][1] = _mm512_loadu_ps(o + i * n_blocks * TQ_BLOCK + 16);
        }
        for (int t = 0; t < n_tok; ++t, in += stride) {
            const __m512 d = unit_scale(in);
            const block x = values32(units32(bits, units, in));
            tqi_prefetch(in + TQI_AHEAD * stride, (size_t) (4 * bits + 2));
            for (int i = 0; i < n_q; ++i) {
                const __m512 w = _mm512_mul_ps(d, _mm512_set1_ps(p[i * ld + t]));
                sum[i][0] = _mm512_fmadd_ps(w, x.v[0], sum[i][0]);
                sum[i][1] = _mm512_fmadd_ps(w, x.v[1], sum[i][1]);
            }
        }
        for (int i = 0; i < n_q; ++i) {
            _mm512_storeu_ps(o + i * n_blocks * TQ_BLOCK, sum[i][0]);
            _mm512_storeu_ps(o + i * n_blocks * TQ_BLOCK + 16, sum[i][1]);
        }
    }
}

void tqi_trellis_scores_avx512(const tqi_codec * codec, const uint8_t * k, size_t stride, int n_tok, const float * q,
                               int n_q, int n_blocks, float * s, int ld) {
    if (codec->bits == 3) {
        TQI_BY_N_Q(scores_rows, 3, n_q, codec, k, stride, n_tok, q, n_blocks, s, ld)
    } else {
        TQI_BY_N_Q(scores_rows, 4, n_q, codec, k, stride, n_tok, q, n_blocks, s, ld)
    }
}

void tqi_trellis_accumulate_avx512(const tqi_codec * codec, const uint8_t * v, size_t stride, int n_tok,
                                   const float * p, int ld, int n_q, int n_blocks, float * o) {
    if (codec->bits == 3) {
        TQI_BY_N_Q(accumulate_rows, 3, n_q, codec, v, stride, n_tok, p, ld, n_blocks, o)
    } else {
        TQI_BY_N_Q(accumulate_rows, 4, n_q, codec, v, stride, n_tok, p, ld, n_blocks, o)
    }
}
