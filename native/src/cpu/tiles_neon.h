/* tiles_neon.h: the steps of tqi_tiles in integers on AArch64, on blocks as lanes_neon.h takes them.
 *
 * Both steps are products of rows (tokens of K, channels of V) with columns (query vectors), whose bytes go by fours: a
 * register of rows has four bytes of each of four rows, as levels_of gives them, and one of columns four bytes of each
 * of four columns, high or low. Queries are integers against the largest of their column, weights against the largest
 * of their column times the largest scale of their block.
 *
 * The including file also defines, from products_*.h
 *   arrange(n, x, step)  makes of n registers, n even and step bytes apart, what multiply_panel takes
 *   multiply_panel(n_groups, rows, apart, columns, sums)  sums[m][c]: row m's products with columns 4 c to 4 c + 3, of
 *       n_groups groups of four bytes, an even number; rows 0 to 3: (n_groups, PARTS, 16), and rows 4 to 7 `apart`
 *       bytes behind them; columns: (n_groups, high and low, 2 vectors, 16) */
#ifndef TQI_TILES_NEON_H
#define TQI_TILES_NEON_H

#include "quads_neon.h"

#define PANEL 8     /* rows and columns at once */
#define MOST_COL 64 /* columns whose weights are kept */
#define N_GROUPS (TQ_BLOCK / 4)
#define GROUP_BYTES (8 * PANEL) /* of a panel's columns */

INLINE int8x16_t pack_low(const int32x4_t * x) {
    int32x4_t y = vsliq_n_s32(x[0], x[1], 8);
    y = vsliq_n_s32(y, x[2], 16);
    return vreinterpretq_s8_s32(vsliq_n_s32(y, x[3], 24));
}

