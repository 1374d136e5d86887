/* trellis.cuh: the search of the trellis types, what trellis_portable.c computes, operation by operation: the same
 * bytes.
 *
 * A team's thread c tries candidate scale c: Viterbi's algorithm with the eight states in registers, nothing exchanged.
 * What it costs to put each value into each subset is needed three times (two passes, and it takes longer to compute
 * than a step does), so it is kept in shared memory, 512 bytes per thread, interleaved so that a warp's accesses meet
 * no bank twice. */
#ifndef TQI_TRELLIS_CUH
#define TQI_TRELLIS_CUH

#include "encode.cuh"

#define TQI_STATES 8
#define TQI_SUBSETS 4
#define TQI_FAR 1e30f
#define TQI_TRELLIS_THREADS 64

struct tqi_trellis_scratch {
    float distances[TQ_BLOCK * TQI_SUBSETS][TQI_TRELLIS_THREADS];
    uint8_t one[TQ_BLOCK][TQI_TRELLIS_THREADS]; /* bit s: state s was reached from the second of its two */
    float y[TQI_TRELLIS_THREADS / TQI_TEAM][TQ_BLOCK + 1];
};

/* How many levels of subset u lie below the one nearest to x: e. */
TQI_HD int tqi_nearest(const tqi_tables * tables, int bits, int u, float x) {
    int e = 0;
    TQI_UNROLL
    for (int j = 0; j < TQI_MAX_LEVELS / TQI_SUBSETS - 1; ++j) {
        if (j < (1 << (bits - 1)) - 1) {
            e += x > tables->boundaries[TQI_SUBSETS * j + u];
        }
    }
    return e;
}

TQI_HD float tqi_nearest_level(const tqi_tables * tables, int bits, int u, float x) {
    return tables->levels[TQI_SUBSETS * tqi_nearest(tables, bits, u, x) + u];
}

/* One value further: cost[s] becomes that of the best path into state s; returns the states that came from the second
 * of the two that lead there, 2 (s % 4) and the one after it. */
TQI_HD uint32_t tqi_step(const float * distance, float * cost) {
    float next[TQI_STATES];
    uint32_t one = 0;
    TQI_UNROLL
    for (int s = 0; s < TQI_STATES; ++s) {
        const int from = 2 * (s % 4), u = 2 * (s >> 2 ^ (s >> 1 & 1)) + (s & 1);
        const float p = cost[from] + distance[u], q = cost[from + 1] + distance[u ^ 2];
        next[s] = q < p ? q : p;
        one |= (uint32_t) (q < p) << s;
    }
    TQI_UNROLL
    for (int s = 0; s < TQI_STATES; ++s) {
        cost[s] = next[s];
    }
    return one;
}

/* The closed path of near enough the least distance, and that distance: closed_path of trellis_portable.c. */
TQI_D uint32_t tqi_closed_path(int cut, tqi_trellis_scratch * w, float * distance) {
    const int thread = tqi_thread();
    float cost[TQI_STATES], d[TQI_SUBSETS];
    int through[TQI_STATES];
    TQI_UNROLL
    for (int s = 0; s < TQI_STATES; ++s) {
        cost[s] = 0.0f;
        through[s] = s;
    }
    TQI_NO_UNROLL
    for (int n = -cut; n < cut; ++n) {
        const int i = (n + TQ_BLOCK) % TQ_BLOCK;
        TQI_UNROLL
        for (int u = 0; u < TQI_SUBSETS; ++u) {
            d[u] = w->distances[TQI_SUBSETS * i + u][thread];
        }
        const uint32_t one = tqi_step(d, cost);
        if (n >= 0) {
            int before[TQI_STATES];
            TQI_UNROLL
            for (int s = 0; s < TQI_STATES; ++s) {
                before[s] = through[s];
            }
            TQI_UNROLL
            for (int s = 0; s < TQI_STATES; ++s) {
                through[s] = one >> s & 1u ? before[2 * (s % 4) + 1] : before[2 * (s % 4)];
            }
        }
    }
    float least = cost[0];
    int closing = through[0];
    TQI_UNROLL
    for (int s = 1; s < TQI_STATES; ++s) {
        closing = cost[s] < least ? through[s] : closing;
        least = cost[s] < least ? cost[s] : least;
    }
    TQI_UNROLL
    for (int s = 0; s < TQI_STATES; ++s) {
        cost[s] = s == closing ? 0.0f : TQI_FAR;
    }
    TQI_NO_UNROLL
    for (int i = 0; i < TQ_BLOCK; ++i) {
        TQI_UNROLL
        for (int u = 0; u < TQI_SUBSETS; ++u) {
            d[u] = w->distances[TQI_SUBSETS * i + u][thread];
        }
        w->one[i][thread] = (uint8_t) tqi_step(d, cost);
    }
    TQI_UNROLL
    for (int s = 0; s < TQI_STATES; ++s) {
        *distance = s == closing ? cost[s] : *distance;
    }
    uint32_t t = 0;
    TQI_NO_UNROLL
    for (int i = TQ_BLOCK - 1, s = closing; i >= 0; --i) {
        t |= (uint32_t) (s >> 2) << i;
        s = 2 * (s % 4) + (w->one[i][thread] >> s & 1);
    }
    return t;
}

