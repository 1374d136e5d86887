/* lanes_neon.h: the attention steps in integers on AArch64, for a kernel that makes products of bytes.
 *
 * A register is a block of four tokens: as in lanes.h its four dwords are the tokens, so that a step decodes four
 * blocks alike. A level is one byte (trellis) or two (PQO). Queries and weights are 16-bit integers, which are two
 * bytes: 256 high + low, both with signs. Of a level in two bytes the product low * low is left out, which is about as
 * large as the integers' own rounding.
 *
 * The including file defines
 *   PARTS                       bytes of a level: 1 or 2
 *   VALUE_AT(r, h, k)           which of the block's values byte k of a dword is, in levels_of(.., r, h)
 *   level_table, load_level_table(bits, codec)  a codebook for levels_of, with .step: what the integer 1 stands for
 *   load_tokens(bits, rows)     a block of four tokens, as levels_of takes it for K
 *   load_turned(bits, rows)     the same for V: byte k of dword m is byte m of token k
 *   levels_of(bits, &c, part, top, highest, r, h)  the levels of part r, in its lower (0) or upper half (1)
 *   add_sums(unit, sums, o)     adds sums[r][h], whose dwords m are values VALUE_AT(r, h, m), to the block o
 *   BY_BITS                     as steps.h takes it
 * and, from products_*.h: sums, add_products, join. */
#ifndef TQI_LANES_NEON_H
#define TQI_LANES_NEON_H

#include "quads_neon.h"

#define MOST 4 /* query vectors whose sums of V there are registers for */

INLINE void store_first(float * to, int n, float32x4_t a) {
    float x[4];
    if (n >= 4) {
        vst1q_f32(to, a);
        return;
    }
    vst1q_f32(x, a);
    memcpy(to, x, (size_t) n * sizeof *x);
}

/* ---- Integers ---- */

/* Magnitudes are compared as integers, among which those that are not finite are the largest. */
INLINE float largest_of(const float32x4_t * x, int n) {
    uint32x4_t top = vdupq_n_u32(0);
    for (int j = 0; j < n; ++j) {
        top = vmaxq_u32(top, vreinterpretq_u32_f32(vabsq_f32(x[j])));
    }
    return tqi_bits_float(vmaxvq_u32(top));
}

/* What to multiply by to make integers of floats, and what the integer 1 stands for, NaN if the largest magnitude is
 * not finite. */
INLINE float inverse_of(float largest) {
    return largest >= TINY ? LARGEST / largest : 0.0f;
}

INLINE float unit_of(float largest) {
    return (largest >= TINY ? largest * (1.0f / LARGEST) : 0.0f) + (largest - largest);
}

/* The bytes of four vectors' integers. */
INLINE void split(const float32x4_t * x, float inverse, int8_t * high, int8_t * low) {
    int16x8_t y[2];
    UNROLL
    for (int j = 0; j < 2; ++j) {
        const int32x4_t a = vcvtnq_s32_f32(vmulq_n_f32(x[2 * j], inverse));
        const int32x4_t b = vcvtnq_s32_f32(vmulq_n_f32(x[2 * j + 1], inverse));
        y[j] = vmovn_high_s32(vmovn_s32(a), b);
    }
    vst1q_s8(low, vmovn_high_s16(vmovn_s16(y[0]), y[1]));
    vst1q_s8(high, vrshrn_high_n_s16(vrshrn_n_s16(y[0], 8), y[1], 8));
}

/* ---- Scores ---- */

/* A block of a query vector: bytes 4 (r + 4 h) + k of high and low are value VALUE_AT(r, h, k). */
typedef struct {
    int8_t high[TQ_BLOCK], low[TQ_BLOCK];
    float unit;
} query_block;
_Static_assert(sizeof(query_block) <= sizeof(float) * TQI_QUERY_FLOATS(4) / 4, "it has its room");

static void load_query(const tqi_codec * codec, const float * q, int n_blocks, float * query) {
    const float step = load_level_table(codec->bits, codec).step;
    for (int b = 0; b < n_blocks; ++b, q += TQ_BLOCK, query += TQI_QUERY_FLOATS(4) / 4) {
        query_block y;
        float32x4_t x[8];
        float ordered[TQ_BLOCK];
        for (int i = 0; i < TQ_BLOCK; ++i) {
            ordered[i] = q[VALUE_AT(i / 4 % 4, i / 16, i % 4)];
        }
        for (int j = 0; j < 8; ++j) {
            x[j] = vld1q_f32(ordered + 4 * j);
        }
        const float largest = largest_of(x, 8);
        split(x, inverse_of(largest), y.high, y.low);
        split(x + 4, inverse_of(largest), y.high + 16, y.low + 16);
        y.unit = unit_of(largest) * step;
        memcpy(query, &y, sizeof y);
    }
}

