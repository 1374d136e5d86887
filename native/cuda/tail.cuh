/* tail.cuh: attention to the tokens that own a row of a precise tail (tq_attn_tail in tqgguf.h): further parts for
 * tqi_merge_kernel, beside those of attention.cuh, which hides these tokens.
 *
 * They are few, a few hundred of many thousand, and their rows are f16 in the transformed domain, so plain f32
 * arithmetic does, and the kernel that everything depends on stays as it is. A block of 128 threads takes 32 rows of
 * one KV head and eight query vectors. K and V of a token may lie in different places: a context shift disowns K alone,
 * and V may be of f16 without a tail.
 *
 * Functions are called by every thread of the block. */
#ifndef TQI_TAIL_CUH
#define TQI_TAIL_CUH

#include "attention.cuh"

#define TQI_TAIL_WARPS (TQI_TAIL_ATTENTION_THREADS / 32)

/* Shared memory, and where the block works. */
struct tqi_tail_work {
    int * tokens;
    int * owned;
    int * until;
    float * weights;
    float * q;
    int row0, n_vec; /* its first row, and how many query vectors it has */
};

/* One value of a token: from the tail if row is not negative, from its blocks, or from f16. tqgguf's types are left
 * transformed. */
TQI_D float tqi_token_value(const tqi_operand & x, const tqi_task & task, int token, int row, int i) {
    if (row >= 0) {
        const uint8_t * from = x.tail.data + task.kv_stream * x.tail.stride_stream + row * x.tail.stride_row +
                               task.kv_head * x.tail.stride_head;
        return tqi_half_to_float(((const uint16_t *) (const void *) from)[i]);
    }
    const uint8_t * from =
        x.data + task.kv_stream * x.stride_stream + task.kv_head * x.stride_head + token * x.stride_token;
    if (x.type == TQ_TYPE_F16) {
        return tqi_half_to_float(((const uint16_t *) (const void *) from)[i]);
    }
    const bool trellis = tqi_is_trellis(x.type);
    const int bits = tqi_bits_of(x.type), n = i % TQ_BLOCK;
    const uint8_t * block = from + i / TQ_BLOCK * tqi_block_bytes_of(x.type);
    const float scale = tqi_half_to_float(tqi_finite_scale(*(const uint16_t *) (const void *) block));
    if (x.type == TQ_CUDA_TYPE_Q8_0) {
        return scale * (float) ((const int8_t *) block)[2 + n];
    }
    uint32_t words[TQI_MAX_WORDS];
    tqi_load_words(block, bits, words);
    const int index = trellis ? tqi_unpack_level(bits, words, n) : tqi_unpack_index(bits, words, n % 8, n / 8);
    return scale * x.levels[index];
}

/* The token that owns a row of x's tail, -1 if there is none that attention could see. until: see tqi_read_until. */
TQI_D int tqi_owner_of(const tqi_attention & p, const tqi_tail & x, const tqi_task & task, int row, int * until) {
    const int n_row = p.n_recent + p.n_first;
    if (x.owner == NULL || row >= n_row + p.n_own) {
        return -1;
    }
    const int32_t * owners = x.owner + task.kv_stream * x.owner_stride;
    const int token = owners[row] - 1;
    bool mine = row >= n_row || tqi_tail_row_of(p.n_recent, p.n_first, token) == row;
    if (p.n_own > 0) {
        *until = owners[n_row + p.n_own + row];
        mine = mine && (row >= n_row || tqi_own_token(p, owners, token) < 0); /* written anew: read where it is now */
    }
    return token >= 0 && token < p.n_kv && mine ? token : -1;
}

/* Writes tokens, owned and until: a thread per entry. */
TQI_D void tqi_tail_tokens(const tqi_attention & p, const tqi_task & task, const tqi_tail_work & w) {
    const int i = tqi_thread(), row = w.row0 + i % TQI_TAIL_SLOTS;
    if (i < TQI_TAIL_ENTRIES) {
        int until_k = INT32_MAX, until_v = INT32_MAX;
        const int of_k = tqi_owner_of(p, p.k.tail, task, row, &until_k),
                  of_v = tqi_owner_of(p, p.v.tail, task, row, &until_v);
        w.until[i] = i < TQI_TAIL_SLOTS ? until_k : until_v;
        if (i < TQI_TAIL_SLOTS) {
            w.tokens[i] = of_k;
            w.owned[i] = of_v == of_k ? 3 : 1;
        } else {
            w.tokens[i] = of_v == of_k ? -1 : of_v;
            w.owned[i] = 2;
        }
    }
}

/* Writes q, transformed; a warp takes a vector. Those that do not exist are like the first. */
TQI_D void tqi_tail_queries(const tqi_attention & p, const tqi_task & task, const tqi_tail_work & w) {
    const int lane = tqi_thread() % 32;
    for (int i = tqi_thread() / 32; i < 8; i += TQI_TAIL_WARPS) {
        const int vec = task.vec0 + (i < w.n_vec ? i : 0), row = tqi_row_of_vector(p, vec);
        const float * from = tqi_query_of(p, task, row, tqi_head_of_vector(p, task, vec, row));
        for (int b = 0; b < p.k.n_blocks; ++b) {
            const float x = from[b * TQ_BLOCK + lane];
            w.q[(i * p.k.n_blocks + b) * TQ_BLOCK + lane] =
                p.k.is_pqo ? tqi_transform_warp(p.k.signs_first, x, lane) : x;
        }
    }
}