/* Writes what it costs to put each value, multiplied by `tried`, into each subset. y: all 32 values. */
TQI_D void tqi_trellis_distances(const tqi_tables * tables, int bits, const float * y, float tried,
                                 tqi_trellis_scratch * w) {
    TQI_NO_UNROLL
    for (int i = 0; i < TQ_BLOCK; ++i) {
        const float x = y[i] * tried;
        TQI_UNROLL
        for (int u = 0; u < TQI_SUBSETS; ++u) {
            const float difference = x - tqi_nearest_level(tables, bits, u, x);
            w->distances[TQI_SUBSETS * i + u][tqi_thread()] = difference * difference;
        }
    }
}

/* The first of the team's candidates with the least error: its lane. */
TQI_D int tqi_best_candidate(float error, int l) {
    int best = l;
    TQI_UNROLL
    for (int h = 1; h < TQI_TEAM; h *= 2) {
        const float other = tqi_exchange(error, h);
        const int which = tqi_exchange(best, h);
        if (other < error || (other == error && which < best)) {
            error = other;
            best = which;
        }
    }
    return tqi_thread() % 32 / TQI_TEAM * TQI_TEAM + best;
}

/* The words of a block of path t (format.h). quotient: 1 / its scale. */
TQI_D void tqi_trellis_words(const tqi_tables * tables, int bits, const float * y, uint32_t t, float quotient, int l,
                             uint32_t * words) {
    words[0] = t;
    TQI_UNROLL
    for (int i = 1; i < TQI_MAX_WORDS; ++i) {
        words[i] = 0;
    }
    TQI_UNROLL
    for (int m = 0; m < TQI_VALUES; ++m) {
        const int i = l + TQI_TEAM * m;
        const uint32_t e = (uint32_t) tqi_nearest(tables, bits, tqi_subset_of(t, i), y[m] * quotient);
        tqi_trellis_put_e(bits, e, i, words);
    }
    TQI_UNROLL
    for (int i = 1; i < TQI_MAX_WORDS; ++i) {
        words[i] = i < bits ? tqi_gather(words[i]) : 0;
    }
}

/* y: the team's transformed values; every thread of the warp takes part. */
TQI_D void tqi_trellis_search(const tqi_codec & codec, const tqi_tables * tables, int bits, const float * y,
                              tqi_trellis_scratch * w, int l, bool store, uint8_t * block) {
    float * all = w->y[tqi_thread() / TQI_TEAM];
    float max, min;
    tqi_bounds32(y, &max, &min);
    tqi_sync_warp(); /* the block before this one is done with w */
    TQI_UNROLL
    for (int m = 0; m < TQI_VALUES; ++m) {
        all[l + TQI_TEAM * m] = y[m];
    }
    tqi_sync_warp();

    /* this thread's candidate */
    const float high = 1.0f / codec.levels[(2 << bits) - 1], low = 1.0f / codec.levels[0];
    const bool some = max >= TQI_AMAX_MIN || -min >= TQI_AMAX_MIN;
    const float base = some ? fmaxf(max * high, min * low) : 1.0f;
    const float mirrored = some ? fmaxf(-min * high, -max * low) : 1.0f;
    const float scale = l & 1 ? -(mirrored * codec.factors[l / 2]) : base * codec.factors[l / 2];
    const float tried = 1.0f / scale;
    float distance = 0.0f;
    tqi_trellis_distances(tables, bits, all, tried, w);
    const uint32_t path = tqi_closed_path(codec.cut, w, &distance);

    const int from = tqi_best_candidate(distance * (scale * scale), l);
    const float inverse = tqi_lane(tried, from);
    const uint32_t t = tqi_lane(path, from);
    float yv[TQI_VALUES], vv[TQI_VALUES];
    TQI_UNROLL
    for (int m = 0; m < TQI_VALUES; ++m) {
        const float v = tqi_nearest_level(tables, bits, tqi_subset_of(t, l + TQI_TEAM * m), y[m] * inverse);
        yv[m] = y[m] * v;
        vv[m] = v * v;
    }
    const float sum = tqi_sum32(yv), fitted = sum / tqi_sum32(vv);
    const uint16_t d = some ? tqi_f32_to_f16(tqi_sanitize(fitted)) : (uint16_t) 0;
    uint32_t words[TQI_MAX_WORDS];
    tqi_trellis_words(tables, bits, y, t, 1.0f / tqi_f16_to_f32(d), l, words);
    if (store) {
        tqi_store_block(bits, d, words, l, block);
    }
}

#endif
