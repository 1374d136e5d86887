/* attention.cuh: fused attention over compressed K and V for few query vectors, on tensor cores: every pair of types and every
 * head size. attention_warp.cuh does the same faster for those that decoding mostly has, and takes from here what is no loop.
 *
 * As on the CPU (attention.c) everything happens in the transformed domain: q is transformed once, V is accumulated
 * transformed, the inverse transform runs once on the output. A block of 256 threads takes a range of keys of one KV head,
 * and up to 16 query vectors of it, so that each K and V block is decoded once for the whole group. Ranges are merged by a
 * second kernel (as in Flash-Decoding).
 *
 * Per tile of up to 128 keys:
 *   scores      Warp w takes 16 keys: S = K q, m16n8k16, keys down, query vectors across. Products of one K block are summed
 *               by the tensor core and multiplied by its scale afterwards, in f32: K's scale never meets f16.
 *   softmax     online, by row of scores; weights become f16, and the sum adds up what they were rounded to
 *   accumulate  Warp w takes 64 dimensions and a part of the keys: O = V^T P, dimensions down, query vectors across
 * The query vectors fill eight columns of a tensor-core tile even if there is one of them only: multiplying costs less than
 * decoding either way, about 1 of 8 us at 32k tokens of 8 heads of 128 (docs/cuda.md).
 *
 * Largest score and weights are per query vector, relative to which f16 has enough range: q is brought to 64..128 by a power of
 * two, weights are multiplied by WEIGHT, levels by UNIT (slices.cuh); the output divides by the sum, in the same units.
 *
 * All functions are called by every thread of the block unless they say otherwise. g = lane / 4 and t = lane % 4 are the row
 * and column of a lane in a tensor-core fragment (tq_mma). */
#ifndef TQ_ATTENTION_CUH
#define TQ_ATTENTION_CUH

#include "products.cuh"
#include "tiles.cuh"
#include "transform.cuh"

#define TQ_WEIGHT 1024.0f
#define TQ_F16_NEGATIVE_INFINITY 0xfc00u

/* What a thread knows of the query vector whose softmax it helps with. */
struct tq_row {
    int vec;   /* of the block's 8 or 16 */
    int first; /* of its tokens in a tile; the others are step further on each */
    int step;
    bool valid;
    bool any; /* whether the warp has a vector: what columns without one hold, nobody looks at */
    const uint8_t * mask;
    float max, sum; /* sum: of this thread's tokens alone, in units of WEIGHT */
};

struct tq_buffers {
    uint32_t *k_table, *v_table;
    tq_quad * q;                      /* (n_tiles, n_blocks of K, 32 lanes): fragments */
    float * scores;                   /* (vectors, tile + 4) */
    uint16_t * weights;               /* (vectors, tile + 8), f16 */
    float * factors;                  /* (vectors): what earlier results are multiplied by; then more such arrays: */
    float *max, *sum, *scale, *slope; /* at the end; a score is scale * what scores() finds, and slope * mask */
    uint8_t * stages;
};

TQ_D tq_buffers tq_carve(const tq_attention & p, unsigned char * shared) {
    tq_buffers w;
    w.k_table = (uint32_t *) (void *) shared;
    w.v_table = (uint32_t *) (void *) (shared + p.at_v_table);
    w.q = (tq_quad *) (void *) (shared + p.at_q);
    w.scores = (float *) (void *) (shared + p.at_scores);
    w.weights = (uint16_t *) (void *) (shared + p.at_weights);
    w.factors = (float *) (void *) (shared + p.at_vectors);
    w.max = w.factors + 8 * p.n_tiles;
    w.sum = w.max + 8 * p.n_tiles;
    w.scale = w.sum + 8 * p.n_tiles;
    w.slope = w.scale + 8 * p.n_tiles;
    w.stages = shared + p.at_stages;
    return w;
}

/* ---- Queries ---- */

