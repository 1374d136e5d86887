/* avx512.c: the PQO types, and what does not depend on the type, in AVX-512 with BW, DQ, VL, VBMI and VNNI (Ice Lake,
 * Zen 4 and later).
 *
 * Both formats decode alike: vpermb brings each lane its two bytes, a variable shift brings the index down, vpermps
 * looks it up in 16 levels (3 bits: the eight levels twice, so bit 3 need not be cleared). */
#include "lanes_avx512.h"

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
#define MAX_BLOCKS 18 /* of a row at once: head_dim 576 */
_Static_assert((int64_t) TQ_BLOCK * K_LEVEL_MAX * Q_MAX <= INT32_MAX, "scores must not overflow");
_Static_assert((int64_t) TQI_AHEAD * V_LEVEL_MAX * WEIGHT_MAX <= INT32_MAX, "the sum over a tile must not overflow");

/* The codebook as integers for vpermw, which looks up by five bits: those above the index's own come from its neighbour
 * and must not matter, so the levels are repeated. step: what the integer 1 stands for. */
typedef struct {
    __m512i levels;
    float step;
} integer_table;

INLINE float codebook_step(const tqi_codec * codec, int level_max) {
    const float low = -codec->levels[0], high = codec->levels[codec->n_levels - 1];
    return (low > high ? low : high) / (float) level_max;
}

