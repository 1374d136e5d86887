/* tiles_neon.h: the steps of tqi_tiles in integers on AArch64, over lanes_neon.h.
 *
 * Both steps are products of rows (tokens of K, channels of V) with columns (query vectors), whose bytes go by fours: a
 * register of rows has four bytes of each of four rows, as levels_of gives them, and one of columns four bytes of each
 * of four columns, high or low. Queries are integers against the largest of their column, weights against the largest
 * of their column times the largest scale of their block.
 *
 * The including file also defines, from products_*.h
 *   arrange(n, x, step)  makes of n registers, step bytes apart, what multiply_panel takes
 *   multiply_panel(n_groups, rows, columns, step, sums)  sums[m][c]: row m's products with columns 4 c to 4 c + 3, of
 *       n_groups groups of four bytes; rows: (n_groups, PARTS, 16); columns: (n_groups) step bytes apart, each
 *       (2 vectors, high and low, 16) */
#ifndef TQI_TILES_NEON_H
#define TQI_TILES_NEON_H

#include "lanes_neon.h"

#define PANEL 8     /* columns at once */
#define MOST_COL 64 /* columns whose weights are kept */
#define N_GROUPS (TQ_BLOCK / 4)

/* Bytes of a group of n_col columns. */
#define GROUP_BYTES(n_col) (8 * (size_t) (n_col))

INLINE int8x16_t pack_low(const int32x4_t * x) {
    int32x4_t y = vsliq_n_s32(x[0], x[1], 8);
    y = vsliq_n_s32(y, x[2], 16);
    return vreinterpretq_s8_s32(vsliq_n_s32(y, x[3], 24));
}

/* The bytes of integers i of four columns, i from 0 to 3. */
INLINE void pack_columns(const int32x4_t * x, int8_t * to) {
    int32x4_t high[4];
    for (int i = 0; i < 4; ++i) {
        high[i] = vrshrq_n_s32(x[i], 8);
    }
    vst1q_s8(to, pack_low(high));
    vst1q_s8(to + 16, pack_low(x));
}

/* Four columns' largest magnitudes among n rows. */
INLINE float32x4_t largest_in(const float * x, int n, int n_col) {
    uint32x4_t top = vdupq_n_u32(0);
    for (int i = 0; i < n; ++i) {
        top = vmaxq_u32(top, vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(x + i * n_col))));
    }
    return vreinterpretq_f32_u32(top);
}

INLINE float32x4_t inverses_of(float32x4_t largest) {
    const uint32x4_t some = vcgeq_f32(largest, vdupq_n_f32(TINY));
    return keep4(some, vdivq_f32(vdupq_n_f32(LARGEST), largest));
}

INLINE float32x4_t units_of(float32x4_t largest) {
    const uint32x4_t some = vcgeq_f32(largest, vdupq_n_f32(TINY));
    return vaddq_f32(keep4(some, vmulq_n_f32(largest, 1.0f / LARGEST)), vsubq_f32(largest, largest));
}

/* Of each block its groups' bytes, and behind them what the columns' integer 1 stands for. */
static void load_queries(const tqi_codec * codec, const float * q, int n_blocks, int n_col, float * queries) {
    const float step = load_level_table(codec->bits, codec).step;
    const size_t block_floats = (size_t) TQI_TILE_QUERY * (size_t) n_col;
    for (int col = 0; col < n_col; col += 4) {
        const float32x4_t largest = largest_in(q + col, TQ_BLOCK * n_blocks, n_col), inverse = inverses_of(largest);
        for (int b = 0; b < n_blocks; ++b) {
            int8_t * to = (int8_t *) (void *) (queries + (size_t) b * block_floats) + 8 * col;
            for (int g = 0; g < N_GROUPS; ++g, to += GROUP_BYTES(n_col)) {
                int32x4_t x[4];
                for (int k = 0; k < 4; ++k) {
                    const int i = b * TQ_BLOCK + VALUE_AT(g % 4, g / 4, k);
                    x[k] = vcvtnq_s32_f32(vmulq_f32(vld1q_f32(q + i * n_col + col), inverse));
                }
                pack_columns(x, to);
            }
            vst1q_f32(queries + (size_t) b * block_floats + TQ_BLOCK / 2 * n_col + col,
                      vmulq_n_f32(units_of(largest), step));
        }
    }
    for (int b = 0; b < n_blocks; ++b) {
        int8_t * columns = (int8_t *) (void *) (queries + (size_t) b * block_floats);
        for (int at = 0; at < 8 * n_col; at += 16) {
            arrange(N_GROUPS, columns + at, GROUP_BYTES(n_col));
        }
    }
}

