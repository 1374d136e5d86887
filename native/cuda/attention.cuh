/* attention.cuh: fused attention over compressed K and V for few query vectors, on tensor cores: every pair of types
 * and every head size. attention_warp.cuh does the same faster for those that decoding mostly has, and takes from here
 * what is no loop.
 *
 * As on the CPU (attention.c) everything happens in the transformed domain: q is transformed once, V is accumulated
 * transformed, the inverse transform runs once on the output. A block of 256 threads takes a range of keys of one KV
 * head, and up to 16 query vectors of it, so that each K and V block is decoded once for the whole group. Ranges are
 * merged by a second kernel (as in Flash-Decoding).
 *
 * Per tile of up to 128 keys:
 *   scores      Warp w takes 16 keys: S = K q, m16n8k16, keys down, query vectors across. The tensor core sums the
 *               products of one K block; the sum is multiplied by the block's scale in f32: K's scale never meets f16.
 *   softmax     Online, by row of scores; weights become f16, and the sum adds up what they were rounded to.
 *   accumulate  Warp w takes 64 dimensions and a part of the keys: O = V^T P, dimensions down, query vectors across.
 *
 * The query vectors fill eight columns of a tensor-core tile even if there is one of them only: multiplying costs less
 * than decoding either way (docs/cuda.md).
 *
 * Largest score and weights are per query vector, relative to which f16 has enough range: q is brought to 64..128 by a
 * power of two, weights are multiplied by WEIGHT, levels by UNIT (slices.cuh); the output divides by the sum of these.
 *
 * Every thread of the block calls all functions unless they say otherwise. g = lane / 4 and t = lane % 4 are a lane's
 * row and column in a tensor-core fragment (tqi_mma). */
#ifndef TQI_ATTENTION_CUH
#define TQI_ATTENTION_CUH

#include "products.cuh"
#include "tiles.cuh"
#include "transform.cuh"

#define TQI_WEIGHT 1024.0f
#define TQI_LOG2_E 1.4426950408889634f
#define TQI_F16_NEGATIVE_INFINITY 0xfc00u

/* e^x to about 2^-20 of it, for x <= 0. */
TQI_D float tqi_exp(float x) {
    return tqi_exp2(x * TQI_LOG2_E);
}

/* What a thread knows of the query vector whose softmax it helps with. */
struct tqi_row {
    int vec;   /* of the block's 8 or 16 */
    int first; /* of its tokens in a tile; the others are step further on each */
    int step;
    int row; /* of q */
    bool valid;
    bool any; /* whether the warp has a vector; nobody looks at columns without one */
    const uint8_t * mask;
    float max, sum; /* sum: of this thread's tokens alone, in units of WEIGHT */
};

/* tqi_block_layout as pointers. */
struct tqi_buffers {
    uint32_t *k_table, *v_table;
    tqi_quad * q;
    float * scores;
    uint16_t * weights;
    float * factors;      /* what earlier results are multiplied by */
    float *max, *sum;     /* at the end */
    float *scale, *slope; /* a score is scale * what tqi_scores() finds, and slope * mask */
    uint8_t * stages;
};

TQI_D tqi_buffers tqi_carve(const tqi_attention & p, unsigned char * shared) {
    const auto floats = [=](int at) { return (float *) (void *) (shared + at); };
    tqi_buffers w;
    w.k_table = (uint32_t *) (void *) shared;
    w.v_table = (uint32_t *) (void *) (shared + p.at.v_table);
    w.q = (tqi_quad *) (void *) (shared + p.at.q);
    w.scores = floats(p.at.scores);
    w.weights = (uint16_t *) (void *) (shared + p.at.weights);
    w.factors = floats(p.at.factors);
    w.max = floats(p.at.max);
    w.sum = floats(p.at.sum);
    w.scale = floats(p.at.scale);
    w.slope = floats(p.at.slope);
    w.stages = shared + p.at.stages;
    return w;
}

