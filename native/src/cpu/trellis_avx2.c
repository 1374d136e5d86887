/* trellis_avx2.c: the trellis types in AVX2. */
#include "transform.h"
#include "trellis.h"

#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

/* ---- Encode ---- */

#define LANES 8
typedef __m256 lanes;
typedef __m256i words;
typedef __m256 truth;

#define lanes_set1(x) _mm256_set1_ps(x)
#define lanes_load(x) _mm256_loadu_ps(x)
#define lanes_store(x, a) _mm256_storeu_ps(x, a)
#define lanes_add(a, b) _mm256_add_ps(a, b)
#define lanes_sub(a, b) _mm256_sub_ps(a, b)
#define lanes_mul(a, b) _mm256_mul_ps(a, b)
#define lanes_min(a, b) _mm256_min_ps(a, b)
#define lanes_max(a, b) _mm256_max_ps(a, b)
#define lanes_per_block(x, stride) _mm256_broadcast_ss(x) /* one block */
#define lanes_lookup(table, index) _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index)
#define words_zero() _mm256_setzero_si256()
#define words_add(a, b) _mm256_add_epi32(a, b)
#define words_store(x, a) _mm256_storeu_si256((__m256i *) (void *) (x), a)
#define words_count(n, a, b) _mm256_sub_epi32(n, _mm256_castps_si256(truth_less(a, b)))
#define truth_less(a, b) _mm256_cmp_ps(a, b, _CMP_LT_OQ)
#define truth_equal(a, b) _mm256_cmp_ps(a, b, _CMP_EQ_OQ)
#define truth_select(which, yes, no) _mm256_blendv_ps(no, yes, which)

INLINE words words_bits(uint32_t w) {
    return _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32((int) w), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)),
                            _mm256_set1_epi32(1));
}

INLINE int truth_lane(const truth * which, int j) {
    return (int) (tqi_load_u32((const uint8_t *) which + 4 * j) & 1u);
}

#include "trellis_search.h"

void tqi_trellis_search_avx2(const tqi_codec * codec, const float * y, int64_t n_blocks, uint8_t * blocks) {
    const subset_tables c = load_subsets(codec);
    for (int64_t b = 0; b < n_blocks; ++b, y += TQ_BLOCK, blocks += codec->block_bytes) {
        if (codec->bits == 3) {
            encode_blocks(4, codec, &c, y, 1, blocks);
        } else {
            encode_blocks(8, codec, &c, y, 1, blocks);
        }
    }
}

/* ---- Decode ---- */

/* The levels' units for pshufb, which looks up by four bits: entry e % 4 + 4 * subset; pqt4 has two tables, by bit 2 of e. */
typedef struct {
    __m256i units[2];
} unit_tables;

INLINE unit_tables load_units(int bits, const tqi_codec * codec) {
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    unit_tables c;
    for (int i = 0; i < bits - 2; ++i) {
        const __m128i units = _mm_loadu_si128((const __m128i *) (const void *) (codec->level_units + 16 * i));
        c.units[i] = _mm256_broadcastsi128_si256(_mm_shuffle_epi8(units, order));
    }
    return c;
}

INLINE __m256i word8(const uint8_t * at) {
    return _mm256_set1_epi32((int) tqi_load_u32(at));
}

/* A block's levels in units: byte k of word j is value 8 k + j. */
INLINE __m256i units32(int bits, const unit_tables * c, const uint8_t * block) {
    /* four bits of t, those of values i - 3 to i, determine the subset of value i; here times 4 */
    const __m256i subsets =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 8, 4, 12, 8, 0, 12, 4, 8, 0, 12, 4, 0, 8, 4, 12));
    const __m256i right = _mm256_setr_epi32(29, 30, 31, 0, 1, 2, 3, 4),
                  left = _mm256_setr_epi32(3, 2, 1, 32, 31, 30, 29, 28);
    const __m256i t = word8(block + 2);
    const __m256i turned = _mm256_or_si256(_mm256_srlv_epi32(t, right), _mm256_sllv_epi32(t, left));
    const __m256i subset = _mm256_shuffle_epi8(subsets, _mm256_and_si256(turned, _mm256_set1_epi8(15)));
    int64_t even_odd;
    memcpy(&even_odd, block + 6, sizeof even_odd);
    const __m256i pairs = _mm256_srlv_epi64(_mm256_set1_epi64x(even_odd), _mm256_setr_epi64x(0, 2, 4, 6));
    const __m256i index = _mm256_or_si256(subset, _mm256_and_si256(pairs, _mm256_set1_epi8(3)));
    const __m256i units = _mm256_shuffle_epi8(c->units[0], index);
    if (bits == 3) {
        return units;
    }
    const __m256i top = _mm256_sllv_epi32(word8(block + 14), _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0));
    return _mm256_blendv_epi8(units, _mm256_shuffle_epi8(c->units[1], index), top);
}

/* Values 8 k .. 8 k + 7 in units. */
INLINE __m256 values8(__m256i units, int k) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(k == 3 ? units : _mm256_slli_epi32(units, 24 - 8 * k), 24));
}

/* The scale as all decoders use it, for levels in units. */
INLINE __m256 unit_scale(const uint8_t * block) {
    const uint16_t h = tqi_load_u16(block);
    return _mm256_set1_ps((h & 0x7c00u) == 0x7c00u ? 0.0f : TQI_LEVEL_UNIT * _cvtsh_ss(h));
}

INLINE void unpack_rows(int bits, const tqi_codec * codec, const uint8_t * blocks, int64_t n_blocks, float * y) {
    const unit_tables c = load_units(bits, codec);
    for (int64_t b = 0; b < n_blocks; ++b, y += TQ_BLOCK, blocks += 4 * bits + 2) {
        const __m256 d = unit_scale(blocks);
        const __m256i units = units32(bits, &c, blocks);
        for (int k = 0; k < 4; ++k) {
            _mm256_storeu_ps(y + 8 * k, _mm256_mul_ps(d, values8(units, k)));
        }
    }
}

