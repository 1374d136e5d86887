/* trellis_search.h: the encoder of the trellis types for vector instructions, written once over a few operations that the
 * including file defines. It computes what trellis_portable.c computes, operation by operation: same bytes.
 *
 * In the search a lane is a candidate scale, so that nothing moves between lanes: the costs of the eight states are eight
 * vectors. TQI_CANDIDATES lanes are a block's; with more lanes several blocks are searched at once.
 *
 *   lanes  LANES floats: lanes_set1, _load, _store, _add, _sub, _mul, _min, _max
 *          lanes_per_block(x, stride): lane j holds x[j / TQI_CANDIDATES * stride]
 *          lanes_lookup(table, index): table is eight floats, index a vector of words below 8
 *   words  LANES 32-bit integers: words_zero, words_add, words_store
 *          words_bits(w): lane j holds bit j of w
 *          words_count(n, a, b): n + 1 where a < b, else n
 *   truth  LANES truth values: truth_less(a, b), truth_equal(a, b), truth_select(which, yes, no), truth_lane(&which, j) */

#define N_BLOCKS (LANES / TQI_CANDIDATES)
#define MAX_SUBSET (TQI_MAX_LEVELS / TQI_SUBSETS) /* levels in a subset: 4 or 8 */
#define UNROLL _Pragma("GCC unroll 8")            /* so that arrays of vectors become registers */

