/* avx2.c: the PQO types, and what does not depend on the type, in AVX2, FMA and F16C.
 *
 * encode and decode follow the portable order of operations exactly (no FMA there but that of
 * v_hadamard); the attention steps use FMA. */
#include "lanes_avx2.h"

#include "features_x86.h"

static int supported(void) {
    return tqi_has_avx2_fma_f16c();
}

/* ---- Codebooks ---- */

typedef struct {
    vec low, high; /* levels 0..7, 8..15 */
} decoder;

INLINE decoder load_decoder(int bits, const tqi_codec * codec) {
    const vec low = v_load(codec->levels);
    return (decoder) { low, bits == 3 ? low : v_load(codec->levels + 8) };
}

/* vpermps reads only the low three bits of each lane, so bits above an index's own may be set. */
INLINE vec levels_at(int bits, const decoder * c, words index) {
    const vec low = _mm256_permutevar8x32_ps(c->low, index);
    if (bits == 3) {
        return low;
    }
    const vec high = _mm256_permutevar8x32_ps(c->high, index);
    return v_select(_mm256_castsi256_ps(_mm256_slli_epi32(index, 28)), high, low);
}

/* A codebook for encoding. The boundaries are those that each step of a binary search compares with, by the index so
 * far. */
typedef struct {
    decoder levels;
    vec middle, second, third, last;
} table;

INLINE table load_table(int bits, const tqi_codec * codec) {
    const float * b = codec->boundaries;
    table c = { .levels = load_decoder(bits, codec) };
    if (bits == 3) {
        /* index 4 or 0 by b[3]; then b[index + 1] is b[1] or b[5]; then b[index] */
        c.middle = v_set1(b[3]);
        c.second = _mm256_setr_ps(b[1], b[1], b[1], b[1], b[5], b[5], b[5], b[5]);
        c.last = _mm256_setr_ps(b[0], b[0], b[2], b[2], b[4], b[4], b[6], b[6]);
    } else {
        /* the same over pairs of levels (index / 2), then one more step inside the pair: b[2 * pair] */
        c.middle = v_set1(b[7]);
        c.second = _mm256_setr_ps(b[3], b[3], b[3], b[3], b[11], b[11], b[11], b[11]);
        c.third = _mm256_setr_ps(b[1], b[1], b[5], b[5], b[9], b[9], b[13], b[13]);
        c.last = _mm256_setr_ps(b[0], b[2], b[4], b[6], b[8], b[10], b[12], b[14]);
    }
    return c;
}

/* Adds step to the indices where t is above the boundary. */
INLINE words climb(words index, vec t, vec boundary, int step) {
    const words above = _mm256_castps_si256(v_less(boundary, t));
    return _mm256_or_si256(index, _mm256_and_si256(above, _mm256_set1_epi32(step)));
}

INLINE words index_of(int bits, const table * c, vec t) {
    words index = climb(w_zero(), t, c->middle, 4);
    index = climb(index, t, _mm256_permutevar8x32_ps(c->second, index), 2);
    if (bits == 3) {
        return climb(index, t, _mm256_permutevar8x32_ps(c->last, index), 1);
    }
    index = climb(index, t, _mm256_permutevar8x32_ps(c->third, index), 1);
    return w_count(w_add(index, index), v_less(_mm256_permutevar8x32_ps(c->last, index), t));
}

/* ---- Blocks ---- */

INLINE void pack(int bits, words index, uint8_t * out) {
    const words shift =
        bits == 3 ? _mm256_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21) : _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const words shifted = _mm256_sllv_epi32(index, shift);
    __m128i half = _mm_or_si128(_mm256_castsi256_si128(shifted), _mm256_extracti128_si256(shifted, 1));
    half = _mm_or_si128(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_or_si128(half, _mm_shuffle_epi32(half, 0xb1));
    const uint32_t word = (uint32_t) _mm_cvtsi128_si32(half);
    memcpy(out, &word, (size_t) bits);
}

#include "scale_search.h"