void tqi_trellis_unpack_avx2(const tqi_codec * codec, const uint8_t * blocks, int64_t n_blocks, float * y) {
    if (codec->bits == 3) {
        unpack_rows(3, codec, blocks, n_blocks, y);
    } else {
        unpack_rows(4, codec, blocks, n_blocks, y);
    }
}

/* ---- Attention ---- */

INLINE void scores_rows(int bits, int n_q, const tqi_codec * codec, const uint8_t * k, size_t stride, int n_tok,
                        const float * q, int n_blocks, float * s, int ld) {
    const unit_tables c = load_units(bits, codec);
    for (int t = 0; t < n_tok; ++t) {
        const uint8_t * in = k + (size_t) t * stride;
        __m256 total[TQI_MAX_FUSED];
        tqi_prefetch(in + TQI_AHEAD * stride, (size_t) (n_blocks * (4 * bits + 2)));
        for (int i = 0; i < n_q; ++i) {
            total[i] = _mm256_setzero_ps();
        }
        for (int b = 0; b < n_blocks; ++b, in += 4 * bits + 2) {
            const __m256 d = unit_scale(in);
            const __m256i units = units32(bits, &c, in);
            __m256 v[4];
            for (int g = 0; g < 4; ++g) {
                v[g] = values8(units, g);
            }
            for (int i = 0; i < n_q; ++i) {
                const float * qi = q + (i * n_blocks + b) * TQ_BLOCK;
                __m256 p = _mm256_mul_ps(v[0], _mm256_loadu_ps(qi));
                for (int g = 1; g < 4; ++g) {
                    p = _mm256_fmadd_ps(v[g], _mm256_loadu_ps(qi + 8 * g), p);
                }
                total[i] = _mm256_fmadd_ps(d, p, total[i]);
            }
        }
        for (int i = 0; i < n_q; ++i) {
            __m128 r = _mm_add_ps(_mm256_castps256_ps128(total[i]), _mm256_extractf128_ps(total[i], 1));
            r = _mm_add_ps(r, _mm_movehl_ps(r, r));
            _mm_store_ss(s + i * ld + t, _mm_add_ss(r, _mm_movehdup_ps(r)));
        }
    }
}

/* A block column of all tokens is decoded once; then n_groups groups of eight values at a time keep their sums in registers. */
INLINE void accumulate_rows(int bits, int n_q, const tqi_codec * codec, const uint8_t * v, size_t stride, int n_tok,
                            const float * p, int ld, int n_blocks, float * o) {
    const unit_tables c = load_units(bits, codec);
    const int n_groups = n_q <= 2 ? 4 : n_q <= 5 ? 2 : 1;
    for (int b = 0; b < n_blocks; ++b) {
        __m256i units[TQI_AHEAD];
        __m256 d[TQI_AHEAD];
        for (int t = 0; t < n_tok; ++t) {
            const uint8_t * in = v + (size_t) t * stride + b * (4 * bits + 2);
            tqi_prefetch(in + TQI_AHEAD * stride, (size_t) (4 * bits + 2));
            units[t] = units32(bits, &c, in);
            d[t] = unit_scale(in);
        }
        for (int g = 0; g < 4; g += n_groups) {
            float * ob = o + b * TQ_BLOCK + 8 * g;
            __m256 sum[TQI_MAX_FUSED][4];
            for (int i = 0; i < n_q; ++i) {
                for (int h = 0; h < n_groups; ++h) {
                    sum[i][h] = _mm256_loadu_ps(ob + i * n_blocks * TQ_BLOCK + 8 * h);
                }
            }
            for (int t = 0; t < n_tok; ++t) {
                __m256 x[4];
                for (int h = 0; h < n_groups; ++h) {
                    x[h] = values8(units[t], g + h);
                }
                for (int i = 0; i < n_q; ++i) {
                    const __m256 w = _mm256_mul_ps(d[t], _mm256_broadcast_ss(p + i * ld + t));
                    for (int h = 0; h < n_groups; ++h) {
                        sum[i][h] = _mm256_fmadd_ps(w, x[h], sum[i][h]);
                    }
                }
            }
            for (int i = 0; i < n_q; ++i) {
                for (int h = 0; h < n_groups; ++h) {
                    _mm256_storeu_ps(ob + i * n_blocks * TQ_BLOCK + 8 * h, sum[i][h]);
                }
            }
        }
    }
}

void tqi_trellis_scores_avx2(const tqi_codec * codec, const uint8_t * k, size_t stride, int n_tok, const float * q,
                             int n_q, int n_blocks, float * s, int ld) {
    if (codec->bits == 3) {
        TQI_BY_N_Q(scores_rows, 3, n_q, codec, k, stride, n_tok, q, n_blocks, s, ld)
    } else {
        TQI_BY_N_Q(scores_rows, 4, n_q, codec, k, stride, n_tok, q, n_blocks, s, ld)
    }
}

void tqi_trellis_accumulate_avx2(const tqi_codec * codec, const uint8_t * v, size_t stride, int n_tok, const float * p,
                                 int ld, int n_q, int n_blocks, float * o) {
    if (codec->bits == 3) {
        TQI_BY_N_Q(accumulate_rows, 3, n_q, codec, v, stride, n_tok, p, ld, n_blocks, o)
    } else {
        TQI_BY_N_Q(accumulate_rows, 4, n_q, codec, v, stride, n_tok, p, ld, n_blocks, o)
    }
}