/* The codebook by subset. */
typedef struct {
    float levels[TQI_SUBSETS][MAX_SUBSET];
    float boundaries[TQI_SUBSETS][MAX_SUBSET];
    float level_row[MAX_SUBSET][MAX_SUBSET]; /* the same by e; a row holds the four subsets, filled up to eight */
    float boundary_row[MAX_SUBSET][MAX_SUBSET];
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
INLINE void measure(int n, const subset_tables * c, const float * y, lanes inverse, lanes (*distance)[TQI_SUBSETS]) {
    for (int u = 0; u < TQI_SUBSETS; ++u) {
        for (int i = 0; i < TQ_BLOCK; ++i) {
            const lanes x = lanes_mul(lanes_per_block(y + i, TQ_BLOCK), inverse);
            words e = words_zero();
            for (int j = 0; j < n - 1; ++j) {
                e = words_count(e, lanes_set1(c->boundaries[u][j]), x);
            }
            const lanes difference = lanes_sub(x, lanes_lookup(c->levels[u], e));
            distance[i][u] = lanes_mul(difference, difference);
        }
    }
}

/* One value further: cost[s] becomes that of the best path into state s. Two states lead there, 2 * (s % 4) and the one after
 * it; one[s], if wanted: where it is the latter. */
INLINE void step(const lanes * distance, lanes * cost, truth * one) {
    lanes next[TQI_STATES];
    UNROLL
    for (int s = 0; s < TQI_STATES; ++s) {
        const int from = 2 * (s % 4), u = 2 * (s >> 2 ^ (s >> 1 & 1)) + (s & 1);
        const lanes p = lanes_add(cost[from], distance[u]), q = lanes_add(cost[from + 1], distance[u ^ 2]);
        next[s] = lanes_min(q, p);
        if (one) {
            one[s] = truth_less(q, p);
        }
    }
    UNROLL
    for (int s = 0; s < TQI_STATES; ++s) {
        cost[s] = next[s];
    }
}

/* The state between values 31 and 0 that the best path around the block, free at both ends, goes through. */
INLINE lanes closing_state(const lanes (*distance)[TQI_SUBSETS]) {
    lanes cost[TQI_STATES], cut[TQI_STATES];
    UNROLL
    for (int s = 0; s < TQI_STATES; ++s) {
        cost[s] = lanes_set1(0.0f);
        cut[s] = lanes_set1((float) s);
    }
    for (int i = TQI_CUT; i < TQ_BLOCK; ++i) {
        step(distance[i], cost, NULL);
    }
    for (int i = 0; i < TQI_CUT; ++i) {
        truth one[TQI_STATES];
        lanes before[TQI_STATES];
        step(distance[i], cost, one);
        UNROLL
        for (int s = 0; s < TQI_STATES; ++s) {
            before[s] = cut[s];
        }
        UNROLL
        for (int s = 0; s < TQI_STATES; ++s) {
            cut[s] = truth_select(one[s], before[2 * (s % 4) + 1], before[2 * (s % 4)]);
        }
    }
    UNROLL
    for (int s = 1; s < TQI_STATES; ++s) {
        const truth better = truth_less(cost[s], cost[0]);
        cost[0] = lanes_min(cost[s], cost[0]);
        cut[0] = truth_select(better, cut[s], cut[0]);
    }
    return cut[0];
}

/* The distance of the best path that begins and ends in that state, and the choices along it. */
INLINE lanes close_path(const lanes (*distance)[TQI_SUBSETS], lanes closing, truth (*one)[TQI_STATES]) {
    lanes cost[TQI_STATES];
    UNROLL
    for (int s = 0; s < TQI_STATES; ++s) {
        cost[s] = truth_select(truth_equal(closing, lanes_set1((float) s)), lanes_set1(0.0f), lanes_set1(TQI_FAR));
    }
    for (int i = 0; i < TQ_BLOCK; ++i) {
        step(distance[i], cost, one[i]);
    }
    UNROLL
    for (int s = 1; s < TQI_STATES; ++s) {
        cost[0] = truth_select(truth_equal(closing, lanes_set1((float) s)), cost[s], cost[0]);
    }
    return cost[0];
}

/* The subset of LANES values from value i on. */
INLINE words subsets_at(uint32_t t, int i) {
    const words high = words_bits(tqi_subset_high(t) >> i);
    return words_add(words_bits(tqi_subset_low(t) >> i), words_add(high, high));
}

/* The scale that fits the levels on path t best, which are those nearest to y * inverse. */
INLINE float fit(int n, const subset_tables * c, const float * y, float inverse, uint32_t t) {
    float yv[TQ_BLOCK], vv[TQ_BLOCK];
    for (int i = 0; i < TQ_BLOCK; i += LANES) {
        const words u = subsets_at(t, i);
        const lanes yi = lanes_load(y + i), x = lanes_mul(yi, lanes_set1(inverse));
        lanes v = lanes_lookup(c->level_row[0], u);
        for (int j = 1; j < n; ++j) {
            v = truth_select(truth_less(lanes_lookup(c->boundary_row[j - 1], u), x), lanes_lookup(c->level_row[j], u),
                             v);
        }
        lanes_store(yv + i, lanes_mul(yi, v));
        lanes_store(vv + i, lanes_mul(v, v));
    }
    const float sum = tqi_sum32(yv);
    return sum / tqi_sum32(vv);
}

INLINE void put_block(int n, const subset_tables * c, const float * y, uint16_t d, uint32_t t, uint8_t * block) {
    int32_t e[TQ_BLOCK];
    const lanes inverse = lanes_set1(1.0f / tqi_f16_to_f32(d));
    for (int i = 0; i < TQ_BLOCK; i += LANES) {
        const words u = subsets_at(t, i);
        const lanes x = lanes_mul(lanes_load(y + i), inverse);
        words k = words_zero();
        for (int j = 0; j < n - 1; ++j) {
            k = words_count(k, lanes_lookup(c->boundary_row[j], u), x);
        }
        words_store(e + i, k);
    }
    tqi_trellis_put(n == MAX_SUBSET ? 4 : 3, d, t, e, block);
}

INLINE int block_candidates(const tqi_codec * codec, const float * y, float * scale) {
    lanes max = lanes_load(y), min = max;
    float highest[LANES], lowest[LANES];
    for (int i = LANES; i < TQ_BLOCK; i += LANES) {
        max = lanes_max(max, lanes_load(y + i));
        min = lanes_min(min, lanes_load(y + i));
    }
    lanes_store(highest, max);
    lanes_store(lowest, min);
    for (int j = 1; j < LANES; ++j) {
        highest[0] = highest[j] > highest[0] ? highest[j] : highest[0];
        lowest[0] = lowest[j] < lowest[0] ? lowest[j] : lowest[0];
    }
    return tqi_trellis_candidates(codec, highest[0], lowest[0], scale);
}

/* N_BLOCKS blocks at y, of which the first n_used are stored. */
INLINE void encode_blocks(int n, const tqi_codec * codec, const subset_tables * c, const float * y, int n_used,
                          uint8_t * blocks) {
    lanes distance[TQ_BLOCK][TQI_SUBSETS];
    truth one[TQ_BLOCK][TQI_STATES];
    float scale[LANES], inverse[LANES], closing[LANES], error[LANES];
    int some[N_BLOCKS];
    for (int b = 0; b < N_BLOCKS; ++b) {
        some[b] = block_candidates(codec, y + b * TQ_BLOCK, scale + b * TQI_CANDIDATES);
    }
    for (int j = 0; j < LANES; ++j) {
        inverse[j] = 1.0f / scale[j];
    }
    measure(n, c, y, lanes_load(inverse), distance);
    const lanes cut = closing_state((const lanes(*)[TQI_SUBSETS]) distance);
    const lanes d = lanes_load(scale);
    lanes_store(closing, cut);
    lanes_store(error, lanes_mul(close_path((const lanes(*)[TQI_SUBSETS]) distance, cut, one), lanes_mul(d, d)));
    for (int b = 0; b < n_used; ++b, y += TQ_BLOCK, blocks += codec->block_bytes) {
        int best = b * TQI_CANDIDATES;
        for (int j = best + 1; j < (b + 1) * TQI_CANDIDATES; ++j) {
            best = error[j] < error[best] ? j : best;
        }
        uint32_t t = 0;
        for (int i = TQ_BLOCK - 1, s = (int) closing[best]; i >= 0; --i) {
            t |= (uint32_t) (s >> 2) << i;
            s = 2 * (s % 4) + truth_lane(&one[i][s], best);
        }
        const uint16_t h = some[b] ? tqi_f32_to_f16(tqi_sanitize(fit(n, c, y, inverse[best], t))) : 0;
        put_block(n, c, y, h, t, blocks);
    }
}