#define LEVEL_UNIT 1.0f
#define DECODE_AHEAD 0
typedef const uint8_t * codes;

INLINE codes open_block(int bits, const decoder * c, const uint8_t * in) {
    (void) bits, (void) c;
    return in + sizeof(uint16_t);
}

/* Reads inside the block only: the last three bytes of a 3-bit block are read with the byte before them. */
INLINE vec values(int bits, const decoder * c, codes from, int g) {
    const int back = bits == 3 && g == 3;
    const words word = _mm256_set1_epi32((int) tqi_load_u32(from + bits * g - back));
    const words shift = bits == 4 ? _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28)
                        : back    ? _mm256_setr_epi32(8, 11, 14, 17, 20, 23, 26, 29)
                                  : _mm256_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21);
    return levels_at(bits, c, _mm256_srlv_epi32(word, shift));
}

#define load_query load_query_f32
#define scores_rows scores_rows_f32
#define accumulate_rows accumulate_rows_f32
#include "fused.h"
#undef load_query
#undef scores_rows
#undef accumulate_rows

/* ---- Attention with pqo4 ---- */

/* 16 levels are two lookups by vpermps and a choice. Two lookups by vpshufb make the two bytes of four times as many
 * integers, which vpmaddwd multiplies. A vector is 16 blocks as in trellis_lanes.h; byte k of word w holds values 8 w +
 * 2 k and 8 w + 2 k + 1. The factors are as large as the sums allow (avx512.c). */
#define K_LEVEL_MAX 8191
#define Q_MAX 8191
#define V_LEVEL_MAX 4095
#define WEIGHT_MAX 8191
#define AT_ONCE 2 /* query vectors whose sums of V there are registers for */

typedef struct {
    words low, high; /* bytes of the levels as integers */
    float step;      /* what the integer 1 stands for */
} integer_table;

INLINE integer_table load_integer_table(const tqi_codec * codec, int level_max) {
    const float top = fmaxf(-codec->levels[0], codec->levels[codec->n_levels - 1]);
    integer_table c = { .step = top / (float) level_max };
    uint8_t low[16], high[16];
    for (int i = 0; i < 16; ++i) {
        const int level = (int) lrintf(codec->levels[i] / c.step);
        low[i] = (uint8_t) (level & 0xff);
        high[i] = (uint8_t) (level >> 8 & 0xff);
    }
    c.low = w_lane(low);
    c.high = w_lane(high);
    return c;
}

/* The integers of the lower nibbles (h = 0) or the upper ones: of dwords 0 and 1 of each lane, then of 2 and 3. */
INLINE void look_up(const integer_table * c, words nibbles, int h, words * x) {
    const words index = _mm256_and_si256(h == 0 ? nibbles : w_shr(nibbles, 4), _mm256_set1_epi8(0x0f));
    const words low = w_shuffle(c->low, index), high = w_shuffle(c->high, index);
    x[0] = _mm256_unpacklo_epi8(low, high);
    x[1] = _mm256_unpackhi_epi8(low, high);
}

/* The four integers of each lane as 16-bit ones, twice. */
INLINE words narrow_twice(words integers) {
    return _mm256_packs_epi32(integers, integers);
}

/* As in trellis_lanes.h: values[w][h] are 8 w + h, 8 w + 2 + h and so on of the lane's block. */
typedef struct {
    words values[4][2];
    vec unit;
} pqo4_query;
_Static_assert(sizeof(pqo4_query) <= sizeof(float) * TQI_QUERY_FLOATS(4) / 2, "it has its room");