/* ---- Queries ---- */

/* The row of q that a query vector is of, and the head. */
TQI_D int tqi_row_of_vector(const tqi_attention & p, int vec) {
    return tqi_divide(vec, p.group, p.group_inverse);
}
TQI_D int tqi_head_of_vector(const tqi_attention & p, const tqi_task & task, int vec, int row) {
    return task.kv_head * p.group + vec - row * p.group;
}

/* A query vector as the caller gave it. */
TQI_D const float * tqi_query_of(const tqi_attention & p, const tqi_task & task, int row, int head) {
    return (const float *) (const void *) (p.q + task.stream * p.q_stride_stream + (int64_t) head * p.q_stride_head +
                                           (int64_t) row * p.q_stride_row);
}

/* A power of two that brings |x| = amax to 64..128, and its inverse. */
TQI_HD float tqi_power_for(float amax, float * inverse) {
    int e = (int) (tqi_float_bits(amax) >> 23 & 255u) - 127;
    e = e < -100 ? -100 : e;
    *inverse = tqi_bits_float((uint32_t) (127 + e - 6) << 23);
    return tqi_bits_float((uint32_t) (127 + 6 - e) << 23);
}

/* ALiBi: Press et al., arXiv:2108.12409, extended to head counts that are no power of two as llama.cpp does. */
TQI_HD float tqi_slope(const tqi_attention & p, int head) {
    if (p.max_bias <= 0.0f) {
        return 1.0f;
    }
    int n = 1;
    while (2 * n <= p.n_head) {
        n *= 2;
    }
    return head < n ? exp2f(-p.max_bias / (float) n * (float) (head + 1))
                    : exp2f(-p.max_bias / 2.0f / (float) n * (float) (2 * (head - n) + 1));
}

/* Writes the q fragments and, for each query vector, scale and slope; zeros where there is no vector. A warp takes a
 * vector. */
template <typename T, int BLOCKS>
TQI_D void tqi_load_queries(const tqi_attention & p, const tqi_task & task, tqi_quad * fragments, float * scale,
                            float * slope) {
    const int lane = tqi_thread() % 32, l = lane % TQI_TEAM, team = lane / TQI_TEAM;
    const int n_blocks = BLOCKS > 0 ? BLOCKS : p.k.n_blocks, last = (n_blocks + 3) / 4 * 4; /* all lanes exchange */
    uint16_t * halves = (uint16_t *) (void *) fragments;
    for (int i = tqi_thread() / 32; i < 8 * p.n_tiles; i += TQI_WARPS) {
        const bool valid = task.vec0 + i < p.n_vec;
        const int vec = valid ? task.vec0 + i : 0, row = tqi_row_of_vector(p, vec),
                  head = tqi_head_of_vector(p, task, vec, row);
        const float * q = tqi_query_of(p, task, row, head);
        float amax = 0.0f, inverse = 0.0f;
        for (int b = team; b < last; b += 4) {
            TQI_UNROLL
            for (int m = 0; m < TQI_VALUES; ++m) {
                amax = fmaxf(amax, b < n_blocks ? fabsf(q[b * TQ_BLOCK + l + TQI_TEAM * m]) : 0.0f);
            }
        }
        amax = tqi_largest_of_lanes<1, 32>(amax);
        const float power = valid ? tqi_power_for(amax, &inverse) : 0.0f;
        for (int b = team; b < last; b += 4) { /* four blocks at once */
            float x[TQI_VALUES];
            TQI_UNROLL
            for (int m = 0; m < TQI_VALUES; ++m) {
                x[m] = b < n_blocks ? q[b * TQ_BLOCK + l + TQI_TEAM * m] * power : 0.0f;
            }
            if (p.k.is_pqo) {
                tqi_transform(p.k.signs_first, x, l);
            }
            uint16_t * to = halves + (((i / 8) * n_blocks + b) * 32 + 4 * (i % 8)) * 8;
            TQI_UNROLL
            for (int m = 0; m < TQI_VALUES && b < n_blocks; ++m) {
                const tqi_spot spot = tqi_spot_of(T::ORDER, l + TQI_TEAM * m);
                to[8 * spot.part + spot.n] = (uint16_t) tqi_half2(x[m], 0.0f);
            }
        }
        if (lane == 0) {
            scale[i] = inverse * p.scale / T::unit();
            slope[i] = tqi_slope(p, head);
        }
    }
}