/* Adds the products of a block of four tokens with the queries' block. */
INLINE void multiply_block(int bits, int n_q, const level_table * c, const uint8_t * const * rows, const float * query,
                           size_t n_floats, float32x4_t * total) {
    const quad x = load_tokens(bits, rows);
    const float32x4_t scale = load_scales(rows);
    const query_block * part[TQI_MAX_FUSED];
    sums s[TQI_MAX_FUSED];
    for (int i = 0; i < n_q; ++i) {
        part[i] = (const query_block *) (const void *) (query + (size_t) i * n_floats);
        s[i] = no_sums();
    }
    UNROLL
    for (int h = 0; h < 2; ++h) {
        int8x16_t high[TQI_MAX_FUSED], low[TQI_MAX_FUSED];
        for (int i = 0; i < n_q; ++i) {
            high[i] = vld1q_s8(part[i]->high + 16 * h);
            low[i] = vld1q_s8(part[i]->low + 16 * h);
        }
        UNROLL
        for (int r = 0; r < 4; ++r) {
            const levels v = levels_of(bits, c, x.part[r], x.top, x.highest, r, h);
            for (int i = 0; i < n_q; ++i) {
                add_products(&s[i], v, high[i], low[i], r);
            }
        }
    }
    for (int i = 0; i < n_q; ++i) {
        total[i] = vfmaq_f32(total[i], vcvtq_f32_s32(join(s[i])), vmulq_n_f32(scale, part[i]->unit));
    }
}

/* Scores of n <= 4 tokens. */
INLINE void score_quad(int bits, int n_q, const level_table * c, const uint8_t * k, size_t stride, int n,
                       const float * query, int n_blocks, float * s, int ld) {
    const uint8_t * rows[4];
    float32x4_t total[TQI_MAX_FUSED];
    find_rows(k, stride, n, rows);
    for (int j = 0; j < 4; ++j) {
        tqi_prefetch(rows[j] + TQI_AHEAD * stride, (size_t) n_blocks * TQI_BLOCK_BYTES(bits));
    }
    for (int i = 0; i < n_q; ++i) {
        total[i] = vdupq_n_f32(0.0f);
    }
    for (int b = 0; b < n_blocks; ++b) {
        multiply_block(bits, n_q, c, rows, query + (size_t) b * (TQI_QUERY_FLOATS(4) / 4), TQI_QUERY_FLOATS(n_blocks),
                       total);
        for (int j = 0; j < 4; ++j) {
            rows[j] += TQI_BLOCK_BYTES(bits);
        }
    }
    for (int i = 0; i < n_q; ++i) {
        store_first(s + i * ld, n, total[i]);
    }
}

INLINE void scores_rows(int bits, int n_q, const tqi_codec * codec, const uint8_t * k, size_t stride, int n_tok,
                        const float * query, int n_blocks, float * s, int ld) {
    const level_table c = load_level_table(bits, codec);
    int t = 0;
    for (; t + 4 <= n_tok; t += 4, k += 4 * stride) {
        score_quad(bits, n_q, &c, k, stride, 4, query, n_blocks, s + t, ld);
    }
    if (t < n_tok) {
        score_quad(bits, n_q, &c, k, stride, n_tok - t, query, n_blocks, s + t, ld);
    }
}

/* ---- Accumulate ---- */

/* A block of a tile's tokens, four at a time; what lies beyond the tile weighs nothing. */
typedef struct {
    quad of[N_QUADS];
    int8_t high[TQI_MAX_FUSED][TQI_AHEAD], low[TQI_MAX_FUSED][TQI_AHEAD]; /* weights times the blocks' scales */
    float unit[TQI_MAX_FUSED];
} tile_block;