static void load_query(const tqi_codec * codec, const float * q, int n_blocks, float * query) {
    if (codec->bits == 3) {
        load_query_f32(codec, q, n_blocks, query);
        return;
    }
    const float step = load_integer_table(codec, K_LEVEL_MAX).step;
    for (int b0 = 0; b0 < n_blocks; b0 += 2, query += TQI_QUERY_FLOATS(4) / 2) {
        float x[4][2][LANES] = { { { 0.0f } } };
        vec values[8];
        pqo4_query y;
        for (int i = 0; i < 2 * TQ_BLOCK && b0 + i / TQ_BLOCK < n_blocks; ++i) {
            x[i % TQ_BLOCK / 8][i % 2][i / TQ_BLOCK * 4 + i % 8 / 2] = q[b0 * TQ_BLOCK + i];
        }
        for (int j = 0; j < 8; ++j) {
            values[j] = v_load(x[j / 2][j % 2]);
        }
        const vec largest = largest_in(values, 1, 8), inverse = inverse_of(largest, Q_MAX);
        for (int j = 0; j < 8; ++j) {
            y.values[j / 2][j % 2] = narrow_twice(w_round(v_mul(values[j], inverse)));
        }
        y.unit = v_mul(unit_of(largest, Q_MAX), v_set1(step));
        memcpy(query, &y, sizeof y);
    }
}

INLINE void multiply_blocks(int bits, int n_q, int wide, const integer_table * c, const uint8_t * at, size_t stride,
                            int n_tok, int n, const float * query, size_t n_floats, vec * total) {
    const token_blocks x = load_blocks(bits, wide, at, stride, n_tok, n);
    const pqo4_query * part[TQI_MAX_FUSED];
    words sum[TQI_MAX_FUSED][2]; /* of tokens 0 and 1, of 2 and 3 */
    for (int i = 0; i < n_q; ++i) {
        part[i] = (const pqo4_query *) (const void *) (query + (size_t) i * n_floats);
        sum[i][0] = sum[i][1] = w_zero();
    }
    UNROLL
    for (int j = 0; j < 8; ++j) {
        words levels[2];
        look_up(c, x.words[j / 2], j % 2, levels);
        for (int i = 0; i < n_q; ++i) {
            const words values = w_load(&part[i]->values[j / 2][j % 2]);
            sum[i][0] = w_add(sum[i][0], _mm256_madd_epi16(levels[0], values));
            sum[i][1] = w_add(sum[i][1], _mm256_madd_epi16(levels[1], values));
        }
    }
    for (int i = 0; i < n_q; ++i) {
        const vec unit = v_load((const float *) (const void *) &part[i]->unit);
        total[i] = v_fma(v_from(_mm256_hadd_epi32(sum[i][0], sum[i][1])), v_mul(x.scale, unit), total[i]);
    }
}

#define key_table integer_table
#define load_key_table(bits, codec) load_integer_table(codec, K_LEVEL_MAX)
#include "scores_lanes.h"

/* What accumulate keeps of a tile while it goes through its blocks by twos: byte k of dword m is byte m of token k. */
typedef struct {
    words nibbles[MAX_VECTORS][4];
    vec weights[MAX_VECTORS * TQI_MAX_FUSED]; /* (n_vec, n_q): times the blocks' scales */
    words tokens[MAX_VECTORS * TQI_MAX_FUSED];
    vec unit[TQI_MAX_FUSED];
} pqo4_tile;

/* Query vectors i0 .. i0 + n_q - 1 of n_all. */
INLINE void pqo4_accumulate_tile(int n_all, int n_q, const integer_table * c, const pqo4_tile * x, int i0, int n_vec,
                                 int n, int n_blocks, float * o) {
    vec rows[AT_ONCE][4][2];
    UNROLL
    for (int w = 0; w < 4; ++w) {
        words sum[AT_ONCE][2][2];
        for (int i = 0; i < n_q; ++i) {
            sum[i][0][0] = sum[i][0][1] = sum[i][1][0] = sum[i][1][1] = w_zero();
        }
        for (int v = 0; v < n_vec; ++v) {
            UNROLL
            for (int h = 0; h < 2; ++h) {
                words levels[2];
                look_up(c, x->nibbles[v][w], h, levels);
                for (int i = 0; i < n_q; ++i) {
                    const words tokens = x->tokens[v * n_all + i0 + i];
                    sum[i][h][0] = w_add(sum[i][h][0], _mm256_madd_epi16(levels[0], tokens));
                    sum[i][h][1] = w_add(sum[i][h][1], _mm256_madd_epi16(levels[1], tokens));
                }
            }
        }
        for (int i = 0; i < n_q; ++i) {
            const vec unit = v_mul(x->unit[i0 + i], v_set1(c->step));
            const vec even = v_mul(v_from(_mm256_hadd_epi32(sum[i][0][0], sum[i][0][1])), unit);
            const vec odd = v_mul(v_from(_mm256_hadd_epi32(sum[i][1][0], sum[i][1][1])), unit);
            rows[i][w][0] = _mm256_unpacklo_ps(even, odd);
            rows[i][w][1] = _mm256_unpackhi_ps(even, odd);
        }
    }
    for (int i = 0; i < n_q; ++i) {
        add_rows(2, rows[i], n, o + (i0 + i) * n_blocks * TQ_BLOCK);
    }
}