/* ---- Scores ---- */

template <typename T, int NT>
TQI_D void tqi_scores(const tqi_attention & p, const tqi_buffers & w, const uint8_t * tile) {
    const int lane = tqi_thread() % 32, warp = tqi_thread() / 32, g = lane / 4, t = lane % 4,
              ld = tqi_scores_stride(p.tile);
    float sum[NT][4];
    if (16 * warp >= p.tile) {
        return;
    }
    const auto q = [&](int b, int i) { return w.q[(i * p.k.n_blocks + b) * 32 + lane]; };
    const int stride = p.k.stride_shared;
    tqi_multiply_keys<T, NT, 0>(w.k_table, tile + (16 * warp + g) * stride, stride, T::place_of(t), p.k.n_blocks, q,
                                sum);
    TQI_UNROLL
    for (int i = 0; i < NT; ++i) {
        float * s = w.scores + (8 * i + 2 * t) * ld + 16 * warp + g;
        s[0] = sum[i][0];
        s[ld] = sum[i][1];
        s[8] = sum[i][2];
        s[ld + 8] = sum[i][3];
    }
}

/* ---- Softmax ---- */

/* The mask's row of a query vector, NULL if there is no mask. */
TQI_D const uint8_t * tqi_mask_of(const tqi_attention & p, const tqi_task & task, int vec) {
    if (p.mask == NULL) {
        return NULL;
    }
    const int row = tqi_row_of_vector(p, vec), head = tqi_head_of_vector(p, task, vec, row);
    const uint8_t * mask = p.mask + (int64_t) row * p.mask_stride_row;
    mask += p.n_mask_head > 1 ? (int64_t) (head % p.n_mask_head) * p.mask_stride_head : 0;
    mask += p.n_mask_stream > 1 ? (int64_t) (task.stream % p.n_mask_stream) * p.mask_stride_stream : 0;
    return mask;
}

TQI_D tqi_row tqi_row_of(const tqi_attention & p, const tqi_task & task, int n_tiles) {
    tqi_row r;
    r.step = 32 / n_tiles;
    r.vec = tqi_thread() / r.step;
    r.first = tqi_thread() % r.step;
    r.valid = task.vec0 + r.vec < p.n_vec;
    r.any = task.vec0 + tqi_thread() / 32 * n_tiles < p.n_vec;
    r.row = tqi_row_of_vector(p, task.vec0 + r.vec);
    r.mask = tqi_mask_of(p, task, r.valid ? task.vec0 + r.vec : 0);
    r.max = -INFINITY;
    r.sum = 0.0f;
    return r;
}

/* Which of a batch's own tokens token t is, -1 if it is none. owners: tq_tail_batch's integers. */
TQI_D int tqi_own_token(const tqi_attention & p, const int32_t * owners, int t) {
    const int32_t *own = owners + p.n_recent + p.n_first, *order = own + p.n_recent + p.n_first + 2 * p.n_own;
    int first = 0; /* of order, that is not before t */
    for (int end = p.n_own; first < end;) {
        const int middle = (first + end) / 2;
        const bool before = own[order[middle]] <= t;
        first = before ? middle + 1 : first;
        end = before ? end : middle;
    }
    return first < p.n_own && own[order[first]] == t + 1 ? order[first] : -1;
}

/* The row of a tail that is token t's. */
TQI_D int tqi_row_of_token(const tqi_attention & p, int t) {
    return t < p.n_first ? p.n_recent + t : t - tqi_divide(t, p.n_recent, p.recent_inverse) * p.n_recent;
}

