/* avx512.c: the PQO types, and what does not depend on the type, in AVX-512 with BW, DQ, VL, VBMI and VNNI (Ice Lake,
 * Zen 4 and later).
 *
 * Both formats decode alike: vpermb brings each lane its two bytes, a variable shift brings the index down, vpermps
 * looks it up in 16 levels (3 bits: the eight levels twice, so bit 3 need not be cleared). */
#include "vector_avx512.h"

#include "features_x86.h"

#include <math.h>

static int supported(void) {
    return tqi_has_avx512();
}

/* ---- Encode ---- */

/* A codebook in registers: each step of a binary search over its boundaries compares with one looked up by the index so
 * far, and its levels. */
typedef struct {
    __m512 levels;
    __m512 step[4]; /* the boundary that decides index bit 3 (4-bit codebooks only), 2, 1, 0 */
} table;

INLINE table load_table(int bits, const tqi_codec * codec) {
    (void) bits;
    float step[4][16];
    for (int bit = 0; bit < 4; ++bit) {
        for (int i = 0; i < 16; ++i) {
            /* lanes whose higher bits are set choose between the levels around that multiple of 2^bit */
            const int above = (i & (codec->n_levels - 1)) >> (bit + 1) << (bit + 1);
            step[3 - bit][i] =
                above + (1 << bit) <= codec->n_levels - 1 ? codec->boundaries[above + (1 << bit) - 1] : INFINITY;
        }
    }
    float levels[16];
    for (int i = 0; i < 16; ++i) {
        levels[i] = codec->levels[i & (codec->n_levels - 1)];
    }
    return (table) {
        .levels = _mm512_loadu_ps(levels),
        .step = { _mm512_loadu_ps(step[0]), _mm512_loadu_ps(step[1]), _mm512_loadu_ps(step[2]),
                  _mm512_loadu_ps(step[3]) },
    };
}

INLINE __m512i index_of(int bits, const table * c, __m512 t) {
    __m512i index = _mm512_setzero_si512();
    for (int bit = bits - 1; bit >= 0; --bit) {
        const __mmask16 above = _mm512_cmp_ps_mask(t, _mm512_permutexvar_ps(index, c->step[3 - bit]), _CMP_GT_OQ);
        index = _mm512_mask_or_epi32(index, above, index, _mm512_set1_epi32(1 << bit));
    }
    return index;
}

INLINE vec levels_at(int bits, const __m512 * levels, words index) {
    (void) bits;
    return _mm512_permutexvar_ps(index, *levels);
}

/* Packs 16 indices: lanes 0..7 and 8..15 into a word each of 8 * bits bits. */
INLINE void pack(int bits, __m512i index, uint8_t * out) {
    const __m512i shift = bits == 3 ? _mm512_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21, 0, 3, 6, 9, 12, 15, 18, 21)
                                    : _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    __m512i word = _mm512_sllv_epi32(index, shift);
    word = _mm512_or_si512(word, _mm512_shuffle_epi32(word, _MM_PERM_BADC));
    word = _mm512_or_si512(word, _mm512_shuffle_epi32(word, _MM_PERM_CDAB));
    word = _mm512_or_si512(word, _mm512_shuffle_i32x4(word, word, 0xb1));
    const uint32_t low = (uint32_t) _mm_cvtsi128_si32(_mm512_castsi512_si128(word));
    const uint32_t high = (uint32_t) _mm_cvtsi128_si32(_mm512_extracti32x4_epi32(word, 2));
    memcpy(out, &low, (size_t) bits);
    memcpy(out + bits, &high, (size_t) bits);
}

#include "scale_search.h"

/* ---- Decode ---- */

/* Where the index bytes begin in the 16 bytes that load_indices loads of a row's block b. A 3-bit block has 14 bytes
 * and is loaded from its beginning, but the last one to its end: nothing beyond the row is touched. */
INLINE int index_begin(int bits, int64_t b, int64_t n_blocks) {
    return bits == 4 ? 0 : b > 0 && b == n_blocks - 1 ? 4 : 2;
}

INLINE __m128i load_indices(int bits, const uint8_t * row, int64_t b, int64_t n_blocks) {
    const uint8_t * indices = row + (size_t) b * TQI_BLOCK_BYTES(bits) + 2;
    if (bits == 3 && n_blocks == 1) {
        return _mm_maskz_loadu_epi8(0x3fff, row);
    }
    return _mm_loadu_si128((const __m128i *) (const void *) (indices - index_begin(bits, b, n_blocks)));
}

