/* trellis_portable.c: the trellis types in plain C, the truth that the other kernels are held to. */
#include "transform.h"
#include "trellis.h"

#include <math.h>

/* How many levels of subset u lie below the one nearest to x: e. */
static int nearest(const tqi_codec * codec, int u, float x) {
    int e = 0;
    for (int j = u; j < codec->n_levels - TQI_SUBSETS; j += TQI_SUBSETS) {
        e += x > codec->boundaries[j];
    }
    return e;
}

static int subset_of(uint32_t t, int i) {
    return (int) (2 * (tqi_subset_high(t) >> i & 1) + (tqi_subset_low(t) >> i & 1));
}

/* One value further: cost[s] becomes that of the best path into state s, origin[s] the state that it comes from.
 * distance[u]: what it costs to put the value into subset u. */
static void step(const float * distance, float * cost, int * origin) {
    float next[TQI_STATES];
    for (int s = 0; s < TQI_STATES; ++s) {
        const int bit = s >> 2, a = s >> 1 & 1, b = s & 1;
        const int from = 4 * a + 2 * b; /* or the state after it: the bit that is shifted out was 0 or 1 */
        const float zero = cost[from] + distance[2 * (bit ^ a) + b];
        const float one = cost[from + 1] + distance[2 * (bit ^ a ^ 1) + b];
        next[s] = one < zero ? one : zero;
        origin[s] = one < zero ? from + 1 : from;
    }
    memcpy(cost, next, sizeof next);
}

/* The closed path of the least distance, near enough, and that distance. distances[i]: what it costs to put value i
 * into each subset.
 *
 * Viterbi's algorithm finds the best path out of a given state, so a closed path takes eight runs, one for each state.
 * Instead a first run, free at both ends, over the last `cut` values and then the first ones, tells in which state the
 * best path is between values 31 and 0; a second run from value 0 closes the path there. With a cut of 16, once around
 * the block, that costs 0.8 % in NMSE against all eight runs, for a quarter of the work; with 32 it costs 0.1 %. */
static uint32_t closed_path(int cut, const float (*distances)[TQI_SUBSETS], float * distance) {
    float cost[TQI_STATES] = { 0 };
    int origin[TQ_BLOCK][TQI_STATES], through[TQI_STATES];
    for (int i = TQ_BLOCK - cut; i < TQ_BLOCK; ++i) {
        step(distances[i], cost, origin[i]);
    }
    for (int s = 0; s < TQI_STATES; ++s) {
        through[s] = s;
    }
    for (int i = 0; i < cut; ++i) {
        int before[TQI_STATES];
        memcpy(before, through, sizeof through);
        step(distances[i], cost, origin[i]);
        for (int s = 0; s < TQI_STATES; ++s) {
            through[s] = before[origin[i][s]];
        }
    }
    int best = 0;
    for (int s = 1; s < TQI_STATES; ++s) {
        best = cost[s] < cost[best] ? s : best;
    }

    const int closing = through[best];
    for (int s = 0; s < TQI_STATES; ++s) {
        cost[s] = s == closing ? 0.0f : TQI_FAR;
    }
    for (int i = 0; i < TQ_BLOCK; ++i) {
        step(distances[i], cost, origin[i]);
    }
    uint32_t t = 0;
    for (int i = TQ_BLOCK - 1, s = closing; i >= 0; s = origin[i--][s]) {
        t |= (uint32_t) (s >> 2) << i;
    }
    *distance = cost[closing];
    return t;
}

/* The scale, fitted to the levels on the best candidate's path by least squares, and that path. */
static float search_path(const tqi_codec * codec, const float * y, uint32_t * t) {
    float max = y[0], min = y[0], scale[TQI_CANDIDATES];
    for (int i = 1; i < TQ_BLOCK; ++i) {
        max = y[i] > max ? y[i] : max;
        min = y[i] < min ? y[i] : min;
    }
    if (!tqi_trellis_candidates(codec, max, min, scale)) {
        return 0.0f;
    }
    float best = INFINITY, inverse = 1.0f;
    for (int c = 0; c < TQI_CANDIDATES; ++c) {
        const float tried = 1.0f / scale[c];
        float distances[TQ_BLOCK][TQI_SUBSETS], distance;
        for (int i = 0; i < TQ_BLOCK; ++i) {
            for (int u = 0; u < TQI_SUBSETS; ++u) {
                const float x = y[i] * tried;
                const float difference = x - codec->levels[TQI_SUBSETS * nearest(codec, u, x) + u];
                distances[i][u] = difference * difference;
            }
        }
        const uint32_t path = closed_path(codec->cut, (const float (*)[TQI_SUBSETS]) distances, &distance);
        const float error = distance * (scale[c] * scale[c]);
        if (error < best) {
            best = error;
            inverse = tried;
            *t = path;
        }
    }
    float yv[TQ_BLOCK], vv[TQ_BLOCK];
    for (int i = 0; i < TQ_BLOCK; ++i) {
        const int u = subset_of(*t, i);
        const float v = codec->levels[TQI_SUBSETS * nearest(codec, u, y[i] * inverse) + u];
        yv[i] = y[i] * v;
        vv[i] = v * v;
    }
    const float sum = tqi_sum32(yv);
    return sum / tqi_sum32(vv);
}

void tqi_trellis_encode_portable(const tqi_codec * codec, const float * x, int64_t n_blocks, uint8_t * blocks) {
    for (int64_t b = 0; b < n_blocks; ++b, x += TQ_BLOCK, blocks += codec->block_bytes) {
        uint32_t t = 0;
        float y[TQ_BLOCK];
        for (int i = 0; i < TQ_BLOCK; ++i) {
            y[i] = tqi_sanitize(x[i]);
        }
        tqi_transform(codec->signs, y);
        const uint16_t d = tqi_f32_to_f16(tqi_sanitize(search_path(codec, y, &t)));
        const float inverse = 1.0f / tqi_f16_to_f32(d);
        int32_t e[TQ_BLOCK];
        for (int i = 0; i < TQ_BLOCK; ++i) {
            e[i] = nearest(codec, subset_of(t, i), y[i] * inverse);
        }
        tqi_trellis_put(codec->bits, d, t, e, blocks);
    }
}

void tqi_trellis_unpack_portable(const tqi_codec * codec, const uint8_t * blocks, int64_t n_blocks, float * y) {
    for (int64_t b = 0; b < n_blocks; ++b, y += TQ_BLOCK, blocks += codec->block_bytes) {
        const float d = tqi_block_scale(blocks);
        uint32_t words[TQI_MAX_WORDS] = { 0 };
        memcpy(words, blocks + sizeof(uint16_t), (size_t) (4 * codec->bits));
        for (int i = 0; i < TQ_BLOCK; ++i) {
            const int e = (int) tqi_trellis_e(codec->bits, words, i);
            y[i] = d * codec->levels[TQI_SUBSETS * e + subset_of(words[0], i)];
        }
    }
}