/* Without a batch: whether token t owns a row of K's or V's tail. Then tail.cuh attends to it, not this kernel. */
TQI_D bool tqi_owns_row(const tqi_attention & p, const tqi_task & task, int t) {
    const int row = tqi_row_of_token(p, t);
    return (p.k.tail.owner != NULL && p.k.tail.owner[task.kv_stream * p.k.tail.owner_stride + row] == t + 1) ||
           (p.v.tail.owner != NULL && p.v.tail.owner[task.kv_stream * p.v.tail.owner_stride + row] == t + 1);
}

/* In a batch: the first query row that does not read token t's row of a tail, 0 if it owns none. */
TQI_D int tqi_read_until(const tqi_attention & p, const tqi_task & task, const tqi_tail & x, int t) {
    if (x.owner == NULL) {
        return 0;
    }
    const int32_t * owners = x.owner + task.kv_stream * x.owner_stride;
    const int32_t * until = owners + p.n_recent + p.n_first + p.n_own;
    const int own = tqi_own_token(p, owners, t), row = tqi_row_of_token(p, t);
    return own >= 0 ? until[p.n_recent + p.n_first + own] : owners[row] == t + 1 ? until[row] : 0;
}

/* In a batch: the first query row for which this kernel, not tail.cuh, attends to token t. */
TQI_D int tqi_owned_until(const tqi_attention & p, const tqi_task & task, int t) {
    const int of_k = tqi_read_until(p, task, p.k.tail, t), of_v = tqi_read_until(p, task, p.v.tail, t);
    return of_k > of_v ? of_k : of_v;
}

/* The mask of this thread's tokens of the tile at t0; returns whether it lets any be seen. Keys that do not exist are
 * hidden, too, and what is hidden does not count, whatever it is. */
template <int NT>
TQI_D int tqi_load_mask(const tqi_attention & p, const tqi_task & task, const tqi_row & r, int t0, uint16_t * mask) {
    const int left = !r.valid ? 0 : (task.end - t0 < p.tile ? task.end - t0 : p.tile) - r.first;
    const uint16_t * from = (const uint16_t *) (const void *) r.mask + t0 + r.first;
    int seen = 0;
    if (!r.any) {
        return seen;
    }
    TQI_UNROLL
    for (int i = 0; i < 4 * NT; ++i) {
        mask[i] = i * r.step < left ? (r.mask == NULL ? (uint16_t) 0 : from[i * r.step])
                                    : (uint16_t) TQI_F16_NEGATIVE_INFINITY;
    }
    if (p.n_recent > 0) {
        TQI_UNROLL
        for (int i = 0; i < 4 * NT; ++i) {
            const int t = t0 + r.first + i * r.step;
            if (mask[i] != TQI_F16_NEGATIVE_INFINITY &&
                (p.n_own == 0 ? tqi_owns_row(p, task, t) : r.row < tqi_owned_until(p, task, t))) {
                mask[i] = TQI_F16_NEGATIVE_INFINITY;
            }
        }
    }
    TQI_UNROLL
    for (int i = 0; i < 4 * NT; ++i) {
        seen |= mask[i] != TQI_F16_NEGATIVE_INFINITY;
    }
    return seen;
}

/* Online softmax (Milakov and Gimelshein, arXiv:1805.02867): weights <- exp(score - largest), factors <- what earlier
 * results must be multiplied by. A vector that has seen no key yet gives zeros. */