/* For vpermb: of two blocks' 16 bytes, side by side, the two bytes that hold index c of each, in lane c; begin:
 * index_begin. */
#define BYTES_AT(bits, begin, c)                                                                                       \
    (uint8_t) ((begin) + (bits) * (c) / 8), (uint8_t) (((begin) + (bits) * (c) / 8 + 1) % 16),                         \
        (uint8_t) (16 + (begin) + (bits) * (c) / 8), (uint8_t) (16 + ((begin) + (bits) * (c) / 8 + 1) % 16)
#define BYTES_AT4(bits, begin, c)                                                                                      \
    BYTES_AT(bits, begin, c), BYTES_AT(bits, begin, (c) + 1), BYTES_AT(bits, begin, (c) + 2),                          \
        BYTES_AT(bits, begin, (c) + 3)
#define BYTES_OF(bits, begin, c)                                                                                       \
    { BYTES_AT4(bits, begin, c), BYTES_AT4(bits, begin, (c) + 4), BYTES_AT4(bits, begin, (c) + 8),                     \
      BYTES_AT4(bits, begin, (c) + 12) }

static const uint8_t pair_bytes[3][2][64] = { { BYTES_OF(3, 2, 0), BYTES_OF(3, 2, 16) },
                                              { BYTES_OF(3, 4, 0), BYTES_OF(3, 4, 16) },
                                              { BYTES_OF(4, 0, 0), BYTES_OF(4, 0, 16) } };

INLINE const uint8_t (*pair_bytes_of(int bits, int64_t b, int64_t n_blocks))[64] {
    return pair_bytes[bits == 4 ? 2 : index_begin(bits, b, n_blocks) == 2 ? 0 : 1];
}

INLINE void unpack_rows(int bits, const tqi_codec * codec, const uint8_t * blocks, int64_t n_blocks, float * y) {
    const __m512 levels =
        bits == 3 ? _mm512_broadcast_f32x8(_mm256_loadu_ps(codec->levels)) : _mm512_loadu_ps(codec->levels);
    const __m512i shift =
        bits == 3 ? _mm512_broadcast_i32x8(_mm256_setr_epi32(0, 3, 6, 1, 4, 7, 2, 5)) : _mm512_set1_epi64(4LL << 32);
    for (int64_t b = 0; b < n_blocks; ++b) {
        const uint8_t (*at)[64] = pair_bytes_of(bits, b, n_blocks);
        const __m512i bytes = _mm512_zextsi128_si512(load_indices(bits, blocks, b, n_blocks));
        const __m512 d = _mm512_set1_ps(block_scale(blocks + (size_t) b * TQI_BLOCK_BYTES(bits)));
        for (int h = 0; h < 2; ++h) {
            const __m512i word = _mm512_permutexvar_epi8(_mm512_loadu_si512(at[h]), bytes);
            const __m512 v = _mm512_permutexvar_ps(_mm512_srlv_epi32(word, shift), levels);
            _mm512_storeu_ps(y + b * TQ_BLOCK + 16 * h, _mm512_mul_ps(d, v));
        }
    }
}

/* ---- Attention ---- */

/* The sums of fused attention are taken over 16-bit integers: vpdpwssd makes two products a lane, twice what an f32 FMA
 * does. Scales, and everything they multiply, stay f32.
 *
 *   scores      a lane is a token: the blocks of 16 tokens are transposed, so no sum over lanes is left at the end
 *   accumulate  a lane is a channel, its two products are two tokens; the weights p d are integers against the largest
 *               of their tile
 *
 * The factors are as large as they can be without a sum over a block's channels, or over a tile's tokens, overflowing
 * 32 bits. Rounding changes a score by 1e-4 of |q| |k| (standard deviation), a thousandth of what 3 bits do to it. */
#define K_LEVEL_MAX 8191
#define Q_MAX 8191
#define V_LEVEL_MAX 4095
#define WEIGHT_MAX 8191
_Static_assert((int64_t) TQ_BLOCK * K_LEVEL_MAX * Q_MAX <= INT32_MAX, "scores must not overflow");
_Static_assert((int64_t) TQI_AHEAD * V_LEVEL_MAX * WEIGHT_MAX <= INT32_MAX, "the sum over a tile must not overflow");

#define TINY 1e-30f   /* magnitudes below it count as zero, so that their reciprocals stay finite */
#define MAX_BLOCKS 18 /* of a row at once: head_dim 576 */