INLINE void pqo4_accumulate(int n_q, const tqi_codec * codec, const uint8_t * v, size_t stride, int n_tok,
                            const float * p, int ld, int n_blocks, float * o) {
    const integer_table c = load_integer_table(codec, V_LEVEL_MAX);
    const int n_vec = (n_tok + 3) / 4;
    pqo4_tile x;
    for (int t = 0; t < n_tok; ++t) {
        tqi_prefetch(v + (size_t) (TQI_AHEAD + t) * stride, (size_t) n_blocks * TQI_PQO4_BYTES);
    }
    for (int b = 0; b < n_blocks; b += 2) {
        for (int t = 0; t < n_tok; t += 4) {
            const token_blocks y = load_blocks(4, 2, v + (size_t) t * stride + (size_t) b * TQI_PQO4_BYTES, stride,
                                               n_tok - t, n_blocks - b);
            for (int w = 0; w < 4; ++w) {
                x.nibbles[t / 4][w] = w_shuffle(y.words[w], w_lane(turned_bytes));
            }
            for (int i = 0; i < n_q; ++i) {
                x.weights[t / 4 * n_q + i] = v_mul(y.scale, spread_tokens(2, p + i * ld + t, n_tok - t));
            }
        }
        for (int i = 0; i < n_q; ++i) {
            const vec largest = largest_in(x.weights + i, n_q, n_vec), inverse = inverse_of(largest, WEIGHT_MAX);
            for (int c4 = 0; c4 < n_vec; ++c4) {
                x.tokens[c4 * n_q + i] = narrow_twice(w_round(v_mul(x.weights[c4 * n_q + i], inverse)));
            }
            x.unit[i] = unit_of(largest, WEIGHT_MAX);
        }
        UNROLL
        for (int i = 0; i < n_q; i += AT_ONCE) {
            pqo4_accumulate_tile(n_q, n_q - i < AT_ONCE ? n_q - i : AT_ONCE, &c, &x, i, n_vec, n_blocks - b, n_blocks,
                                 o + b * TQ_BLOCK);
        }
    }
}

INLINE void scores_rows(int bits, int n_q, const tqi_codec * codec, const uint8_t * k, size_t stride, int n_tok,
                        const float * query, int n_blocks, float * s, int ld) {
    if (bits == 3) {
        scores_rows_f32(bits, n_q, codec, k, stride, n_tok, query, n_blocks, s, ld);
    } else {
        scores_lanes(4, n_q, codec, k, stride, n_tok, query, n_blocks, s, ld);
    }
}

INLINE void accumulate_rows(int bits, int n_q, const tqi_codec * codec, const uint8_t * v, size_t stride, int n_tok,
                            const float * p, int ld, int n_blocks, float * o) {
    if (bits == 3) {
        accumulate_rows_f32(bits, n_q, codec, v, stride, n_tok, p, ld, n_blocks, o);
    } else {
        pqo4_accumulate(n_q, codec, v, stride, n_tok, p, ld, n_blocks, o);
    }
}

#include "gemm.h"
#include "rows_f16.h"
#include "softmax.h"
#define BY_BITS TQI_BY_BITS
#include "steps.h"

TQI_KERNELS(avx2, NULL, &tqi_trellis_avx2);