template <int NT>
TQI_D void tqi_softmax(const tqi_attention & p, const tqi_buffers & w, const uint16_t * mask, tqi_row * r) {
    const float * s = w.scores + r->vec * tqi_scores_stride(p.tile);
    float x[4 * NT], top = r->max;
    if (!r->any) {
        return;
    }
    const float scale = w.scale[r->vec], slope = w.slope[r->vec];
    TQI_UNROLL
    for (int i = 0; i < 4 * NT; ++i) {
        x[i] = s[r->first + i * r->step] * scale; /* beyond a small tile, whatever is there */
    }
    if (p.softcap > 0.0f) {
        TQI_UNROLL
        for (int i = 0; i < 4 * NT; ++i) {
            x[i] = p.softcap * tanhf(x[i]);
        }
    }
    TQI_UNROLL
    for (int i = 0; i < 4 * NT; ++i) {
        x[i] = mask[i] != TQI_F16_NEGATIVE_INFINITY ? x[i] + slope * tqi_half_to_float(mask[i]) : -INFINITY;
        top = fmaxf(top, x[i]);
    }
    top = tqi_largest_of_lanes<1, 32 / NT>(top);
    const float factor = top == r->max ? 1.0f : tqi_exp(r->max - top);
    const float base = top == -INFINITY ? 0.0f : top; /* zeros, but NaN stays NaN */
    r->sum *= factor;
    TQI_UNROLL
    for (int i = 0; i < 4 * NT; ++i) {
        const int j = r->first + i * r->step;
        if (j < p.tile) {
            const uint16_t h = (uint16_t) tqi_half2(tqi_exp(x[i] - base) * TQI_WEIGHT, 0.0f);
            w.weights[r->vec * tqi_weights_stride(p.tile) + j] = h;
            r->sum += tqi_half_to_float(h);
        }
    }
    r->max = top;
    if (r->first == 0) {
        w.factors[r->vec] = factor;
    }
}

/* ---- Values ---- */

/* A warp's share of the output: 64 dimensions, and each n_parts-th 16 keys of a tile. */
struct tqi_share {
    int unit, part, n_parts;
    bool any;
};

TQI_D tqi_share tqi_share_of(const tqi_attention & p) {
    const int n_units = (p.v.n_blocks + 1) / 2, warp = tqi_thread() / 32;
    tqi_share s;
    s.n_parts = n_units == 1 ? 8 : n_units == 2 ? 4 : n_units <= 4 ? 2 : 1;
    s.unit = warp % n_units;
    s.part = warp / n_units;
    s.any = s.part < s.n_parts;
    return s;
}

/* Zeroes rows of f16 V that have no weight: they may hold infinities, which a weight of 0 does not cancel. */
TQI_D void tqi_drop_unseen(const tqi_attention & p, const tqi_task & task, const tqi_buffers & w, uint8_t * tile) {
    const int n_vec = p.n_vec - task.vec0 < 8 * p.n_tiles ? p.n_vec - task.vec0 : 8 * p.n_tiles;
    for (int j = tqi_thread(); j < p.tile; j += TQI_ATTENTION_THREADS) {
        uint32_t any = 0;
        for (int i = 0; i < n_vec; ++i) {
            any |= w.weights[i * tqi_weights_stride(p.tile) + j];
        }
        for (int i = 0; i < p.v.row_bytes / 4 && any == 0; ++i) {
            ((uint32_t *) (void *) (tile + j * p.v.stride_shared))[i] = 0;
        }
    }
}