/* ---- Scores ---- */

/* A tile's block of K. */
typedef struct {
    int8_t rows[N_QUADS][N_GROUPS][PARTS][16];
    float scale[TQI_AHEAD];
} key_block;

INLINE void open_keys(int bits, const level_table * c, const uint8_t * k, size_t stride, int n_tok, key_block * x) {
    for (int t = 0; t < n_tok; t += 4, k += 4 * stride) {
        const uint8_t * from[4];
        find_rows(k, stride, n_tok - t, from);
        const quad y = load_tokens(bits, from);
        vst1q_f32(x->scale + t, load_scales(from));
        UNROLL
        for (int g = 0; g < N_GROUPS; ++g) {
            const levels v = levels_of(bits, c, y.part[g % 4], y.top, y.highest, g % 4, g / 4);
            for (int i = 0; i < PARTS; ++i) {
                vst1q_s8(x->rows[t / 4][g][i], v.part[i]);
            }
        }
        for (int i = 0; i < PARTS; ++i) {
            arrange(N_GROUPS, x->rows[t / 4][0][i], sizeof x->rows[0][0]);
        }
    }
}

/* Adds a block's products to s, unless it is the first block; the last one's scale them. */
INLINE void score_panel(const key_block * x, int n_tok, const float * queries, int col, int n_col, int first, int last,
                        float * s) {
    const int8_t * columns = (const int8_t *) (const void *) queries + 8 * col;
    const float * units = queries + TQ_BLOCK / 2 * n_col + col;
    for (int t = 0; t < n_tok; t += 4) {
        int32x4_t sum[4][2];
        multiply_panel(N_GROUPS, x->rows[t / 4][0][0], columns, GROUP_BYTES(n_col), sum);
        for (int m = 0; m < 4 && t + m < n_tok; ++m) {
            for (int c = 0; c < 2; ++c) {
                float * to = s + (t + m) * n_col + col + 4 * c;
                const float32x4_t before = first ? vdupq_n_f32(0.0f) : vld1q_f32(to);
                const float32x4_t all = vfmaq_n_f32(before, vcvtq_f32_s32(sum[m][c]), x->scale[t + m]);
                vst1q_f32(to, last ? vmulq_f32(all, vld1q_f32(units + 4 * c)) : all);
            }
        }
    }
}

INLINE void tile_scores_of(int bits, const tqi_codec * codec, const uint8_t * k, size_t stride, int n_tok,
                           const float * queries, int n_blocks, int n_col, float * s) {
    const level_table c = load_level_table(bits, codec);
    key_block x;
    for (int t = 0; t < n_tok; ++t) {
        tqi_prefetch(k + (size_t) (TQI_AHEAD + t) * stride, (size_t) n_blocks * TQI_BLOCK_BYTES(bits));
    }
    for (int b = 0; b < n_blocks; ++b, k += TQI_BLOCK_BYTES(bits), queries += TQI_TILE_QUERY * n_col) {
        open_keys(bits, &c, k, stride, n_tok, &x);
        for (int col = 0; col < n_col; col += PANEL) {
            score_panel(&x, n_tok, queries, col, n_col, b == 0, b == n_blocks - 1, s);
        }
    }
}

