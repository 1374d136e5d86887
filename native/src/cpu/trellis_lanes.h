/* trellis_lanes.h: the attention steps of the trellis types in integers, over the vocabulary of vector.h, lanes.h and
 *
 *   level_table, load_level_table  a codebook for units_of
 *   units_of(bits, &c, nibble, top, highest, j)  in each byte the level of its value j in units, OFFSET added
 *   sums, sums_of(w), add_products(&s, units, parts), join(s)  sums of products in each dword, begun with w: of its four
 *                                  bytes with the four integers of its lane, which parts hold
 *   split(integers, parts)         the four integers of each lane, of magnitudes up to LARGEST, as add_products takes them
 *   MOST                           query vectors whose sums for two values of j there are registers for */
#ifndef TQI_TRELLIS_LANES_H
#define TQI_TRELLIS_LANES_H

_Static_assert((int64_t) TQ_BLOCK * 255 * LARGEST <= INT32_MAX, "a sum over a block must not overflow");
_Static_assert((int64_t) TQI_AHEAD * 255 * LARGEST <= INT32_MAX, "a sum over a tile must not overflow");

/* ---- Decode ---- */

/* The levels of a vector's blocks: nibble[j % 4] has in byte k the lower four bits of value 8 k + j, in its lower half
 * if j < 4. */
typedef struct {
    words nibble[4];
    words top, highest; /* pqt4 and pqt5: bit j of byte k is bit 4 (5) of value 8 k + j */
} block_levels;

INLINE block_levels find_levels(int bits, const token_blocks * x) {
    const words even_bits = w_set1(0x55555555), even_pairs = w_set1(0x33333333);
    const words t = x->words[0], t1 = w_rol(t, 1), low = w_rol(t, 2), high = w_xor3(t, t1, w_rol(t, 3));
    /* the subsets of even values at their bits i and i + 1, those of odd values at i - 1 and i: as e is stored */
    const words even = w_select(even_bits, low, w_shl(high, 1)), odd = w_select(even_bits, t1, high);
    const words first = x->words[1], second = bits == 2 ? w_shr(first, 1) : x->words[2];
    block_levels y;
    y.nibble[0] = w_select(even_pairs, even, w_shl(first, 2));
    y.nibble[1] = w_select(even_pairs, odd, w_shl(second, 2));
    y.nibble[2] = w_select(even_pairs, w_shr(even, 2), first);
    y.nibble[3] = w_select(even_pairs, w_shr(odd, 2), second);
    y.top = bits >= 4 ? x->words[3] : t;
    y.highest = bits == 5 ? x->words[4] : t;
    return y;
}

/* What the integers' sum has to begin with: the levels have OFFSET added. sum: of the integers, in each dword. */
INLINE words minus_offset(words sum) {
    return w_sub(w_zero(), w_shl(lane_sum(sum), OFFSET_BITS));
}

/* ---- Scores ---- */

/* A part of a query vector: lane b is block b's (or block b % wide's), and parts[j] are of its values j, 8 + j, 16 + j
 * and 24 + j. */
typedef struct {
    words parts[8][2];
    words minus;
    vec unit;
} query_part;
_Static_assert(sizeof(query_part) == sizeof(float) * TQI_QUERY_FLOATS(4) / 4 * N_LANES, "it has its room");

static void load_query(const tqi_codec * codec, const float * q, int n_blocks, float * query) {
    (void) codec;
    const int wide = WIDE(n_blocks);
    for (int b0 = 0; b0 < n_blocks; b0 += wide, query += sizeof(query_part) / sizeof(float)) {
        float x[8][LANES] = { { 0.0f } }; /* as in query_part */
        vec values[8];
        query_part y;
        for (int lane = 0; lane < N_LANES; ++lane) {
            const int b = b0 + lane % wide;
            for (int i = 0; i < TQ_BLOCK && b < n_blocks; ++i) {
                x[i % 8][4 * lane + i / 8] = q[b * TQ_BLOCK + i];
            }
        }
        for (int j = 0; j < 8; ++j) {
            values[j] = v_load(x[j]);
        }
        const vec largest = largest_in(values, 1, 8), inverse = inverse_of(largest, LARGEST);
        words sum = w_zero();
        for (int j = 0; j < 8; ++j) {
            const words integers = w_round(v_mul(values[j], inverse));
            sum = w_add(sum, integers);
            split(integers, y.parts[j]);
        }
        y.minus = minus_offset(sum);
        y.unit = v_mul(unit_of(largest, LARGEST), v_set1(TQI_LEVEL_UNIT));
        memcpy(query, &y, sizeof y);
    }
}