/* The row of q that a query vector is of, and the head. */
TQ_D int tq_row_of_vector(const tq_attention & p, int vec) {
    return tq_divide(vec, p.group, p.group_inverse);
}
TQ_D int tq_head_of_vector(const tq_attention & p, const tq_task & k, int vec, int row) {
    return k.kv_head * p.group + vec - row * p.group;
}

/* A power of two that brings |x| = amax to 64..128, and its inverse. */
TQ_HD float tq_power_for(float amax, float * inverse) {
    int e = (int) (tq_float_bits(amax) >> 23 & 255u) - 127;
    e = e < -100 ? -100 : e;
    *inverse = tq_bits_float((uint32_t) (127 + e - 6) << 23);
    return tq_bits_float((uint32_t) (127 + 6 - e) << 23);
}

/* ALiBi: Press et al., arXiv:2108.12409, extended to head counts that are no power of two as llama.cpp does. */
TQ_HD float tq_slope(const tq_attention & p, int head) {
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

/* Writes the q fragments and, for each query vector, scale and slope; zeros where there is no vector. A warp takes a vector. */
template <typename T, int BLOCKS>
TQ_D void tq_load_queries(const tq_attention & p, const tq_task & k, tq_quad * fragments, float * scale,
                          float * slope) {
    const int lane = tq_thread() % 32, l = lane % TQ_TEAM, team = lane / TQ_TEAM;
    const int n_blocks = BLOCKS > 0 ? BLOCKS : p.k.n_blocks, last = (n_blocks + 3) / 4 * 4; /* all lanes exchange */
    const bool trellis = T::dim(0, 2) != 2;
    const tq_spot spot = tq_spot_of(trellis, l);
    uint16_t * halves = (uint16_t *) (void *) fragments;
    for (int i = tq_thread() / 32; i < 8 * p.n_tiles; i += TQ_WARPS) {
        const bool valid = k.vec0 + i < p.n_vec;
        const int vec = valid ? k.vec0 + i : 0, row = tq_row_of_vector(p, vec),
                  head = tq_head_of_vector(p, k, vec, row);
        const float * q =
            (const float *) (const void *) (p.q + k.stream * p.q_stride_stream + (int64_t) head * p.q_stride_head +
                                            (int64_t) row * p.q_stride_row);
        float amax = 0.0f, inverse = 0.0f;
        for (int b = team; b < last; b += 4) {
            TQ_UNROLL
            for (int m = 0; m < TQ_VALUES; ++m) {
                amax = fmaxf(amax, b < n_blocks ? fabsf(q[b * TQ_BLOCK + l + TQ_TEAM * m]) : 0.0f);
            }
        }
        TQ_UNROLL
        for (int h = 1; h < 32; h *= 2) {
            amax = fmaxf(amax, tq_exchange(amax, h));
        }
        const float power = valid ? tq_power_for(amax, &inverse) : 0.0f;
        for (int b = team; b < last; b += 4) { /* four blocks at once */
            float x[TQ_VALUES];
            TQ_UNROLL
            for (int m = 0; m < TQ_VALUES; ++m) {
                x[m] = b < n_blocks ? q[b * TQ_BLOCK + l + TQ_TEAM * m] * power : 0.0f;
            }
            if (p.k.ours) {
                tq_transform(p.k.signs_first, x, l);
            }
            uint16_t * to = halves + (((i / 8) * n_blocks + b) * 32 + 4 * (i % 8) + spot.part) * 8 + spot.n;
            TQ_UNROLL
            for (int m = 0; m < TQ_VALUES && b < n_blocks; ++m) {
                to[m * (trellis ? 2 : 8)] = (uint16_t) tq_half2(x[m], 0.0f); /* value l + 8 m */
            }
        }
        if (lane == 0) {
            scale[i] = inverse * p.scale / T::unit();
            slope[i] = tq_slope(p, head);
        }
    }
}

/* ---- Scores ---- */

template <typename T, int NT> TQ_D void tq_scores(const tq_attention & p, const tq_buffers & w, const uint8_t * tile) {
    const int lane = tq_thread() % 32, warp = tq_thread() / 32, g = lane / 4, t = lane % 4, ld = p.tile + 4;
    float sum[NT][4];
    if (16 * warp >= p.tile) {
        return;
    }
    const auto q = [&](int b, int i) { return w.q[(i * p.k.n_blocks + b) * 32 + lane]; };
    const int stride = p.k.stride_shared;
    tq_multiply_keys<T, NT, 0>(w.k_table, tile + (16 * warp + g) * stride, stride, T::place_of(t), p.k.n_blocks, q,
                               sum);
    TQ_UNROLL
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
TQ_D const uint8_t * tq_mask_of(const tq_attention & p, const tq_task & k, int vec) {
    if (p.mask == NULL) {
        return NULL;
    }
    const int row = tq_row_of_vector(p, vec), head = tq_head_of_vector(p, k, vec, row);
    const uint8_t * mask = p.mask + (int64_t) row * p.mask_stride_row;
    mask += p.n_mask_head > 1 ? (int64_t) (head % p.n_mask_head) * p.mask_stride_head : 0;
    mask += p.n_mask_stream > 1 ? (int64_t) (k.stream % p.n_mask_stream) * p.mask_stride_stream : 0;
    return mask;
}

TQ_D tq_row tq_row_of(const tq_attention & p, const tq_task & k, int n_tiles) {
    tq_row r;
    r.step = 32 / n_tiles;
    r.vec = tq_thread() / r.step;
    r.first = tq_thread() % r.step;
    r.valid = k.vec0 + r.vec < p.n_vec;
    r.any = k.vec0 + tq_thread() / 32 * n_tiles < p.n_vec;
    r.mask = tq_mask_of(p, k, r.valid ? k.vec0 + r.vec : 0);
    r.max = -INFINITY;
    r.sum = 0.0f;
    return r;
}

/* Whether token t owns a row of K's or V's precise tail: then tail.cuh attends to it, not this kernel. */
TQ_D bool tq_owns_row(const tq_attention & p, const tq_task & k, int t) {
    const int row = t < p.n_first ? p.n_recent + t : t - tq_divide(t, p.n_recent, p.recent_inverse) * p.n_recent;
    return (p.k.tail.owner != NULL && p.k.tail.owner[k.kv_stream * p.k.tail.owner_stride + row] == t + 1) ||
           (p.v.tail.owner != NULL && p.v.tail.owner[k.kv_stream * p.v.tail.owner_stride + row] == t + 1);
}

/* The mask of this thread's tokens of the tile at t0; returns whether it lets any be seen. Keys that do not exist are hidden,
 * too, and what is hidden does not count, whatever it is. */
template <int NT>
TQ_D int tq_load_mask(const tq_attention & p, const tq_task & k, const tq_row & r, int t0, uint16_t * mask) {
    const int left = !r.valid ? 0 : (k.end - t0 < p.tile ? k.end - t0 : p.tile) - r.first;
    const uint16_t * from = (const uint16_t *) (const void *) r.mask + t0 + r.first;
    int seen = 0;
    if (!r.any) {
        return seen;
    }
    TQ_UNROLL
    for (int i = 0; i < 4 * NT; ++i) {
        mask[i] = i * r.step < left ? (r.mask == NULL ? (uint16_t) 0 : from[i * r.step])
                                    : (uint16_t) TQ_F16_NEGATIVE_INFINITY;
    }
    if (p.n_recent > 0) {
        TQ_UNROLL
        for (int i = 0; i < 4 * NT; ++i) {
            if (mask[i] != TQ_F16_NEGATIVE_INFINITY && tq_owns_row(p, k, t0 + r.first + i * r.step)) {
                mask[i] = TQ_F16_NEGATIVE_INFINITY;
            }
        }
    }
    TQ_UNROLL
    for (int i = 0; i < 4 * NT; ++i) {
        seen |= mask[i] != TQ_F16_NEGATIVE_INFINITY;
    }
    return seen;
}

/* Online softmax (Milakov and Gimelshein, arXiv:1805.02867): weights <- exp(score - largest), factors <- what earlier results
 * must be multiplied by. A vector that has seen no key yet gives zeros. */
template <int NT>
TQ_D void tq_softmax(const tq_attention & p, const tq_buffers & w, const uint16_t * mask, tq_row * r) {
    const float * s = w.scores + r->vec * (p.tile + 4);
    float x[4 * NT], top = r->max;
    if (!r->any) {
        return;
    }
    const float scale = w.scale[r->vec], slope = w.slope[r->vec];
    TQ_UNROLL
    for (int i = 0; i < 4 * NT; ++i) {
        x[i] = s[r->first + i * r->step] * scale; /* beyond a small tile, whatever is there */
    }
    if (p.softcap > 0.0f) {
        TQ_UNROLL
        for (int i = 0; i < 4 * NT; ++i) {
            x[i] = p.softcap * tanhf(x[i]);
        }
    }
    TQ_UNROLL
    for (int i = 0; i < 4 * NT; ++i) {
        x[i] = mask[i] != TQ_F16_NEGATIVE_INFINITY ? x[i] + slope * tq_half_to_float(mask[i]) : -INFINITY;
        top = fmaxf(top, x[i]);
    }
    TQ_UNROLL
    for (int h = 1; h < 32 / NT; h *= 2) {
        top = fmaxf(top, tq_exchange(top, h));
    }
    const float factor = top == r->max ? 1.0f : tq_exp(r->max - top);
    const float base = top == -INFINITY ? 0.0f : top; /* zeros, but NaN stays NaN */
    r->sum *= factor;
    TQ_UNROLL
    for (int i = 0; i < 4 * NT; ++i) {
        const int j = r->first + i * r->step;
        if (j < p.tile) {
            const uint16_t h = (uint16_t) tq_half2(tq_exp(x[i] - base) * TQ_WEIGHT, 0.0f);
            w.weights[r->vec * (p.tile + 8) + j] = h;
            r->sum += tq_half_to_float(h);
        }
    }
    r->max = top;
    if (r->first == 0) {
        w.factors[r->vec] = factor;
    }
}

/* ---- Values ---- */

/* A warp's share of the output: 64 dimensions, and each n_parts-th 16 keys of a tile. */
struct tq_share {
    int unit, part, n_parts;
    bool any;
};

TQ_D tq_share tq_share_of(const tq_attention & p) {
    const int n_units = (p.v.n_blocks + 1) / 2, warp = tq_thread() / 32;
    tq_share s;
    s.n_parts = n_units == 1 ? 8 : n_units == 2 ? 4 : n_units <= 4 ? 2 : 1;
    s.unit = warp % n_units;
    s.part = warp / n_units;
    s.any = s.part < s.n_parts;
    return s;
}

/* Zeroes rows of f16 V that have no weight: they may hold infinities, which a weight of 0 does not cancel. */
TQ_D void tq_drop_unseen(const tq_attention & p, const tq_task & k, const tq_buffers & w, uint8_t * tile) {
    const int n_vec = p.n_vec - k.vec0 < 8 * p.n_tiles ? p.n_vec - k.vec0 : 8 * p.n_tiles;
    for (int j = tq_thread(); j < p.tile; j += TQ_ATTENTION_THREADS) {
        uint32_t any = 0;
        for (int i = 0; i < n_vec; ++i) {
            any |= w.weights[i * (p.tile + 8) + j];
        }
        for (int i = 0; i < p.v.row_bytes / 4 && any == 0; ++i) {
            ((uint32_t *) (void *) (tile + j * p.v.stride_shared))[i] = 0;
        }
    }
}

/* o <- factors o + V^T weights; o[i][j]: the lane's part of dimensions n = 2 j, 2 j + 1 of its slice */
template <typename T, int NT>
TQ_D void tq_accumulate(const tq_attention & p, const tq_buffers & w, const tq_share & share, const uint8_t * tile,
                        float (*o)[4][4]) {
    const int lane = tq_thread() % 32, g = lane / 4, t = lane % 4, ld = p.tile + 8, stride = p.v.stride_shared;
    if (!share.any) {
        return;
    }
    TQ_UNROLL
    for (int i = 0; i < NT; ++i) {
        const float f0 = w.factors[8 * i + 2 * t], f1 = w.factors[8 * i + 2 * t + 1];
        TQ_UNROLL
        for (int j = 0; j < 4; ++j) {
            o[i][j][0] *= f0;
            o[i][j][1] *= f1;
            o[i][j][2] *= f0;
            o[i][j][3] *= f1;
        }
    }
    const int column = 2 * share.unit + g / 4;
    const uint32_t keep =
        column < p.v.n_blocks ? 0xffffffffu : 0u; /* the last unit of an odd number of blocks is half empty */
    const auto parts = tq_parts_of<T, 1>(keep ? column : 0, g % 4);
    TQ_NO_UNROLL
    for (int t0 = 16 * share.part; t0 < p.tile; t0 += 16 * share.n_parts) {
        uint32_t weights[NT][2];
        TQ_UNROLL
        for (int i = 0; i < NT; ++i) {
            const uint32_t * pairs = (const uint32_t *) (const void *) (w.weights + (8 * i + g) * ld + t0 + 2 * t);
            weights[i][0] = pairs[0];
            weights[i][1] = pairs[4];
        }
        tq_multiply_values<T, NT, 1>(w.v_table, tile + (t0 + 2 * t) * stride, stride, parts, keep, weights, o);
    }
}

/* ---- Results ---- */

/* Adds the parts of the warps, in the memory that the tiles were in. */
template <int NT>
TQ_D void tq_add_parts(const tq_attention & p, const tq_share & share, float (*o)[4][4], float * sums) {
    const int lane = tq_thread() % 32, g = lane / 4, t = lane % 4, ld = tq_sum_stride(p.v.n_blocks);
    float * mine = sums + 2 * t * ld + share.unit * 64 + g;
    for (int part = 0; part < share.n_parts; ++part) {
        if (share.any && share.part == part) {
            TQ_UNROLL
            for (int i = 0; i < 16 * NT && part > 0; ++i) {
                o[i / 16][i / 4 % 4][i % 4] += mine[(i / 16 * 8 + i % 2) * ld + 8 * (i / 2 % 8)];
            }
            TQ_UNROLL
            for (int i = 0; i < 16 * NT; ++i) {
                mine[(i / 16 * 8 + i % 2) * ld + 8 * (i / 2 % 8)] = o[i / 16][i / 4 % 4][i % 4];
            }
        }
        tq_sync();
    }
}

/* Value lane of block b of a vector's sum. */
TQ_D float tq_sum_of(const tq_attention & p, const float * sums, int vec, int b, int lane) {
    const tq_spot spot = tq_spot_of(tq_is_trellis(p.v.type), lane);
    return sums[vec * tq_sum_stride(p.v.n_blocks) + (b / 2 * 8 + spot.n) * 8 + 4 * (b % 2) + spot.part];
}

/* Adds the sink; returns what the sum of weighted values must be multiplied by. */
TQ_HD float tq_normalizer(const tq_attention & p, int head, float max, float sum) {
    float factor = 1.0f;
    if (p.sinks != NULL) {
        const float sink = p.sinks[head], top = fmaxf(max, sink);
        factor = max == -INFINITY ? 0.0f : expf(max - top);
        sum = sum * factor + (sink == -INFINITY ? 0.0f : expf(sink - top) * TQ_WEIGHT);
    }
    return (sum == 0.0f ? 0.0f : factor / sum) * (p.v.ours ? 1.0f / tq_pqo3::unit() : 1.0f);
}

/* Which of all parts this block of threads finds of a vector. */
TQ_D int64_t tq_part_of(const tq_attention & p, const tq_task & k, int vec) {
    return (((int64_t) k.stream * p.n_head_kv + k.kv_head) * p.n_vec + vec) * p.n_parts + k.split;
}

/* Where a vector's output goes. */
TQ_D float * tq_output_of(const tq_attention & p, const tq_task & k, int vec) {
    const int row = tq_row_of_vector(p, vec), head = tq_head_of_vector(p, k, vec, row);
    return (float *) (void *) (p.out + k.stream * p.out_stride_stream + (int64_t) row * p.out_stride_row +
                               (int64_t) head * p.out_stride_head);
}

/* Writes block b of a vector, of which this lane has value o; all lanes of the warp. */
TQ_D void tq_write_output(const tq_attention & p, const tq_task & k, int vec, int b, float o) {
    const int lane = tq_thread() % 32;
    if (p.v.ours) {
        o = tq_transform_warp(!p.v.signs_first, o, lane);
    }
    tq_output_of(p, k, vec)[b * TQ_BLOCK + lane] = o;
}

/* One range of keys, from beginning to end. */
template <int NT> TQ_D void tq_attend(const tq_attention & p, unsigned char * shared) {
    const tq_task k = tq_task_of(p);
    const tq_buffers w = tq_carve(p, shared);
    const tq_share share = tq_share_of(p);
    const int lane = tq_thread() % 32, warp = tq_thread() / 32;
    const int k_lead = tq_lead(p.k, k), v_lead = tq_lead(p.v, k);
    float o[NT][4][4];

    tq_loader loaders[2] = { tq_loader_of(p.k, k, tq_thread(), k.begin, 0),
                             tq_loader_of(p.v, k, tq_thread(), k.begin, p.v_in_stage) };
    if (k.begin < k.end) {
        tq_load_tile(p, k, loaders, k.begin, w.stages);
    }
    TQ_WITH_TYPE(p.k.type, tq_fill_table<TQ>(p.k.levels, w.k_table));
    if (!p.one_table) {
        TQ_WITH_TYPE(p.v.type, tq_fill_table<TQ>(p.v.levels, w.v_table));
    }
    TQ_WITH_TYPE(p.k.type, (tq_load_queries<TQ, 0>(p, k, w.q, w.scale, w.slope)));
    tq_sync();
    tq_row row = tq_row_of(p, k, NT);
    TQ_UNROLL
    for (int i = 0; i < NT; ++i) {
        TQ_UNROLL
        for (int j = 0; j < 4; ++j) {
            o[i][j][0] = o[i][j][1] = o[i][j][2] = o[i][j][3] = 0.0f;
        }
    }

    int stage = 0;
    TQ_NO_UNROLL
    for (int t0 = k.begin; t0 < k.end; t0 += p.tile) {
        uint8_t * const k_tile = w.stages + stage * p.stage_bytes + k_lead;
        uint8_t * const v_tile = w.stages + stage * p.stage_bytes + p.v_in_stage + v_lead;
        const bool more = t0 + p.tile < k.end;
        uint16_t mask[4 * NT];
        const int any = tq_load_mask<NT>(p, k, row, t0, mask);
        tq_copy_wait<0>();
        const int seen = tq_sync_or(any); /* the tile is there, and the one before it is done with */
        if (more && p.n_stages == 2) {
            stage ^= 1;
            tq_load_tile(p, k, loaders, t0 + p.tile, w.stages + stage * p.stage_bytes);
        }
        if (seen) {
            TQ_WITH_TYPE(p.k.type, (tq_scores<TQ, NT>(p, w, k_tile)));
            tq_sync();
            tq_softmax<NT>(p, w, mask, &row);
            tq_sync();
            if (!p.v.ours) {
                tq_drop_unseen(p, k, w, v_tile);
                tq_sync();
            }
            TQ_WITH_TYPE(p.v.type, (tq_accumulate<TQ, NT>(p, w, share, v_tile, o)));
        }
        if (more && p.n_stages == 1) {
            tq_sync();
            tq_load_tile(p, k, loaders, t0 + p.tile, w.stages);
        }
    }

    TQ_UNROLL
    for (int h = 1; h < 32 / NT; h *= 2) {
        row.sum += tq_exchange(row.sum, h);
    }
    const int n = 8 * NT, n_blocks = p.v.n_blocks, dv = n_blocks * TQ_BLOCK;
    float * sums = (float *) (void *) w.stages;
    tq_sync();
    if (row.first == 0) {
        w.max[row.vec] = row.max;
        w.sum[row.vec] = row.sum;
    }
    tq_add_parts<NT>(p, share, o, sums);
    for (int i = warp; i < n * n_blocks; i += TQ_WARPS) {
        const int vec = i / n_blocks, b = i % n_blocks;
        if (k.vec0 + vec >= p.n_vec) {
            break;
        }
        const float x = tq_sum_of(p, sums, vec, b, lane);
        if (p.n_parts == 1) {
            const int head = tq_head_of_vector(p, k, k.vec0 + vec, tq_row_of_vector(p, k.vec0 + vec));
            tq_write_output(p, k, k.vec0 + vec, b, x * tq_normalizer(p, head, w.max[vec], w.sum[vec]));
        } else {
            const int64_t at = tq_part_of(p, k, k.vec0 + vec);
            p.partials[at * dv + b * TQ_BLOCK + lane] = x;
            if (b == 0 && lane < 2) {
                p.stats[2 * at + lane] = lane == 0 ? w.max[vec] : w.sum[vec];
            }
        }
    }
}

/* Merges the ranges of one query vector: block (vector, KV head, stream). shared: (n_parts) floats. */
TQ_D void tq_merge_splits(const tq_attention & p, unsigned char * shared) {
    float * factors = (float *) (void *) shared;
    const int lane = tq_thread() % 32, warp = tq_thread() / 32, vec = tq_block_x(), dv = p.v.n_blocks * TQ_BLOCK;
    tq_task k;
    float max = -INFINITY, sum = 0.0f;
    k.stream = tq_block_z();
    k.kv_head = tq_block_y();
    const int64_t first = (((int64_t) k.stream * p.n_head_kv + k.kv_head) * p.n_vec + vec) * p.n_parts;
    const float * stats = p.stats + 2 * first;
    for (int s = lane; s < p.n_parts; s += 32) {
        max = fmaxf(max, stats[2 * s]);
    }
    TQ_UNROLL
    for (int h = 1; h < 32; h *= 2) {
        max = fmaxf(max, tq_exchange(max, h));
    }
    for (int s = lane; s < p.n_parts; s += 32) {
        const bool empty = stats[2 * s] == -INFINITY && stats[2 * s + 1] == 0.0f; /* no key seen */
        const float factor = empty ? 0.0f : tq_exp(stats[2 * s] - max);
        sum += empty ? 0.0f : factor * stats[2 * s + 1];
        if (warp == 0) {
            factors[s] = factor;
        }
    }
    TQ_UNROLL
    for (int h = 1; h < 32; h *= 2) {
        sum += tq_exchange(sum, h);
    }
    tq_sync();
    const float scale = tq_normalizer(p, tq_head_of_vector(p, k, vec, tq_row_of_vector(p, vec)), max, sum);
    for (int b = warp; b < p.v.n_blocks; b += TQ_MERGE_THREADS / 32) {
        const float * from = p.partials + first * dv + b * TQ_BLOCK + lane;
        float x = 0.0f;
        TQ_UNROLL_BY(8) /* as many loads on their way at once */
        for (int s = 0; s < p.n_parts; ++s) {
            x += factors[s] * from[(int64_t) s * dv];
        }
        tq_write_output(p, k, vec, b, x * scale);
    }
}

#endif