static void tile_scores(const tqi_codec * codec, const uint8_t * k, size_t stride, int n_tok, const float * queries,
                        int n_blocks, int n_col, float * s) {
    const int bits = codec->bits;
    BY_BITS(tile_scores_of, bits, codec, k, stride, n_tok, queries, n_blocks, n_col, s)
}

/* ---- Accumulate ---- */

/* A tile's block of V, and its weights. */
typedef struct {
    int8_t rows[N_GROUPS][N_QUADS][PARTS][16];
    int8_t columns[N_QUADS][MOST_COL / 4][2][16];
    float share[TQI_AHEAD]; /* each token's scale, as a part of the largest */
    float largest;
} value_block;

/* Weights of a tile of up to MOST_COL columns. */
typedef struct {
    float scaled[TQI_AHEAD][MOST_COL]; /* to integers' size */
    float unit[MOST_COL];
    uint8_t used[TQI_AHEAD]; /* whether a token weighs anything: what the others are must not matter */
} tile_weights;

INLINE void scale_weights(const float * p, int n_tok, int n_quads, int n, int n_col, tile_weights * w) {
    memset(w->scaled[n_tok], 0, (size_t) (4 * n_quads - n_tok) * sizeof *w->scaled);
    memset(w->used, 0, sizeof w->used);
    for (int col = 0; col < n; col += 4) {
        const float32x4_t largest = largest_in(p + col, n_tok, n_col), inverse = inverses_of(largest);
        vst1q_f32(w->unit + col, units_of(largest));
        for (int t = 0; t < n_tok; ++t) {
            const float32x4_t x = vmulq_f32(vld1q_f32(p + t * n_col + col), inverse);
            vst1q_f32(w->scaled[t] + col, x);
            w->used[t] |= vmaxvq_u32(vmvnq_u32(vceqzq_f32(x))) != 0;
        }
    }
}

INLINE void open_values(int bits, const level_table * c, const uint8_t * v, size_t stride, int n_tok, int n_quads,
                        const tile_weights * w, value_block * x) {
    float32x4_t largest = vdupq_n_f32(0.0f);
    for (int q = 0; q < n_quads; ++q) {
        const int t = 4 * q < n_tok ? 4 * q : n_tok - 1;
        const uint8_t * from[4];
        find_rows(v + (size_t) t * stride, stride, n_tok - t, from);
        const quad y = load_turned(bits, from);
        const uint32x4_t used = vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(tqi_load_u32(w->used + 4 * q)))));
        const float32x4_t scale = keep4(vcgtzq_s32(vreinterpretq_s32_u32(used)), load_scales(from));
        vst1q_f32(x->share + 4 * q, scale);
        largest = vmaxq_f32(largest, vabsq_f32(scale));
        UNROLL
        for (int g = 0; g < N_GROUPS; ++g) {
            const levels z = levels_of(bits, c, y.part[g % 4], y.top, y.highest, g % 4, g / 4);
            for (int i = 0; i < PARTS; ++i) {
                vst1q_s8(x->rows[g][q][i], z.part[i]);
            }
        }
    }
    x->largest = vmaxvq_f32(largest);
    for (int t = 0; t < 4 * n_quads; t += 4) {
        const float32x4_t share = vdivq_f32(vld1q_f32(x->share + t), vdupq_n_f32(x->largest));
        vst1q_f32(x->share + t, x->largest > 0.0f ? share : vdupq_n_f32(0.0f));
    }
    for (int g = 0; g < N_GROUPS; ++g) {
        for (int i = 0; i < PARTS; ++i) {
            arrange(n_quads, x->rows[g][0][i], sizeof x->rows[0][0]);
        }
    }
}

