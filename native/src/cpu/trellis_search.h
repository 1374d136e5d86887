/* trellis_search.h: the encoder of the trellis types, over the vocabulary of vector.h. It computes what
 * trellis_portable.c computes, operation by operation: the same bytes.
 *
 * In the search a lane is a candidate scale, so that nothing moves between lanes: the costs of the eight states are
 * eight vectors. A block takes TQI_CANDIDATES lanes; with 16 lanes two blocks are searched at once. */
#include "block.h"
#include "transform.h"
#include "trellis.h"

#define N_BLOCKS (LANES / TQI_CANDIDATES)
#define MAX_SUBSET (TQI_MAX_LEVELS / TQI_SUBSETS)
#define IN_SUBSET(bits) (1 << ((bits) - 1)) /* levels in a subset: 2 to 16 */

/* The codebook by subset. */
typedef struct {
    float levels[TQI_SUBSETS][MAX_SUBSET];
    float boundaries[TQI_SUBSETS][MAX_SUBSET];
    float level_row[MAX_SUBSET][8]; /* the same by e; a row holds the four subsets, filled up to eight */
    float boundary_row[MAX_SUBSET][8];
} subset_tables;

static subset_tables load_subsets(const tqi_codec * codec) {
    subset_tables c;
    memset(&c, 0, sizeof c);
    for (int j = 0; j < codec->n_levels; ++j) {
        c.levels[j % TQI_SUBSETS][j / TQI_SUBSETS] = codec->levels[j];
        c.boundaries[j % TQI_SUBSETS][j / TQI_SUBSETS] = codec->boundaries[j];
        c.level_row[j / TQI_SUBSETS][j % TQI_SUBSETS] = codec->levels[j];
        c.boundary_row[j / TQI_SUBSETS][j % TQI_SUBSETS] = codec->boundaries[j];
    }
    return c;
}

/* What it costs to put every value into each subset, squared distances in units of the candidate's scale. */
INLINE void measure(int bits, const subset_tables * c, const float * y, vec inverse, vec (*distance)[TQI_SUBSETS]) {
    for (int u = 0; u < TQI_SUBSETS; ++u) {
        for (int i = 0; i < TQ_BLOCK; ++i) {
            const vec x = v_mul(v_per_block(y + i, TQ_BLOCK), inverse);
            words e = w_zero();
            for (int j = 0; j < IN_SUBSET(bits) - 1; ++j) {
                e = w_count(e, v_less(v_set1(c->boundaries[u][j]), x));
            }
            const vec nearest = bits == 5 ? v_lookup16(c->levels[u], e) : v_lookup(c->levels[u], e);
            const vec difference = v_sub(x, nearest);
            distance[i][u] = v_mul(difference, difference);
        }
    }
}

/* One value further: cost[s] becomes that of the best path into state s. Two states lead there, 2 * (s % 4) and the one
 * after it; one[s], if wanted: where it is the latter. */
INLINE void step(const vec * distance, vec * cost, truth * one) {
    vec next[TQI_STATES];
    UNROLL
    for (int s = 0; s < TQI_STATES; ++s) {
        const int from = 2 * (s % 4), u = 2 * (s >> 2 ^ (s >> 1 & 1)) + (s & 1);
        const vec p = v_add(cost[from], distance[u]), q = v_add(cost[from + 1], distance[u ^ 2]);
        next[s] = v_min(q, p);
        if (one) {
            one[s] = v_less(q, p);
        }
    }
    UNROLL
    for (int s = 0; s < TQI_STATES; ++s) {
        cost[s] = next[s];
    }
}

/* The state between values 31 and 0 that the best path around the block, free at both ends, goes through. */
INLINE vec closing_state(int cut, const vec (*distance)[TQI_SUBSETS]) {
    vec cost[TQI_STATES], through[TQI_STATES];
    UNROLL
    for (int s = 0; s < TQI_STATES; ++s) {
        cost[s] = v_set1(0.0f);
        through[s] = v_set1((float) s);
    }
    for (int i = TQ_BLOCK - cut; i < TQ_BLOCK; ++i) {
        step(distance[i], cost, NULL);
    }
    for (int i = 0; i < cut; ++i) {
        truth one[TQI_STATES];
        vec before[TQI_STATES];
        step(distance[i], cost, one);
        UNROLL
        for (int s = 0; s < TQI_STATES; ++s) {
            before[s] = through[s];
        }
        UNROLL
        for (int s = 0; s < TQI_STATES; ++s) {
            through[s] = v_select(one[s], before[2 * (s % 4) + 1], before[2 * (s % 4)]);
        }
    }
    UNROLL
    for (int s = 1; s < TQI_STATES; ++s) {
        const truth better = v_less(cost[s], cost[0]);
        cost[0] = v_min(cost[s], cost[0]);
        through[0] = v_select(better, through[s], through[0]);
    }
    return through[0];
}

/* The distance of the best path that begins and ends in that state, and the choices along it. */
INLINE vec close_path(const vec (*distance)[TQI_SUBSETS], vec closing, truth (*one)[TQI_STATES]) {
    vec cost[TQI_STATES];
    UNROLL
    for (int s = 0; s < TQI_STATES; ++s) {
        cost[s] = v_select(v_equal(closing, v_set1((float) s)), v_set1(0.0f), v_set1(TQI_FAR));
    }
    for (int i = 0; i < TQ_BLOCK; ++i) {
        step(distance[i], cost, one[i]);
    }
    UNROLL
    for (int s = 1; s < TQI_STATES; ++s) {
        cost[0] = v_select(v_equal(closing, v_set1((float) s)), cost[s], cost[0]);
    }
    return cost[0];
}