/* o <- factors o + V^T weights; o[i][j]: the lane's part of dimensions n = 2 j, 2 j + 1 of its slice */
template <typename T, int NT>
TQI_D void tqi_accumulate(const tqi_attention & p, const tqi_buffers & w, const tqi_share & share, const uint8_t * tile,
                          float (*o)[4][4]) {
    const int lane = tqi_thread() % 32, g = lane / 4, t = lane % 4, ld = tqi_weights_stride(p.tile),
              stride = p.v.stride_shared;
    if (!share.any) {
        return;
    }
    TQI_UNROLL
    for (int i = 0; i < NT; ++i) {
        const float f0 = w.factors[8 * i + 2 * t], f1 = w.factors[8 * i + 2 * t + 1];
        TQI_UNROLL
        for (int j = 0; j < 4; ++j) {
            o[i][j][0] *= f0;
            o[i][j][1] *= f1;
            o[i][j][2] *= f0;
            o[i][j][3] *= f1;
        }
    }
    const int column = 2 * share.unit + g / 4;
    /* The last unit of an odd number of blocks is half empty. */
    const uint32_t keep = column < p.v.n_blocks ? 0xffffffffu : 0u;
    const auto parts = tqi_parts_of<T, 1>(keep ? column : 0, g % 4);
    TQI_NO_UNROLL
    for (int t0 = 16 * share.part; t0 < p.tile; t0 += 16 * share.n_parts) {
        uint32_t weights[NT][2];
        TQI_UNROLL
        for (int i = 0; i < NT; ++i) {
            const uint32_t * pairs = (const uint32_t *) (const void *) (w.weights + (8 * i + g) * ld + t0 + 2 * t);
            weights[i][0] = pairs[0];
            weights[i][1] = pairs[4];
        }
        tqi_multiply_values<T, NT, 1>(w.v_table, tile + (t0 + 2 * t) * stride, stride, parts, keep, weights, o);
    }
}

/* ---- Results ---- */

/* Adds the parts of the warps, in the memory that the tiles were in. */
template <int NT>
TQI_D void tqi_add_parts(const tqi_attention & p, const tqi_share & share, float (*o)[4][4], float * sums) {
    const int lane = tqi_thread() % 32, g = lane / 4, t = lane % 4, ld = tqi_sum_stride(p.v.n_blocks);
    float * mine = sums + 2 * t * ld + share.unit * 64 + g;
    for (int part = 0; part < share.n_parts; ++part) {
        if (share.any && share.part == part) {
            TQI_UNROLL
            for (int i = 0; i < 16 * NT && part > 0; ++i) {
                o[i / 16][i / 4 % 4][i % 4] += mine[(i / 16 * 8 + i % 2) * ld + 8 * (i / 2 % 8)];
            }
            TQI_UNROLL
            for (int i = 0; i < 16 * NT; ++i) {
                mine[(i / 16 * 8 + i % 2) * ld + 8 * (i / 2 % 8)] = o[i / 16][i / 4 % 4][i % 4];
            }
        }
        tqi_sync();
    }
}

/* Value lane of block b of a vector's sum. */
TQI_D float tqi_sum_of(const tqi_attention & p, const float * sums, int vec, int b, int lane) {
    const tqi_spot spot = tqi_spot_of(tqi_order_of(p.v.type), lane);
    return sums[vec * tqi_sum_stride(p.v.n_blocks) + (b / 2 * 8 + spot.n) * 8 + 4 * (b % 2) + spot.part];
}

/* Adds the sink; returns what the sum of weighted values must be multiplied by. */
TQI_HD float tqi_normalizer(const tqi_attention & p, int head, float max, float sum) {
    float factor = 1.0f;
    if (p.sinks != NULL) {
        const float sink = p.sinks[head], top = fmaxf(max, sink);
        factor = max == -INFINITY ? 0.0f : expf(max - top);
        sum = sum * factor + (sink == -INFINITY ? 0.0f : expf(sink - top) * TQI_WEIGHT);
    }
    return (sum == 0.0f ? 0.0f : factor / sum) * (p.v.is_pqo ? 1.0f / tqi_pqo3::unit() : 1.0f);
}

/* Which of all parts this block of threads finds of a vector. */
TQI_D int64_t tqi_part_of(const tqi_attention & p, const tqi_task & task, int vec) {
    return (((int64_t) task.stream * p.n_head_kv + task.kv_head) * p.n_vec + vec) * p.n_parts + task.split;
}

/* Where a vector's output goes. */
TQI_D float * tqi_output_of(const tqi_attention & p, const tqi_task & task, int vec) {
    const int row = tqi_row_of_vector(p, vec), head = tqi_head_of_vector(p, task, vec, row);
    return (float *) (void *) (p.out + task.stream * p.out_stride_stream + (int64_t) row * p.out_stride_row +
                               (int64_t) head * p.out_stride_head);
}