/* The weights times a block's scales. */
INLINE void open_weights(const tile_weights * w, int n_quads, int n, value_block * x) {
    for (int q = 0; q < n_quads; ++q) {
        const float32x4_t share = vld1q_f32(x->share + 4 * q);
        for (int col = 0; col < n; col += 4) {
            const float * from = w->scaled[4 * q] + col;
            const int32x4_t integers[4] = {
                vcvtnq_s32_f32(vmulq_laneq_f32(vld1q_f32(from), share, 0)),
                vcvtnq_s32_f32(vmulq_laneq_f32(vld1q_f32(from + MOST_COL), share, 1)),
                vcvtnq_s32_f32(vmulq_laneq_f32(vld1q_f32(from + 2 * MOST_COL), share, 2)),
                vcvtnq_s32_f32(vmulq_laneq_f32(vld1q_f32(from + 3 * MOST_COL), share, 3)),
            };
            pack_columns(integers, x->columns[q][col / 4][0]);
        }
    }
    for (int col = 0; col < n; col += 4) {
        arrange(n_quads, x->columns[0][col / 4][0], sizeof x->columns[0]);
        arrange(n_quads, x->columns[0][col / 4][1], sizeof x->columns[0]);
    }
}

INLINE void accumulate_panel(const value_block * x, const tile_weights * w, float step, int n_quads, int col,
                             const float * factor, int n_col, float * o) {
    const float32x4_t units[2] = { vmulq_n_f32(vld1q_f32(w->unit + col), x->largest * step),
                                   vmulq_n_f32(vld1q_f32(w->unit + col + 4), x->largest * step) };
    for (int g = 0; g < N_GROUPS; ++g) {
        int32x4_t sum[4][2];
        multiply_panel(n_quads, x->rows[g][0][0], x->columns[0][col / 4][0], sizeof x->columns[0], sum);
        for (int m = 0; m < 4; ++m) {
            for (int c = 0; c < 2; ++c) {
                float * to = o + VALUE_AT(g % 4, g / 4, m) * n_col + col + 4 * c;
                const float32x4_t before = vmulq_f32(vld1q_f32(to), vld1q_f32(factor + col + 4 * c));
                vst1q_f32(to, vfmaq_f32(before, vcvtq_f32_s32(sum[m][c]), units[c]));
            }
        }
    }
}

INLINE void tile_accumulate_of(int bits, const tqi_codec * codec, const uint8_t * v, size_t stride, int n_tok,
                               const float * p, const float * factor, int n_blocks, int n_col, float * o) {
    const level_table c = load_level_table(bits, codec);
    const int n_quads = (n_tok + 7) / 8 * 2;
    tile_weights w;
    value_block x;
    for (int t = 0; t < n_tok; ++t) {
        tqi_prefetch(v + (size_t) (TQI_AHEAD + t) * stride, (size_t) n_blocks * TQI_BLOCK_BYTES(bits));
    }
    for (int from = 0; from < n_col; from += MOST_COL) {
        const int n = n_col - from < MOST_COL ? n_col - from : MOST_COL;
        scale_weights(p + from, n_tok, n_quads, n, n_col, &w);
        for (int b = 0; b < n_blocks; ++b) {
            open_values(bits, &c, v + (size_t) b * TQI_BLOCK_BYTES(bits), stride, n_tok, n_quads, &w, &x);
            open_weights(&w, n_quads, n, &x);
            for (int col = 0; col < n; col += PANEL) {
                accumulate_panel(&x, &w, c.step, n_quads, col, factor + from, n_col, o + b * TQ_BLOCK * n_col + from);
            }
        }
    }
}

static void tile_accumulate(const tqi_codec * codec, const uint8_t * v, size_t stride, int n_tok, const float * p,
                            const float * factor, int n_blocks, int n_col, float * o) {
    const int bits = codec->bits;
    BY_BITS(tile_accumulate_of, bits, codec, v, stride, n_tok, p, factor, n_blocks, n_col, o)
}

static const tqi_tiles tiles = { load_queries, tile_scores, tile_accumulate };

#endif