/* n <= 4 tokens of a tile, from token 4 c on; weights: (n_q, N_QUADS) */
INLINE void open_quad(int bits, int n_q, const uint8_t * v, size_t stride, int n, const float * p, int ld, int c,
                      tile_block * x, float32x4_t (*weights)[N_QUADS]) {
    const uint8_t * rows[4];
    find_rows(v, stride, n, rows);
    x->of[c] = load_turned(bits, rows);
    const float32x4_t scale = load_scales(rows);
    for (int i = 0; i < n_q; ++i) {
        float first[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
        memcpy(first, p + i * ld + 4 * c, (size_t) n * sizeof *first);
        weights[i][c] = vmulq_f32(scale, vld1q_f32(first));
    }
}

INLINE void open_tile(int bits, int n_q, const uint8_t * v, size_t stride, int n_tok, const float * p, int ld,
                      tile_block * x) {
    float32x4_t weights[TQI_MAX_FUSED][N_QUADS];
    const int n_whole = n_tok / 4, n_quads = (n_tok + 15) / 16 * 4;
    int c = 0;
    for (; c < n_whole; ++c, v += 4 * stride) {
        open_quad(bits, n_q, v, stride, 4, p, ld, c, x, weights);
    }
    if (n_tok % 4 != 0) {
        open_quad(bits, n_q, v, stride, n_tok % 4, p, ld, c++, x, weights);
    }
    for (; c < n_quads; ++c) {
        x->of[c] = x->of[0];
        for (int i = 0; i < n_q; ++i) {
            weights[i][c] = vdupq_n_f32(0.0f);
        }
    }
    for (int i = 0; i < n_q; ++i) {
        const float largest = largest_of(weights[i], n_quads), inverse = inverse_of(largest);
        for (c = 0; c < n_quads; c += 4) {
            split(weights[i] + c, inverse, x->high[i] + 4 * c, x->low[i] + 4 * c);
        }
        x->unit[i] = unit_of(largest);
    }
}

/* Query vectors i0 .. i0 + n_q - 1; o: the block of query vector 0. */
INLINE void accumulate_tile(int bits, int n_q, const level_table * c, const tile_block * x, int i0, int n_tok,
                            int n_blocks, float * o) {
    int32x4_t all[MOST][4][2];
    UNROLL
    for (int r = 0; r < 4; ++r) {
        sums s[MOST][2];
        for (int i = 0; i < n_q; ++i) {
            s[i][0] = s[i][1] = no_sums();
        }
        const quad * from = x->of;
        for (int t = 0; t < n_tok; t += 16, from += 4) {
            int8x16_t high[MOST], low[MOST];
            for (int i = 0; i < n_q; ++i) {
                high[i] = vld1q_s8(x->high[i0 + i] + t);
                low[i] = vld1q_s8(x->low[i0 + i] + t);
            }
            UNROLL
            for (int e = 0; e < 4; ++e) {
                UNROLL
                for (int h = 0; h < 2; ++h) {
                    const levels v = levels_of(bits, c, from[e].part[r], from[e].top, from[e].highest, r, h);
                    for (int i = 0; i < n_q; ++i) {
                        add_products(&s[i][h], v, high[i], low[i], e);
                    }
                }
            }
        }
        for (int i = 0; i < n_q; ++i) {
            all[i][r][0] = join(s[i][0]);
            all[i][r][1] = join(s[i][1]);
        }
    }
    for (int i = 0; i < n_q; ++i) {
        add_sums(x->unit[i0 + i] * c->step, all[i], o + (i0 + i) * n_blocks * TQ_BLOCK);
    }
}

INLINE void accumulate_rows(int bits, int n_q, const tqi_codec * codec, const uint8_t * v, size_t stride, int n_tok,
                            const float * p, int ld, int n_blocks, float * o) {
    const level_table c = load_level_table(bits, codec);
    tile_block x;
    for (int t = 0; t < n_tok; ++t) {
        tqi_prefetch(v + (size_t) (TQI_AHEAD + t) * stride, (size_t) n_blocks * TQI_BLOCK_BYTES(bits));
    }
    for (int b = 0; b < n_blocks && n_tok > 0; ++b, v += TQI_BLOCK_BYTES(bits), o += TQ_BLOCK) {
        open_tile(bits, n_q, v, stride, n_tok, p, ld, &x);
        accumulate_tile(bits, n_q < MOST ? n_q : MOST, &c, &x, 0, n_tok, n_blocks, o);
        if (n_q > MOST) {
            accumulate_tile(bits, n_q - MOST, &c, &x, MOST, n_tok, n_blocks, o);
        }
    }
}

#endif