/* Writes block b of a vector, of which this lane has value o; all lanes of the warp. */
TQI_D void tqi_write_output(const tqi_attention & p, const tqi_task & task, int vec, int b, float o) {
    const int lane = tqi_thread() % 32;
    if (p.v.is_pqo) {
        o = tqi_transform_warp(!p.v.signs_first, o, lane);
    }
    tqi_output_of(p, task, vec)[b * TQ_BLOCK + lane] = o;
}

/* ---- One range of keys ---- */

/* Scores, weights, and what they find of V, for a tile of which some key counts. */
template <int NT>
TQI_D void tqi_attend_tile(const tqi_attention & p, const tqi_task & task, const tqi_buffers & w,
                           const tqi_share & share, uint8_t * k_tile, uint8_t * v_tile, const uint16_t * mask,
                           tqi_row * row, float (*o)[4][4]) {
    tqi_with_type(p.k.type, [&](auto type) { tqi_scores<decltype(type), NT>(p, w, k_tile); });
    tqi_sync();
    tqi_softmax<NT>(p, w, mask, row);
    tqi_sync();
    if (p.v.type == TQ_TYPE_F16) {
        tqi_drop_unseen(p, task, w, v_tile);
        tqi_sync();
    }
    tqi_with_type(p.v.type, [&](auto type) { tqi_accumulate<decltype(type), NT>(p, w, share, v_tile, o); });
}

/* Writes the sums of all vectors: the output, or where there are more parts, this one. */
TQI_D void tqi_write_sums(const tqi_attention & p, const tqi_task & task, const tqi_buffers & w, int n_vec,
                          const float * sums) {
    const int lane = tqi_thread() % 32, n_blocks = p.v.n_blocks, dv = n_blocks * TQ_BLOCK;
    for (int i = tqi_thread() / 32; i < n_vec * n_blocks; i += TQI_WARPS) {
        const int vec = i / n_blocks, b = i % n_blocks;
        if (task.vec0 + vec >= p.n_vec) {
            break;
        }
        const float x = tqi_sum_of(p, sums, vec, b, lane);
        if (p.n_parts == 1) {
            const int head = tqi_head_of_vector(p, task, task.vec0 + vec, tqi_row_of_vector(p, task.vec0 + vec));
            tqi_write_output(p, task, task.vec0 + vec, b, x * tqi_normalizer(p, head, w.max[vec], w.sum[vec]));
        } else {
            const int64_t at = tqi_part_of(p, task, task.vec0 + vec);
            p.partials[at * dv + b * TQ_BLOCK + lane] = x;
            if (b == 0 && lane < 2) {
                p.stats[2 * at + lane] = lane == 0 ? w.max[vec] : w.sum[vec];
            }
        }
    }
}