/* The bytes of integers i of four columns, i from 0 to 3: high ones, and low ones behind the panel's high ones. */
INLINE void pack_columns(const int32x4_t * x, int8_t * to) {
    int32x4_t high[4];
    for (int i = 0; i < 4; ++i) {
        high[i] = vrshrq_n_s32(x[i], 8);
    }
    vst1q_s8(to, pack_low(high));
    vst1q_s8(to + GROUP_BYTES / 2, pack_low(x));
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

/* Where a column's bytes are: of n_groups groups for each panel. */
INLINE int8_t * column_bytes(int8_t * panels, int n_groups, int col) {
    return panels + (size_t) (col / PANEL * n_groups) * GROUP_BYTES + (size_t) (col % PANEL * 4);
}

/* Of each block its panels' bytes, and behind them what the columns' integer 1 stands for. */
static void load_queries(const tqi_codec * codec, const float * q, int n_blocks, int n_col, float * queries) {
    const float step = load_level_table(codec->bits, codec).step;
    const size_t block_floats = (size_t) TQI_TILE_QUERY * (size_t) n_col;
    for (int col = 0; col < n_col; col += 4) {
        const float32x4_t largest = largest_in(q + col, TQ_BLOCK * n_blocks, n_col), inverse = inverses_of(largest);
        const float32x4_t unit = vmulq_n_f32(units_of(largest), step);
        for (int b = 0; b < n_blocks; ++b) {
            float * block = queries + (size_t) b * block_floats;
            int8_t * to = column_bytes((int8_t *) (void *) block, N_GROUPS, col);
            for (int g = 0; g < N_GROUPS; ++g) {
                int32x4_t x[4];
                for (int k = 0; k < 4; ++k) {
                    const int i = b * TQ_BLOCK + VALUE_AT(g % 4, g / 4, k);
                    x[k] = vcvtnq_s32_f32(vmulq_f32(vld1q_f32(q + i * n_col + col), inverse));
                }
                pack_columns(x, to + g * GROUP_BYTES);
            }
            arrange(N_GROUPS, to, GROUP_BYTES);
            arrange(N_GROUPS, to + GROUP_BYTES / 2, GROUP_BYTES);
            vst1q_f32(block + TQ_BLOCK / 2 * n_col + col, unit);
        }
    }
}

/* ---- Scores ---- */

/* A tile's block of K. Of tokens beyond the tile the last one's is taken, up to a whole panel. */
typedef struct {
    int8_t rows[N_QUADS][N_GROUPS][PARTS][16];
    float scale[TQI_AHEAD];
} key_block;

INLINE void open_keys(int bits, const level_table * c, const uint8_t * k, size_t stride, int n_tok, key_block * x) {
    for (int t = 0; t < (n_tok + PANEL - 1) / PANEL * PANEL; t += 4) {
        const int t1 = t < n_tok ? t : n_tok - 1;
        const uint8_t * from[4];
        find_rows(k + (size_t) t1 * stride, stride, n_tok - t1, from);
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

/* Adds a block's products to s, or begins it with the first block's; with the last one's come the units. s has room for
 * whole panels. */
INLINE void score_panel(const key_block * x, int n_tok, const float * queries, int col, int n_col, int first, int last,
                        float * s) {
    const int8_t * columns = (const int8_t *) (const void *) queries + (size_t) (col / PANEL * N_GROUPS) * GROUP_BYTES;
    const float * units = queries + TQ_BLOCK / 2 * n_col + col;
    const float32x4_t one = vdupq_n_f32(1.0f);
    const float32x4_t unit[2] = { last ? vld1q_f32(units) : one, last ? vld1q_f32(units + 4) : one };
    for (int t = 0; t < n_tok; t += PANEL) {
        int32x4_t sum[PANEL][2];
        multiply_panel(N_GROUPS, x->rows[t / 4][0][0], sizeof x->rows[0], columns, sum);
        UNROLL
        for (int m = 0; m < PANEL; ++m) {
            float * to = s + (t + m) * n_col + col;
            UNROLL
            for (int c = 0; c < 2; ++c) {
                const float32x4_t before = first ? vdupq_n_f32(0.0f) : vld1q_f32(to + 4 * c);
                const float32x4_t all = vfmaq_n_f32(before, vcvtq_f32_s32(sum[m][c]), x->scale[t + m]);
                vst1q_f32(to + 4 * c, last ? vmulq_f32(all, unit[c]) : all);
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
            if (b == n_blocks - 1) {
                score_panel(&x, n_tok, queries, col, n_col, b == 0, 1, s);
            } else {
                score_panel(&x, n_tok, queries, col, n_col, b == 0, 0, s);
            }
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
    int8_t columns[MOST_COL / PANEL * N_QUADS * GROUP_BYTES];
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
    float inverses[MOST_COL];
    for (int col = 0; col < n; col += 4) {
        const float32x4_t largest = largest_in(p + col, n_tok, n_col);
        vst1q_f32(w->unit + col, units_of(largest));
        vst1q_f32(inverses + col, inverses_of(largest));
    }
    for (int t = 0; t < n_tok; ++t) {
        uint32x4_t any = vdupq_n_u32(0);
        for (int col = 0; col < n; col += 4) {
            const float32x4_t x = vmulq_f32(vld1q_f32(p + t * n_col + col), vld1q_f32(inverses + col));
            any = vorrq_u32(any, vreinterpretq_u32_f32(x));
            vst1q_f32(w->scaled[t] + col, x);
        }
        w->used[t] = vmaxvq_u32(vshlq_n_u32(any, 1)) != 0; /* without the sign of a zero */
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
    for (int col = 0; col < n; col += 4) {
        int8_t * to = column_bytes(x->columns, n_quads, col);
        const float * from = w->scaled[0] + col;
        for (int q = 0; q < n_quads; ++q, from += 4 * MOST_COL) {
            const float32x4_t share = vld1q_f32(x->share + 4 * q);
            const int32x4_t integers[4] = {
                vcvtnq_s32_f32(vmulq_laneq_f32(vld1q_f32(from), share, 0)),
                vcvtnq_s32_f32(vmulq_laneq_f32(vld1q_f32(from + MOST_COL), share, 1)),
                vcvtnq_s32_f32(vmulq_laneq_f32(vld1q_f32(from + 2 * MOST_COL), share, 2)),
                vcvtnq_s32_f32(vmulq_laneq_f32(vld1q_f32(from + 3 * MOST_COL), share, 3)),
            };
            pack_columns(integers, to + q * GROUP_BYTES);
        }
        arrange(n_quads, to, GROUP_BYTES);
        arrange(n_quads, to + GROUP_BYTES / 2, GROUP_BYTES);
    }
}

INLINE void accumulate_panel(const value_block * x, const tile_weights * w, float step, int n_quads, int col,
                             const float * factor, int n_col, float * o) {
    const float32x4_t units[2] = { vmulq_n_f32(vld1q_f32(w->unit + col), x->largest * step),
                                   vmulq_n_f32(vld1q_f32(w->unit + col + 4), x->largest * step) };
    const float32x4_t factors[2] = { vld1q_f32(factor + col), vld1q_f32(factor + col + 4) };
    for (int g = 0; g < N_GROUPS; g += 2) {
        int32x4_t sum[PANEL][2];
        multiply_panel(n_quads, x->rows[g][0][0], sizeof x->rows[0],
                       x->columns + (size_t) (col / PANEL * n_quads) * GROUP_BYTES, sum);
        UNROLL
        for (int m = 0; m < PANEL; ++m) {
            float * to = o + VALUE_AT((g + m / 4) % 4, g / 4, m % 4) * n_col + col;
            UNROLL
            for (int c = 0; c < 2; ++c) {
                const float32x4_t before = vmulq_f32(vld1q_f32(to + 4 * c), factors[c]);
                vst1q_f32(to + 4 * c, vfmaq_f32(before, vcvtq_f32_s32(sum[m][c]), units[c]));
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

#endif