/* Writes K q into the weights; a warp takes an entry. */
TQI_D void tqi_tail_scores(const tqi_attention & p, const tqi_task & task, const tqi_tail_work & w) {
    const int lane = tqi_thread() % 32, dk = p.k.n_blocks * TQ_BLOCK;
    for (int e = tqi_thread() / 32; e < TQI_TAIL_ENTRIES; e += TQI_TAIL_WARPS) {
        const int row = w.owned[e] & 1 ? w.row0 + e % TQI_TAIL_SLOTS : -1;
        float sum[8] = { 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f };
        if (w.tokens[e] < 0) {
            continue;
        }
        for (int b = 0; b < p.k.n_blocks; ++b) {
            const float x = tqi_token_value(p.k, task, w.tokens[e], row, b * TQ_BLOCK + lane);
            TQI_UNROLL
            for (int i = 0; i < 8; ++i) {
                sum[i] += x * w.q[i * dk + b * TQ_BLOCK + lane];
            }
        }
        TQI_UNROLL
        for (int i = 0; i < 8; ++i) {
            sum[i] = tqi_add_lanes<1, 32>(sum[i]);
            if (lane == i) {
                w.weights[i * TQI_TAIL_ENTRIES + e] = sum[i];
            }
        }
    }
}

/* Turns scores into weights, and writes largest score and sum; a warp takes a vector, a lane two of its entries. */
TQI_D void tqi_tail_softmax(const tqi_attention & p, const tqi_task & task, const tqi_tail_work & w, int64_t part) {
    const int lane = tqi_thread() % 32;
    for (int i = tqi_thread() / 32; i < w.n_vec; i += TQI_TAIL_WARPS) {
        const int vec = task.vec0 + i, row = tqi_row_of_vector(p, vec);
        const float slope = tqi_slope(p, tqi_head_of_vector(p, task, vec, row));
        const uint16_t * mask = (const uint16_t *) (const void *) tqi_mask_of(p, task, vec);
        float * weights = w.weights + i * TQI_TAIL_ENTRIES + lane;
        float x[2], top = -INFINITY, sum = 0.0f;
        TQI_UNROLL
        for (int j = 0; j < 2; ++j) {
            const int token = w.tokens[lane + 32 * j];
            const bool read = token >= 0 && row < w.until[lane + 32 * j];
            const uint16_t bias = !read          ? (uint16_t) TQI_F16_NEGATIVE_INFINITY
                                  : mask != NULL ? mask[token]
                                                 : (uint16_t) 0;
            x[j] = -INFINITY;
            if (bias != TQI_F16_NEGATIVE_INFINITY) {
                x[j] = weights[32 * j] * p.scale;
                x[j] = (p.softcap > 0.0f ? p.softcap * tanhf(x[j]) : x[j]) + slope * tqi_half_to_float(bias);
            }
            top = fmaxf(top, x[j]);
        }
        top = tqi_largest_of_lanes<1, 32>(top);
        TQI_UNROLL
        for (int j = 0; j < 2; ++j) {
            weights[32 * j] = x[j] == -INFINITY ? 0.0f : TQI_WEIGHT * tqi_exp(x[j] - top);
            sum += weights[32 * j];
        }
        sum = tqi_add_lanes<1, 32>(sum);
        if (lane < 2) {
            p.stats[2 * (part + (int64_t) i * p.n_parts) + lane] = lane == 0 ? top : sum;
        }
    }
}

/* Writes V^T weights; a thread takes a dimension of all vectors. */
TQI_D void tqi_tail_values(const tqi_attention & p, const tqi_task & task, const tqi_tail_work & w, int64_t part) {
    const float unit = p.v.is_pqo ? tqi_pqo3::unit() : 1.0f;
    const int dv = p.v.n_blocks * TQ_BLOCK;
    for (int d = tqi_thread(); d < dv; d += TQI_TAIL_ATTENTION_THREADS) {
        float o[8] = { 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f };
        for (int e = 0; e < TQI_TAIL_ENTRIES; ++e) {
            if (w.tokens[e] < 0) {
                continue;
            }
            const int row = w.owned[e] & 2 ? w.row0 + e % TQI_TAIL_SLOTS : -1;
            const float x = tqi_token_value(p.v, task, w.tokens[e], row, d) * unit;
            TQI_UNROLL
            for (int i = 0; i < 8; ++i) {
                const float weight = i < w.n_vec ? w.weights[i * TQI_TAIL_ENTRIES + e] : 0.0f;
                o[i] += weight == 0.0f ? 0.0f : weight * x; /* f16 V may hold infinities where it is hidden */
            }
        }
        TQI_UNROLL
        for (int i = 0; i < 8; ++i) {
            if (i < w.n_vec) {
                p.partials[(part + (int64_t) i * p.n_parts) * dv + d] = o[i];
            }
        }
    }
}

TQI_D void tqi_attend_tail(const tqi_attention & p, unsigned char * shared) {
    const tqi_task task = tqi_task_of(p, 8);
    tqi_tail_work w;
    w.tokens = (int *) (void *) (shared + TQI_TAIL_AT_TOKENS);
    w.owned = (int *) (void *) (shared + TQI_TAIL_AT_OWNED);
    w.until = (int *) (void *) (shared + TQI_TAIL_AT_UNTIL);
    w.weights = (float *) (void *) (shared + TQI_TAIL_AT_WEIGHTS);
    w.q = (float *) (void *) (shared + TQI_TAIL_AT_Q);
    w.row0 = task.split * TQI_TAIL_SLOTS;
    w.n_vec = p.n_vec - task.vec0 < 8 ? p.n_vec - task.vec0 : 8;
    const int64_t part = tqi_part_of(p, task, task.vec0) + p.n_splits; /* of the first vector */

    tqi_tail_tokens(p, task, w);
    tqi_tail_queries(p, task, w);
    tqi_sync();
    tqi_tail_scores(p, task, w);
    tqi_sync();
    tqi_tail_softmax(p, task, w, part);
    tqi_sync();
    tqi_tail_values(p, task, w, part);
}

#endif