INLINE integer_table load_integer_table(int bits, const tqi_codec * codec, int level_max) {
    integer_table c;
    c.step = codebook_step(codec, level_max);
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

INLINE __m512 load_scales(const uint16_t * d) {
    return widen_scales(_mm256_loadu_si256((const __m256i *) (const void *) d));
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

/* For vpmultishiftqb: brings indices j and j + 1 of each dword's group into the low bits of its two words. */
INLINE __m512i pair_shift(int bits, int j) {
    const uint64_t low = (uint64_t) (bits * j) * 0x0101u + ((uint64_t) (bits * (j + 1)) * 0x0101u << 16);
    return _mm512_set1_epi64((long long) (low | (low + 0x20202020u) << 32));
}

/* A part of a query vector, up to four blocks: lane b is block b's (wide 2: lane 2 + b, too), all dwords of pair[j] the
 * integers of values 2 j and 2 j + 1. */
typedef struct {
    __m512i pair[TQ_BLOCK / 2];
    __m512 unit; /* what the integer 1 times the codebook's stands for; NaN if a value is not finite */
} query4;
_Static_assert(sizeof(query4) <= sizeof(float) * TQI_QUERY_FLOATS(4), "a query of four blocks has its room");

static void load_query(const tqi_codec * codec, const float * q, int n_blocks, float * query) {
    const int wide = WIDE(n_blocks);
    const float step = codebook_step(codec, K_LEVEL_MAX);
    for (int b0 = 0; b0 < n_blocks; b0 += wide, query += TQI_QUERY_FLOATS(4)) {
        uint16_t integers[4][TQ_BLOCK] = { { 0 } };
        float unit[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
        query4 y;
        for (int b = 0; b < wide && b0 + b < n_blocks; ++b) {
            const block x = load_block(q + (b0 + b) * TQ_BLOCK);
            unit[b] = step * round_to_words(x.v, 2, Q_MAX, integers[b]);
        }
        for (int half = 0; half < 2; ++half) {
            __m256i x[4];
            for (int b = 0; b < 4; ++b) {
                x[b] = _mm256_loadu_si256((const __m256i *) (const void *) (integers[b] + 16 * half));
            }
            for (int j = 0; j < 8; ++j) {
                y.pair[8 * half + j] = spread_dwords(wide, x, j);
            }
        }
        y.unit = spread_floats(wide, unit);
        memcpy(query, &y, sizeof y);
    }
}

#define N_CHAINS(n_q) ((n_q) <= 4 ? 2 : 1) /* sums of a query vector: as many as hide the latency of vpdpwssd */

INLINE void multiply_blocks(int bits, int n_q, int wide, const integer_table * c, const uint8_t * at, size_t stride,
                            int n_tok, int n, const float * query, size_t n_floats, __m512 * total) {
    const query4 * q4 = (const query4 *) (const void *) query;
    const blocks16 x = load_blocks16(0, bits, wide, at, stride, n_tok, n);
    __m512i sum[TQI_MAX_FUSED][N_CHAINS(n_q)];
    for (int i = 0; i < n_q; ++i) {
        for (int h = 0; h < N_CHAINS(n_q); ++h) {
            sum[i][h] = _mm512_setzero_si512();
        }
    }
    UNROLL
    for (int j = 0; j < TQ_BLOCK; j += 2) {
        const __m512i index = _mm512_multishift_epi64_epi8(pair_shift(bits, j % 8), x.words[j / 8]);
        const __m512i levels = _mm512_permutexvar_epi16(index, c->levels);
        for (int i = 0; i < n_q; ++i) {
            __m512i * to = &sum[i][j / 2 % N_CHAINS(n_q)];
            *to = _mm512_dpwssd_epi32(*to, levels, w_load((const float *) &q4->pair[j / 2] + (size_t) i * n_floats));
        }
    }
    for (int i = 0; i < n_q; ++i) {
        const __m512 unit = v_load((const float *) &q4->unit + (size_t) i * n_floats);
        for (int h = 1; h < N_CHAINS(n_q); ++h) {
            sum[i][0] = w_add(sum[i][0], sum[i][h]);
        }
        total[i] = v_fma(v_from(sum[i][0]), v_mul(x.scale, unit), total[i]);
    }
}

#define key_table integer_table
#define load_key_table(bits, codec) load_integer_table(bits, codec, K_LEVEL_MAX)
#include "scores_lanes.h"
#define scores_rows scores_lanes

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

/* ---- Tiles ---- */

/* For vpermb: the two bytes that hold index c, in word c. */
#define WORD_AT(bits, begin, c) (begin) + (bits) * (c) / 8, (begin) + (bits) * (c) / 8 + 1
#define WORDS_AT4(bits, begin, c)                                                                                      \
    WORD_AT(bits, begin, c), WORD_AT(bits, begin, (c) + 1), WORD_AT(bits, begin, (c) + 2), WORD_AT(bits, begin, (c) + 3)
#define WORD_BYTES(bits, begin)                                                                                        \
    WORDS_AT4(bits, begin, 0), WORDS_AT4(bits, begin, 4), WORDS_AT4(bits, begin, 8), WORDS_AT4(bits, begin, 12),       \
        WORDS_AT4(bits, begin, 16), WORDS_AT4(bits, begin, 20), WORDS_AT4(bits, begin, 24), WORDS_AT4(bits, begin, 28)

/* 16 or, in a 3-bit block, 14 bytes are loaded, whose indices begin at byte 0 or 2. */
INLINE __m512i unpack_words(int bits, const integer_table * c, const uint8_t * from) {
    static const uint8_t bytes[2][64] = { { WORD_BYTES(3, 2) }, { WORD_BYTES(4, 0) } };
    const __m512i shift =
        bits == 3 ? _mm512_broadcast_i32x4(_mm_setr_epi16(0, 3, 6, 1, 4, 7, 2, 5)) : _mm512_set1_epi32(4 << 16);
    const __m128i x =
        bits == 3 ? _mm_maskz_loadu_epi8(0x3fff, from) : _mm_loadu_si128((const __m128i *) (const void *) (from + 2));
    const __m512i at = _mm512_loadu_si512(bytes[bits - 3]);
    const __m512i word = _mm512_permutexvar_epi8(at, _mm512_zextsi128_si512(x));
    return _mm512_permutexvar_epi16(_mm512_srlv_epi16(word, shift), c->levels);
}

#define words_table integer_table
#define load_words load_integer_table
#define VALUE_AT(p) (p)
#define BY_BITS TQI_BY_BITS
#include "tiles_avx512.h"

#include "gemm.h"
#include "rows_f16.h"
#include "softmax.h"
#include "steps.h"

TQI_KERNELS(avx512, &tiles, &tqi_trellis_avx512);