/* The subset of LANES values from value i on. */
INLINE words subsets_at(uint32_t t, int i) {
    const words high = w_bits(tqi_subset_high(t) >> i);
    return w_add(w_bits(tqi_subset_low(t) >> i), w_add(high, high));
}

/* The scale that fits the levels on path t best, which are those nearest to y * inverse. */
INLINE float fit(int bits, const subset_tables * c, const float * y, float inverse, uint32_t t) {
    float yv[TQ_BLOCK], vv[TQ_BLOCK];
    for (int i = 0; i < TQ_BLOCK; i += LANES) {
        const words u = subsets_at(t, i);
        const vec yi = v_load(y + i), x = v_mul(yi, v_set1(inverse));
        vec v = v_lookup(c->level_row[0], u);
        for (int j = 1; j < IN_SUBSET(bits); ++j) {
            v = v_select(v_less(v_lookup(c->boundary_row[j - 1], u), x), v_lookup(c->level_row[j], u), v);
        }
        v_store(yv + i, v_mul(yi, v));
        v_store(vv + i, v_mul(v, v));
    }
    const float sum = tqi_sum32(yv);
    return sum / tqi_sum32(vv);
}

INLINE void put_block(int bits, const subset_tables * c, const float * y, uint16_t d, uint32_t t, uint8_t * to) {
    int32_t e[TQ_BLOCK];
    const vec inverse = v_set1(1.0f / tqi_f16_to_f32(d));
    for (int i = 0; i < TQ_BLOCK; i += LANES) {
        const words u = subsets_at(t, i);
        const vec x = v_mul(v_load(y + i), inverse);
        words k = w_zero();
        for (int j = 0; j < IN_SUBSET(bits) - 1; ++j) {
            k = w_count(k, v_less(v_lookup(c->boundary_row[j], u), x));
        }
        w_store(e + i, k);
    }
    tqi_trellis_put(bits, d, t, e, to);
}

INLINE int block_candidates(const tqi_codec * codec, const float * y, float * scale) {
    float min, max;
    find_range(load_block(y), &min, &max);
    return tqi_trellis_candidates(codec, max, min, scale);
}

/* N_BLOCKS blocks at y, of which the first n_used are stored. */
INLINE void encode_blocks(int bits, const tqi_codec * codec, const subset_tables * c, const float * y, int n_used,
                          uint8_t * blocks) {
    vec distance[TQ_BLOCK][TQI_SUBSETS];
    truth one[TQ_BLOCK][TQI_STATES];
    float scale[LANES], inverse[LANES], closing[LANES], error[LANES];
    int some[N_BLOCKS];
    for (int b = 0; b < N_BLOCKS; ++b) {
        some[b] = block_candidates(codec, y + b * TQ_BLOCK, scale + b * TQI_CANDIDATES);
    }
    for (int j = 0; j < LANES; ++j) {
        inverse[j] = 1.0f / scale[j];
    }
    measure(bits, c, y, v_load(inverse), distance);
    const vec state = closing_state(codec->cut, (const vec(*)[TQI_SUBSETS]) distance);
    const vec d = v_load(scale);
    v_store(closing, state);
    v_store(error, v_mul(close_path((const vec(*)[TQI_SUBSETS]) distance, state, one), v_mul(d, d)));
    for (int b = 0; b < n_used; ++b, y += TQ_BLOCK, blocks += codec->block_bytes) {
        int best = b * TQI_CANDIDATES;
        for (int j = best + 1; j < (b + 1) * TQI_CANDIDATES; ++j) {
            best = error[j] < error[best] ? j : best;
        }
        uint32_t t = 0;
        for (int i = TQ_BLOCK - 1, s = (int) closing[best]; i >= 0; --i) {
            t |= (uint32_t) (s >> 2) << i;
            s = 2 * (s % 4) + v_lane(&one[i][s], best);
        }
        const uint16_t h = some[b] ? tqi_f32_to_f16(tqi_sanitize(fit(bits, c, y, inverse[best], t))) : 0;
        put_block(bits, c, y, h, t, blocks);
    }
}

static void encode(const tqi_codec * codec, const float * x, int64_t n_blocks, uint8_t * blocks) {
    const subset_tables c = load_subsets(codec);
    for (int64_t b = 0; b < n_blocks; b += N_BLOCKS, blocks += N_BLOCKS * codec->block_bytes) {
        const int n = n_blocks - b < N_BLOCKS ? 1 : N_BLOCKS;
        float y[N_BLOCKS * TQ_BLOCK];
        for (int i = 0; i < N_BLOCKS; ++i) { /* an odd last block twice */
            const float * from = x + (b + (i < n ? i : 0)) * TQ_BLOCK;
            store_block(y + i * TQ_BLOCK, transform_block(codec->signs, sanitize(load_block(from))));
        }
        TQI_BY_TRELLIS_BITS(encode_blocks, codec->bits, codec, &c, y, n, blocks)
    }
}
