/* trellis.cuh: the search of the trellis types, what trellis_portable.c computes, operation by operation: the same bytes.
 *
 * A team's thread c tries candidate scale c: Viterbi's algorithm with the eight states in registers, nothing exchanged. What
 * it costs to put each value into each subset is needed three times (two passes, and it takes longer to compute than a step
 * does), so it is kept in shared memory, 512 bytes per thread, interleaved so that a warp's accesses meet no bank twice. */
#ifndef TQ_TRELLIS_CUH
#define TQ_TRELLIS_CUH

#include "encode.cuh"

#define TQ_STATES 8
#define TQ_SUBSETS 4
#define TQ_CUT 16
#define TQ_FAR 1e30f
#define TQ_TRELLIS_THREADS 64

struct tq_trellis_scratch {
    float distances[TQ_BLOCK * TQ_SUBSETS][TQ_TRELLIS_THREADS];
    uint8_t one[TQ_BLOCK][TQ_TRELLIS_THREADS]; /* bit s: state s was reached from the second of its two */
    float y[TQ_TRELLIS_THREADS / TQ_TEAM][TQ_BLOCK + 1];
};

/* How many levels of subset u lie below the one nearest to x: e. */
TQ_HD int tq_nearest(const tq_tables * tables, int bits, int u, float x) {
    int e = 0;
    TQ_UNROLL
    for (int j = 0; j < 7; ++j) {
        if (j < (1 << (bits - 1)) - 1) {
            e += x > tables->boundaries[TQ_SUBSETS * j + u];
        }
    }
    return e;
}

TQ_HD float tq_nearest_level(const tq_tables * tables, int bits, int u, float x) {
    return tables->levels[TQ_SUBSETS * tq_nearest(tables, bits, u, x) + u];
}

/* One value further: cost[s] becomes that of the best path into state s; returns the states that came from the second of
 * the two that lead there, 2 (s % 4) and the one after it. */
TQ_HD uint32_t tq_step(const float * distance, float * cost) {
    float next[TQ_STATES];
    uint32_t one = 0;
    TQ_UNROLL
    for (int s = 0; s < TQ_STATES; ++s) {
        const int from = 2 * (s % 4), u = 2 * (s >> 2 ^ (s >> 1 & 1)) + (s & 1);
        const float p = cost[from] + distance[u], q = cost[from + 1] + distance[u ^ 2];
        next[s] = q < p ? q : p;
        one |= (uint32_t) (q < p) << s;
    }
    TQ_UNROLL
    for (int s = 0; s < TQ_STATES; ++s) {
        cost[s] = next[s];
    }
    return one;
}

/* The closed path of near enough the least distance, and that distance: closed_path of trellis_portable.c. */
TQ_D uint32_t tq_closed_path(tq_trellis_scratch * w, float * distance) {
    const int thread = tq_thread();
    float cost[TQ_STATES], d[TQ_SUBSETS];
    int cut[TQ_STATES];
    TQ_UNROLL
    for (int s = 0; s < TQ_STATES; ++s) {
        cost[s] = 0.0f;
        cut[s] = s;
    }
    TQ_NO_UNROLL
    for (int n = 0; n < TQ_BLOCK; ++n) {
        const int i = (n + TQ_CUT) % TQ_BLOCK;
        TQ_UNROLL
        for (int u = 0; u < TQ_SUBSETS; ++u) {
            d[u] = w->distances[TQ_SUBSETS * i + u][thread];
        }
        const uint32_t one = tq_step(d, cost);
        if (n >= TQ_CUT) {
            int before[TQ_STATES];
            TQ_UNROLL
            for (int s = 0; s < TQ_STATES; ++s) {
                before[s] = cut[s];
            }
            TQ_UNROLL
            for (int s = 0; s < TQ_STATES; ++s) {
                cut[s] = one >> s & 1u ? before[2 * (s % 4) + 1] : before[2 * (s % 4)];
            }
        }
    }
    float least = cost[0];
    int closing = cut[0];
    TQ_UNROLL
    for (int s = 1; s < TQ_STATES; ++s) {
        closing = cost[s] < least ? cut[s] : closing;
        least = cost[s] < least ? cost[s] : least;
    }
    TQ_UNROLL
    for (int s = 0; s < TQ_STATES; ++s) {
        cost[s] = s == closing ? 0.0f : TQ_FAR;
    }
    TQ_NO_UNROLL
    for (int i = 0; i < TQ_BLOCK; ++i) {
        TQ_UNROLL
        for (int u = 0; u < TQ_SUBSETS; ++u) {
            d[u] = w->distances[TQ_SUBSETS * i + u][thread];
        }
        w->one[i][thread] = (uint8_t) tq_step(d, cost);
    }
    TQ_UNROLL
    for (int s = 0; s < TQ_STATES; ++s) {
        *distance = s == closing ? cost[s] : *distance;
    }
    uint32_t t = 0;
    TQ_NO_UNROLL
    for (int i = TQ_BLOCK - 1, s = closing; i >= 0; --i) {
        t |= (uint32_t) (s >> 2) << i;
        s = 2 * (s % 4) + (w->one[i][thread] >> s & 1);
    }
    return t;
}