template <int NT> TQI_D void tqi_attend(const tqi_attention & p, unsigned char * shared) {
    const tqi_task task = tqi_task_of(p, 8 * NT);
    const tqi_buffers w = tqi_carve(p, shared);
    const tqi_share share = tqi_share_of(p);
    const int k_lead = tqi_lead(p.k, task), v_lead = tqi_lead(p.v, task);
    float o[NT][4][4];

    tqi_loader loaders[2] = { tqi_loader_of(p.k, task, tqi_thread(), task.begin, 0),
                              tqi_loader_of(p.v, task, tqi_thread(), task.begin, p.at.v_in_stage) };
    if (task.begin < task.end) {
        tqi_load_tile(p, task, loaders, task.begin, w.stages);
    }
    tqi_with_type(p.k.type, [&](auto type) { tqi_fill_table<decltype(type)>(p.k.levels, w.k_table); });
    if (!p.one_table) {
        tqi_with_type(p.v.type, [&](auto type) { tqi_fill_table<decltype(type)>(p.v.levels, w.v_table); });
    }
    tqi_with_type(p.k.type, [&](auto type) { tqi_load_queries<decltype(type), 0>(p, task, w.q, w.scale, w.slope); });
    tqi_sync();
    tqi_row row = tqi_row_of(p, task, NT);
    TQI_UNROLL
    for (int i = 0; i < 16 * NT; ++i) {
        o[i / 16][i / 4 % 4][i % 4] = 0.0f;
    }

    int stage = 0;
    TQI_NO_UNROLL
    for (int t0 = task.begin; t0 < task.end; t0 += p.tile) {
        uint8_t * const k_tile = w.stages + stage * p.at.stage_bytes + k_lead;
        uint8_t * const v_tile = w.stages + stage * p.at.stage_bytes + p.at.v_in_stage + v_lead;
        const bool more = t0 + p.tile < task.end;
        uint16_t mask[4 * NT];
        const int any = tqi_load_mask<NT>(p, task, row, t0, mask);
        tqi_copy_wait<0>();
        const int seen = tqi_sync_or(any); /* the tile is there, and the one before it is done with */
        if (more && p.n_stages == 2) {
            stage ^= 1;
            tqi_load_tile(p, task, loaders, t0 + p.tile, w.stages + stage * p.at.stage_bytes);
        }
        if (seen) {
            tqi_attend_tile<NT>(p, task, w, share, k_tile, v_tile, mask, &row, o);
        }
        if (more && p.n_stages == 1) {
            tqi_sync();
            tqi_load_tile(p, task, loaders, t0 + p.tile, w.stages);
        }
    }

    row.sum = tqi_add_lanes<1, 32 / NT>(row.sum);
    tqi_sync();
    if (row.first == 0) {
        w.max[row.vec] = row.max;
        w.sum[row.vec] = row.sum;
    }
    float * sums = (float *) (void *) w.stages;
    tqi_add_parts<NT>(p, share, o, sums);
    tqi_write_sums(p, task, w, 8 * NT, sums);
}

/* ---- Merging ---- */

/* Merges the ranges of one query vector: block (vector, KV head, stream). shared: (n_parts) floats. */
TQI_D void tqi_merge_splits(const tqi_attention & p, unsigned char * shared) {
    float * factors = (float *) (void *) shared;
    const int lane = tqi_thread() % 32, warp = tqi_thread() / 32, vec = tqi_block_x(), dv = p.v.n_blocks * TQ_BLOCK;
    tqi_task task;
    float max = -INFINITY, sum = 0.0f;
    task.stream = tqi_block_z();
    task.kv_head = tqi_block_y();
    task.split = 0;
    const int64_t first = tqi_part_of(p, task, vec);
    const float * stats = p.stats + 2 * first;
    for (int s = lane; s < p.n_parts; s += 32) {
        max = fmaxf(max, stats[2 * s]);
    }
    max = tqi_largest_of_lanes<1, 32>(max);
    for (int s = lane; s < p.n_parts; s += 32) {
        const bool empty = stats[2 * s] == -INFINITY && stats[2 * s + 1] == 0.0f; /* no key seen */
        const float factor = empty ? 0.0f : tqi_exp(stats[2 * s] - max);
        sum += empty ? 0.0f : factor * stats[2 * s + 1];
        if (warp == 0) {
            factors[s] = factor;
        }
    }
    sum = tqi_add_lanes<1, 32>(sum);
    tqi_sync();
    const float scale = tqi_normalizer(p, tqi_head_of_vector(p, task, vec, tqi_row_of_vector(p, vec)), max, sum);
    for (int b = warp; b < p.v.n_blocks; b += TQI_MERGE_THREADS / 32) {
        const float * from = p.partials + first * dv + b * TQ_BLOCK + lane;
        float x = 0.0f;
        TQI_UNROLL_BY(8) /* as many loads on their way at once */
        for (int s = 0; s < p.n_parts; ++s) {
            x += factors[s] * from[(int64_t) s * dv];
        }
        tqi_write_output(p, task, vec, b, x * scale);
    }
}

#endif