/* Adds the products of n <= wide blocks of a vector's tokens, from `at` on, with the queries' part. */
INLINE void multiply_blocks(int bits, int n_q, int wide, const level_table * c, const uint8_t * at, size_t stride,
                            int n_tok, int n, const float * query, size_t n_floats, vec * total) {
    const token_blocks x = load_blocks(bits, wide, at, stride, n_tok, n);
    const block_levels y = find_levels(bits, &x);
    const query_part * part[TQI_MAX_FUSED];
    sums s[TQI_MAX_FUSED];
    for (int i = 0; i < n_q; ++i) {
        part[i] = (const query_part *) (const void *) (query + (size_t) i * n_floats);
        s[i] = sums_of(w_load(&part[i]->minus));
    }
    UNROLL
    for (int j = 0; j < 8; ++j) {
        const words units = units_of(bits, c, y.nibble[j % 4], y.top, y.highest, j);
        for (int i = 0; i < n_q; ++i) {
            const words parts[2] = { w_load(&part[i]->parts[j][0]), w_load(&part[i]->parts[j][1]) };
            add_products(&s[i], units, parts);
        }
    }
    for (int i = 0; i < n_q; ++i) {
        const vec unit = v_load((const float *) (const void *) &part[i]->unit);
        total[i] = v_fma(v_from(join(s[i])), v_mul(x.scale, unit), total[i]);
    }
}

#define key_table level_table
#define load_key_table load_level_table
#include "scores_lanes.h"
#define scores_rows scores_lanes

/* ---- Accumulate ---- */

/* What accumulate keeps of a tile while it goes through its blocks, as many as a vector has at a time: byte k of dword m
 * is byte m of the lane's token k. */
typedef struct {
    words nibble[MAX_VECTORS][4], top[MAX_VECTORS], highest[MAX_VECTORS];
    vec weights[MAX_VECTORS * TQI_MAX_FUSED]; /* (n_vec, n_q): times the blocks' scales */
    words parts[MAX_VECTORS * TQI_MAX_FUSED][2];
    words minus[TQI_MAX_FUSED];
    vec unit[TQI_MAX_FUSED];
} tile_levels;

/* Decodes n <= wide blocks of a tile. What lies beyond the tile weighs nothing. */
INLINE void open_tile(int bits, int n_q, int wide, const uint8_t * v, size_t stride, int n_tok, const float * p, int ld,
                      int n, tile_levels * x) {
    const words turned = w_lane(turned_bytes);
    for (int c = 0; c * N_TOKENS(wide) < n_tok; ++c) {
        const int t = c * N_TOKENS(wide), n_here = n_tok - t < N_TOKENS(wide) ? n_tok - t : N_TOKENS(wide);
        const token_blocks b = load_blocks(bits, wide, v + (size_t) t * stride, stride, n_here, n);
        const block_levels y = find_levels(bits, &b);
        for (int j = 0; j < 4; ++j) {
            x->nibble[c][j] = w_shuffle(y.nibble[j], turned);
        }
        if (bits >= 4) {
            x->top[c] = w_shuffle(y.top, turned);
        }
        if (bits == 5) {
            x->highest[c] = w_shuffle(y.highest, turned);
        }
        for (int i = 0; i < n_q; ++i) {
            x->weights[c * n_q + i] = v_mul(b.scale, spread_tokens(wide, p + i * ld + t, n_here));
        }
    }
}