/* The codebook as integers for vpermw, which looks up by five bits: those above the index's own come from its neighbour
 * and must not matter, so the levels are repeated. step: what the integer 1 stands for. */
typedef struct {
    __m512i levels;
    float step;
} integer_table;

INLINE integer_table load_integer_table(int bits, const tqi_codec * codec, int level_max) {
    integer_table c;
    const float low = -codec->levels[0], high = codec->levels[codec->n_levels - 1];
    c.step = (low > high ? low : high) / (float) level_max;
    const __m512 levels = _mm512_div_ps(_mm512_loadu_ps(codec->levels), _mm512_set1_ps(c.step));
    const __m256i rounded = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(levels));
    c.levels = bits == 3 ? _mm512_broadcast_i32x4(_mm256_castsi256_si128(rounded)) : _mm512_broadcast_i64x4(rounded);
    return c;
}

/* The scales of n_tok rows' block b. Where b is one of the blocks that lie at most a cache line apart, these loads also
 * prefetch: a loop of its own over rows and lines took 10 to 20 % of scores with one or two query vectors. */
INLINE void gather_scales(int bits, const uint8_t * rows, size_t stride, int n_tok, int b, uint16_t * d) {
    const int ask = (size_t) b % (TQI_LINE / TQI_BLOCK_BYTES(bits)) == 0;
    rows += (size_t) b * TQI_BLOCK_BYTES(bits);
    UNROLL
    for (int t = 0; t < n_tok; ++t, rows += stride) {
        d[t] = tqi_load_u16(rows);
        if (ask) {
            tqi_prefetch(rows + TQI_AHEAD * stride, TQI_BLOCK_BYTES(bits));
        }
    }
}

/* 16 scales; those that are not finite count as 0, as they do everywhere. */
INLINE __m512 load_scales(const uint16_t * d) {
    const __m512 x = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) (const void *) d));
    return _mm512_maskz_mov_ps(_mm512_knot(_mm512_fpclass_ps_mask(x, 0x99)), x);
}

/* Rounds n vectors of values to integers of magnitude max at most; returns what the integer 1 stands for (NaN if a
 * value is not finite). */
INLINE float round_to_words(const __m512 * x, int n, int max, uint16_t * to) {
    __m512 top = _mm512_setzero_ps();
    __mmask16 bad = 0;
    for (int i = 0; i < n; ++i) {
        top = _mm512_max_ps(top, _mm512_abs_ps(x[i]));
        bad |= _mm512_fpclass_ps_mask(x[i], 0x99);
    }
    const float largest = _mm512_reduce_max_ps(top);
    const __m512 inverse = _mm512_set1_ps(largest < TINY ? 0.0f : (float) max / largest);
    for (int i = 0; i < n; ++i) {
        _mm256_storeu_si256((__m256i *) (void *) (to + 16 * i),
                            _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(x[i], inverse))));
    }
    return bad ? NAN : largest < TINY ? 0.0f : largest / (float) max;
}

INLINE __m512i pair_at(const uint16_t * at) {
    return _mm512_set1_epi32((int) tqi_load_u32(at));
}

/* Word j of out: index j of groups[g] in its low bits, for 16 tokens side by side; rows are their blocks. */
INLINE void transpose16(int bits, const uint8_t * const * rows, int b, int n_blocks, __m512i * groups) {
    /* a group of eight 3-bit indices is three bytes: one dword each */
    const __m128i place = _mm_add_epi8(_mm_setr_epi8(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11),
                                       _mm_set1_epi8((char) index_begin(bits, b, n_blocks)));
    __m512i x[4];
    for (int i = 0; i < 4; ++i) {
        __m512i y = _mm512_castsi128_si512(load_indices(bits, rows[i], b, n_blocks));
        y = _mm512_inserti32x4(y, load_indices(bits, rows[i + 4], b, n_blocks), 1);
        y = _mm512_inserti32x4(y, load_indices(bits, rows[i + 8], b, n_blocks), 2);
        y = _mm512_inserti32x4(y, load_indices(bits, rows[i + 12], b, n_blocks), 3);
        x[i] = bits == 3 ? _mm512_shuffle_epi8(y, _mm512_broadcast_i32x4(place)) : y;
    }
    const __m512i lo01 = _mm512_unpacklo_epi32(x[0], x[1]), lo23 = _mm512_unpacklo_epi32(x[2], x[3]);
    const __m512i hi01 = _mm512_unpackhi_epi32(x[0], x[1]), hi23 = _mm512_unpackhi_epi32(x[2], x[3]);
    groups[0] = _mm512_unpacklo_epi64(lo01, lo23);
    groups[1] = _mm512_unpackhi_epi64(lo01, lo23);
    groups[2] = _mm512_unpacklo_epi64(hi01, hi23);
    groups[3] = _mm512_unpackhi_epi64(hi01, hi23);
}