/* y: the team's transformed values; every thread of the warp takes part. */
TQ_D void tq_trellis_search(const tqi_codec & codec, const tq_tables * tables, int bits, const float * y,
                            tq_trellis_scratch * w, int l, bool store, uint8_t * block) {
    const int thread = tq_thread();
    float * all = w->y[thread / TQ_TEAM];
    float max, min;
    tq_bounds32(y, &max, &min);
    tq_sync_warp(); /* the block before this one is done with w */
    TQ_UNROLL
    for (int m = 0; m < TQ_VALUES; ++m) {
        all[l + TQ_TEAM * m] = y[m];
    }
    tq_sync_warp();

    /* this thread's candidate */
    const float high = 1.0f / codec.levels[(2 << bits) - 1], low = 1.0f / codec.levels[0];
    const bool some = max >= TQI_AMAX_MIN || -min >= TQI_AMAX_MIN;
    const float base = some ? fmaxf(max * high, min * low) : 1.0f;
    const float mirrored = some ? fmaxf(-min * high, -max * low) : 1.0f;
    const float scale = l & 1 ? -(mirrored * codec.factors[l / 2]) : base * codec.factors[l / 2];
    const float tried = 1.0f / scale;
    TQ_NO_UNROLL
    for (int i = 0; i < TQ_BLOCK; ++i) {
        const float x = all[i] * tried;
        TQ_UNROLL
        for (int u = 0; u < TQ_SUBSETS; ++u) {
            const float difference = x - tq_nearest_level(tables, bits, u, x);
            w->distances[TQ_SUBSETS * i + u][thread] = difference * difference;
        }
    }
    float distance = 0.0f;
    uint32_t t = tq_closed_path(w, &distance);

    /* the first of the candidates with the least error */
    float error = distance * (scale * scale);
    int best = l;
    TQ_UNROLL
    for (int h = 1; h < TQ_TEAM; h *= 2) {
        const float other = tq_exchange(error, h);
        const int which = tq_exchange(best, h);
        if (other < error || (other == error && which < best)) {
            error = other;
            best = which;
        }
    }
    const int from = thread % 32 / TQ_TEAM * TQ_TEAM + best;
    const float inverse = tq_lane(tried, from);
    t = tq_lane(t, from);

    float yv[TQ_VALUES], vv[TQ_VALUES];
    TQ_UNROLL
    for (int m = 0; m < TQ_VALUES; ++m) {
        const float v = tq_nearest_level(tables, bits, tq_subset_of(t, l + TQ_TEAM * m), y[m] * inverse);
        yv[m] = y[m] * v;
        vv[m] = v * v;
    }
    const float sum = tq_sum32(yv), fitted = sum / tq_sum32(vv);
    const uint16_t d = some ? tq_f32_to_f16(tq_sanitize(fitted)) : (uint16_t) 0;
    const float quotient = 1.0f / tq_f16_to_f32(d);
    uint32_t words[4] = { t, 0, 0, 0 }; /* t, even, odd, top */
    TQ_UNROLL
    for (int m = 0; m < TQ_VALUES; ++m) {
        const int i = l + TQ_TEAM * m;
        const uint32_t e = (uint32_t) tq_nearest(tables, bits, tq_subset_of(t, i), y[m] * quotient);
        words[1] |= i % 2 ? 0u : (e & 3u) << (i & ~1);
        words[2] |= i % 2 ? (e & 3u) << (i & ~1) : 0u;
        words[3] |= (e >> 2) << i;
    }
    TQ_UNROLL
    for (int i = 1; i < 4; ++i) {
        words[i] = tq_gather(words[i]);
    }
    if (store) {
        tq_store_block(bits, d, words, l, block);
    }
}

#endif