/* The weights of query vector i as integers. */
INLINE void split_weights(int n_q, int i, int n_vec, tile_levels * x) {
    const vec largest = largest_in(x->weights + i, n_q, n_vec), inverse = inverse_of(largest, LARGEST);
    words sum = w_zero();
    for (int c = 0; c < n_vec; ++c) {
        const words integers = w_round(v_mul(x->weights[c * n_q + i], inverse));
        sum = w_add(sum, integers);
        split(integers, x->parts[c * n_q + i]);
    }
    x->minus[i] = minus_offset(sum);
    x->unit[i] = v_mul(unit_of(largest, LARGEST), v_set1(TQI_LEVEL_UNIT));
}

/* Query vectors i0 .. i0 + n_q - 1 of n_all. */
INLINE void accumulate_tile(int bits, int n_all, int n_q, int wide, const level_table * c, const tile_levels * x,
                            int i0, int n_vec, int n, int n_blocks, float * o) {
    words all[MOST][8];
    UNROLL
    for (int r = 0; r < 4; ++r) {
        sums s[MOST][2];
        for (int i = 0; i < n_q; ++i) {
            s[i][0] = s[i][1] = sums_of(x->minus[i0 + i]);
        }
        for (int v = 0; v < n_vec; ++v) {
            UNROLL
            for (int h = 0; h < 2; ++h) {
                const words units = units_of(bits, c, x->nibble[v][r], x->top[v], x->highest[v], r + 4 * h);
                for (int i = 0; i < n_q; ++i) {
                    add_products(&s[i][h], units, x->parts[v * n_all + i0 + i]);
                }
            }
        }
        for (int i = 0; i < n_q; ++i) {
            all[i][r] = join(s[i][0]);
            all[i][4 + r] = join(s[i][1]);
        }
    }
    for (int i = 0; i < n_q; ++i) {
        vec rows[4][2]; /* dword m of lane b of all[i][j] belongs to value 8 m + j of block b */
        for (int h = 0; h < 2; ++h) {
            words four[4];
            transpose(all[i] + 4 * h, four);
            for (int m = 0; m < 4; ++m) {
                rows[m][h] = v_mul(v_from(four[m]), x->unit[i0 + i]);
            }
        }
        add_rows(wide, rows, n, o + (i0 + i) * n_blocks * TQ_BLOCK);
    }
}

INLINE void accumulate_wide(int bits, int n_q, int wide, const tqi_codec * codec, const uint8_t * v, size_t stride,
                            int n_tok, const float * p, int ld, int n_blocks, float * o) {
    const level_table c = load_level_table(bits, codec);
    const int n_vec = (n_tok + N_TOKENS(wide) - 1) / N_TOKENS(wide);
    tile_levels x;
    for (int t = 0; t < n_tok; ++t) {
        tqi_prefetch(v + (size_t) (TQI_AHEAD + t) * stride, (size_t) n_blocks * TQI_BLOCK_BYTES(bits));
    }
    for (int b = 0; b < n_blocks; b += wide) {
        const int n = n_blocks - b < wide ? n_blocks - b : wide;
        open_tile(bits, n_q, wide, v + (size_t) b * TQI_BLOCK_BYTES(bits), stride, n_tok, p, ld, n, &x);
        for (int i = 0; i < n_q; ++i) {
            split_weights(n_q, i, n_vec, &x);
        }
        accumulate_tile(bits, n_q, n_q < MOST ? n_q : MOST, wide, &c, &x, 0, n_vec, n, n_blocks, o + b * TQ_BLOCK);
        if (n_q > MOST) {
            accumulate_tile(bits, n_q, n_q - MOST, wide, &c, &x, MOST, n_vec, n, n_blocks, o + b * TQ_BLOCK);
        }
    }
}

INLINE void accumulate_rows(int bits, int n_q, const tqi_codec * codec, const uint8_t * v, size_t stride, int n_tok,
                            const float * p, int ld, int n_blocks, float * o) {
    if (WIDE(n_blocks) < N_LANES) {
        accumulate_wide(bits, n_q, 2, codec, v, stride, n_tok, p, ld, n_blocks, o);
    } else {
        accumulate_wide(bits, n_q, N_LANES, codec, v, stride, n_tok, p, ld, n_blocks, o);
    }
}

#endif