/* For vpmultishiftqb: brings indices j and j + 1 of each dword's group into the low bits of its two words. */
INLINE __m512i pair_shift(int bits, int j) {
    const uint64_t low = (uint64_t) (bits * j) * 0x0101u + ((uint64_t) (bits * (j + 1)) * 0x0101u << 16);
    return _mm512_set1_epi64((long long) (low | (low + 0x20202020u) << 32));
}

/* Blocks b0 .. b0 + n_part - 1 of the rows; adds to s if b0 is not the first. */
INLINE void scores_part(int bits, int n_q, const tqi_codec * codec, const uint8_t * k, size_t stride, int n_tok,
                        const float * q, int n_blocks, int b0, int n_part, float * s, int ld) {
    const integer_table c = load_integer_table(bits, codec, K_LEVEL_MAX);
    uint16_t q_words[TQI_MAX_FUSED][MAX_BLOCKS * TQ_BLOCK], d[MAX_BLOCKS][TQI_AHEAD];
    float q_unit[TQI_MAX_FUSED][MAX_BLOCKS];
    for (int i = 0; i < n_q; ++i) {
        for (int b = 0; b < n_part; ++b) {
            const block x = load_block(q + (i * n_blocks + b0 + b) * TQ_BLOCK);
            q_unit[i][b] = c.step * round_to_words(x.v, 2, Q_MAX, q_words[i] + b * TQ_BLOCK);
        }
    }
    for (int b = 0; b < n_part; ++b) {
        gather_scales(bits, k, stride, n_tok, b0 + b, d[b]);
    }
    for (int t = 0; t < n_tok; t += 16) {
        const int n = n_tok - t < 16 ? n_tok - t : 16;
        const uint8_t * rows[16]; /* past the end: the last row again, not stored */
        __m512 total[TQI_MAX_FUSED];
        for (int j = 0; j < 16; ++j) {
            rows[j] = k + (size_t) (t + (j < n ? j : n - 1)) * stride;
        }
        for (int i = 0; i < n_q; ++i) {
            total[i] = _mm512_setzero_ps();
        }
        for (int b = 0; b < n_part; ++b) {
            __m512i groups[4], sum[TQI_MAX_FUSED];
            transpose16(bits, rows, b0 + b, n_blocks, groups);
            for (int i = 0; i < n_q; ++i) {
                sum[i] = _mm512_setzero_si512();
            }
            UNROLL
            for (int j = 0; j < TQ_BLOCK; j += 2) {
                const __m512i index = _mm512_multishift_epi64_epi8(pair_shift(bits, j % 8), groups[j / 8]);
                const __m512i levels = _mm512_permutexvar_epi16(index, c.levels);
                for (int i = 0; i < n_q; ++i) {
                    sum[i] = _mm512_dpwssd_epi32(sum[i], levels, pair_at(q_words[i] + b * TQ_BLOCK + j));
                }
            }
            const __m512 scale = load_scales(d[b] + t);
            for (int i = 0; i < n_q; ++i) {
                total[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[i]),
                                           _mm512_mul_ps(scale, _mm512_set1_ps(q_unit[i][b])), total[i]);
            }
        }
        const __mmask16 stored = (__mmask16) ((1u << n) - 1u);
        for (int i = 0; i < n_q; ++i) {
            float * to = s + i * ld + t;
            if (b0 > 0) {
                total[i] = _mm512_add_ps(total[i], _mm512_maskz_loadu_ps(stored, to));
            }
            _mm512_mask_storeu_ps(to, stored, total[i]);
        }
    }
}

INLINE void scores_rows(int bits, int n_q, const tqi_codec * codec, const uint8_t * k, size_t stride, int n_tok,
                        const float * q, int n_blocks, float * s, int ld) {
    for (int b = 0; b < n_blocks; b += MAX_BLOCKS) {
        const int n_part = n_blocks - b < MAX_BLOCKS ? n_blocks - b : MAX_BLOCKS;
        scores_part(bits, n_q, codec, k, stride, n_tok, q, n_blocks, b, n_part, s, ld);
    }
}

/* One block of all rows, whose scales are d: adds to o, the block of query vector 0. */
INLINE void accumulate_block(int bits, int n_q, const integer_table * c, const uint8_t * v, size_t stride, int n_tok,
                             const float * p, int ld, int b, int n_blocks, const uint16_t * d, float * o) {
    const __m512i shift =
        bits == 3 ? _mm512_broadcast_i32x8(_mm256_setr_epi16(0, 0, 3, 3, 6, 6, 1, 1, 4, 4, 7, 7, 2, 2, 5, 5))
                  : _mm512_set1_epi64(0x0004000400000000);
    const uint8_t (*at)[64] = pair_bytes_of(bits, b, n_blocks);
    const __m512i bytes[2] = { _mm512_loadu_si512(at[0]), _mm512_loadu_si512(at[1]) };
    uint16_t weights[TQI_MAX_FUSED][TQI_AHEAD];
    float unit[TQI_MAX_FUSED];
    __m512i sum[TQI_MAX_FUSED][2];
    for (int i = 0; i < n_q; ++i) {
        __m512 w[TQI_AHEAD / 16];
        for (int j = 0; j < TQI_AHEAD / 16; ++j) {
            const int n = n_tok - 16 * j;
            const __mmask16 mask = (__mmask16) (n >= 16 ? 0xffffu : n > 0 ? (1u << n) - 1u : 0u);
            w[j] = _mm512_maskz_mul_ps(mask, load_scales(d + 16 * j), _mm512_maskz_loadu_ps(mask, p + i * ld + 16 * j));
        }
        unit[i] = c->step * round_to_words(w, TQI_AHEAD / 16, WEIGHT_MAX, weights[i]);
        sum[i][0] = sum[i][1] = _mm512_setzero_si512();
    }
    for (int t = 0; t < n_tok; t += 2, v += 2 * stride) {
        const uint8_t * next =
            t + 1 < n_tok ? v + stride : v; /* an odd last token is paired with itself, at weight 0 */
        const __m512i x = _mm512_castsi256_si512(_mm256_inserti128_si256(
            _mm256_castsi128_si256(load_indices(bits, v, b, n_blocks)), load_indices(bits, next, b, n_blocks), 1));
        for (int h = 0; h < 2; ++h) {
            const __m512i index = _mm512_srlv_epi16(_mm512_permutexvar_epi8(bytes[h], x), shift);
            const __m512i levels = _mm512_permutexvar_epi16(index, c->levels);
            for (int i = 0; i < n_q; ++i) {
                sum[i][h] = _mm512_dpwssd_epi32(sum[i][h], levels, pair_at(weights[i] + t));
            }
        }
    }
    for (int i = 0; i < n_q; ++i) {
        for (int h = 0; h < 2; ++h) {
            float * to = o + i * n_blocks * TQ_BLOCK + 16 * h;
            _mm512_storeu_ps(
                to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[i][h]), _mm512_set1_ps(unit[i]), _mm512_loadu_ps(to)));
        }
    }
}

/* Rows in parts of a tile and of MAX_BLOCKS. */
INLINE void accumulate_rows(int bits, int n_q, const tqi_codec * codec, const uint8_t * v, size_t stride, int n_tok,
                            const float * p, int ld, int n_blocks, float * o) {
    const integer_table c = load_integer_table(bits, codec, V_LEVEL_MAX);
    for (int t0 = 0; t0 < n_tok; t0 += TQI_AHEAD, v += TQI_AHEAD * stride, p += TQI_AHEAD) {
        const int n = n_tok - t0 < TQI_AHEAD ? n_tok - t0 : TQI_AHEAD;
        for (int b0 = 0; b0 < n_blocks; b0 += MAX_BLOCKS) {
            const int n_part = n_blocks - b0 < MAX_BLOCKS ? n_blocks - b0 : MAX_BLOCKS;
            uint16_t d[MAX_BLOCKS][TQI_AHEAD];
            for (int b = 0; b < n_part; ++b) {
                gather_scales(bits, v, stride, n, b0 + b, d[b]);
            }
            for (int b = b0; b < b0 + n_part; ++b) {
                accumulate_block(bits, n_q, &c, v, stride, n, p, ld, b, n_blocks, d[b - b0], o + b * TQ_BLOCK);
            }
        }
    }
}

#include "gemm.h"
#include "rows_f16.h"
#include "softmax.h"
#define BY_BITS TQI_BY_BITS
#include "steps.h"

TQI_KERNELS(avx512, &tqi_trellis_avx512);
