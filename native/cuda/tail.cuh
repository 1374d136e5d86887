/* tail.cuh: attention to the tokens that own a row of a precise tail (tq_attn_tail in tqgguf.h): further parts for tq_merge_kernel,
 * beside those of attention.cuh, which hides these tokens.
 *
 * They are few, a few hundred of many thousand, and their rows are f16 in the transformed domain, so that plain f32 arithmetic
 * does; the kernel that everything depends on stays as it is. A block of 128 threads takes 32 rows of one KV head and eight query
 * vectors. K and V of a token may lie in different places: a context shift disowns K alone, and V may be of f16 without a tail. */
#ifndef TQ_TAIL_CUH
#define TQ_TAIL_CUH

#include "attention.cuh"

#define TQ_TAIL_ENTRIES (2 * TQ_TAIL_SLOTS) /* a row's owner in K, and its owner in V if that is another token */
#define TQ_TAIL_WARPS (TQ_TAIL_ATTENTION_THREADS / 32)

/* One value of a token: from the tail if row is not negative, from its blocks, or from f16. Ours are left transformed. */
TQ_D float tq_token_value(const tq_operand & x, const tq_task & k, int token, int row, int i) {
    if (row >= 0) {
        const uint8_t * from =
            x.tail.data + k.kv_stream * x.tail.stride_stream + row * x.tail.stride_row + k.kv_head * x.tail.stride_head;
        return tq_half_to_float(((const uint16_t *) (const void *) from)[i]);
    }
    const uint8_t * from = x.data + k.kv_stream * x.stride_stream + k.kv_head * x.stride_head + token * x.stride_token;
    if (!x.ours) {
        return tq_half_to_float(((const uint16_t *) (const void *) from)[i]);
    }
    const bool trellis = tq_is_trellis(x.type);
    const int bits = x.type == TQ_TYPE_PQO3 || x.type == TQ_TYPE_PQT3 ? 3 : 4, n = i % TQ_BLOCK;
    const uint8_t * block = from + i / TQ_BLOCK * (x.row_bytes / x.n_blocks);
    uint32_t words[4];
    tq_load_words(block, bits, words);
    const int index = trellis ? tq_unpack_level(words, n) : tq_unpack_index(bits, words, n % 8, n / 8);
    return tq_half_to_float(tq_finite_scale(*(const uint16_t *) (const void *) block)) * x.levels[index];
}

/* The token that owns a row of x's tail, -1 if there is none that attention could see. */
TQ_D int tq_owner_of(const tq_attention & p, const tq_tail & x, const tq_task & k, int row) {
    if (x.owner == NULL || row >= p.n_recent + p.n_first) {
        return -1;
    }
    const int token = x.owner[k.kv_stream * x.owner_stride + row] - 1;
    const int mine = token < p.n_first ? p.n_recent + token : (int) ((uint32_t) token % (uint32_t) p.n_recent);
    return token >= 0 && token < p.n_kv && mine == row ? token : -1;
}

TQ_D void tq_attend_tail(const tq_attention & p, unsigned char * shared) {
    const int lane = tq_thread() % 32, warp = tq_thread() / 32, dk = p.k.n_blocks * TQ_BLOCK,
              dv = p.v.n_blocks * TQ_BLOCK;
    int * tokens = (int *) (void *) shared;                   /* (entries) */
    int * owned = tokens + TQ_TAIL_ENTRIES;                   /* (entries): 1 if K has a row of it, 2 if V has */
    float * w = (float *) (void *) (owned + TQ_TAIL_ENTRIES); /* (8, entries): scores, then weights */
    float * q = w + 8 * TQ_TAIL_ENTRIES;                      /* (8, DK) */
    tq_task k;
    k.split = tq_divide(tq_block_x(), p.n_head_kv, p.heads_inverse);
    k.kv_head = tq_block_x() - k.split * p.n_head_kv;
    k.vec0 = tq_block_y() * 8;
    k.stream = tq_block_z();
    k.kv_stream = k.stream / p.streams_per_kv;
    const int row0 = k.split * TQ_TAIL_SLOTS, n_vec = p.n_vec - k.vec0 < 8 ? p.n_vec - k.vec0 : 8;

    if (tq_thread() < TQ_TAIL_ENTRIES) {
        const int row = row0 + tq_thread() % TQ_TAIL_SLOTS, of_k = tq_owner_of(p, p.k.tail, k, row),
                  of_v = tq_owner_of(p, p.v.tail, k, row);
        if (tq_thread() < TQ_TAIL_SLOTS) {
            tokens[tq_thread()] = of_k;
            owned[tq_thread()] = of_v == of_k ? 3 : 1;
        } else {
            tokens[tq_thread()] = of_v == of_k ? -1 : of_v;
            owned[tq_thread()] = 2;
        }
    }
    for (int i = warp; i < 8; i += TQ_TAIL_WARPS) {
        const int vec = k.vec0 + (i < n_vec ? i : 0);
        const float * from =
            (const float *) (const void *) (p.q + k.stream * p.q_stride_stream +
                                            (int64_t) (k.kv_head * p.group + vec % p.group) * p.q_stride_head +
                                            (int64_t) (vec / p.group) * p.q_stride_row);
        for (int b = 0; b < p.k.n_blocks; ++b) {
            const float x = from[b * TQ_BLOCK + lane];
            q[i * dk + b * TQ_BLOCK + lane] = p.k.ours ? tq_transform_warp(p.k.signs_first, x, lane) : x;
        }
    }
    tq_sync();

    for (int e = warp; e < TQ_TAIL_ENTRIES; e += TQ_TAIL_WARPS) {
        const int row = owned[e] & 1 ? row0 + e % TQ_TAIL_SLOTS : -1;
        float sum[8];
        if (tokens[e] < 0) {
            continue;
        }
        TQ_UNROLL
        for (int i = 0; i < 8; ++i) {
            sum[i] = 0.0f;
        }
        for (int b = 0; b < p.k.n_blocks; ++b) {
            const float x = tq_token_value(p.k, k, tokens[e], row, b * TQ_BLOCK + lane);
            TQ_UNROLL
            for (int i = 0; i < 8; ++i) {
                sum[i] += x * q[i * dk + b * TQ_BLOCK + lane];
            }
        }
        TQ_UNROLL
        for (int i = 0; i < 8; ++i) {
            TQ_UNROLL
            for (int h = 1; h < 32; h *= 2) {
                sum[i] += tq_exchange(sum[i], h);
            }
            if (lane == i) {
                w[i * TQ_TAIL_ENTRIES + e] = sum[i];
            }
        }
    }
    tq_sync();

    const int64_t first =
        (((int64_t) k.stream * p.n_head_kv + k.kv_head) * p.n_vec + k.vec0) * p.n_parts + p.n_splits + k.split;
    for (int i = warp; i < n_vec; i += TQ_TAIL_WARPS) {
        const int vec = k.vec0 + i, head = k.kv_head * p.group + vec % p.group;
        const float slope = tq_slope(p, head);
        const uint8_t * mask = p.mask == NULL ? NULL
                                              : p.mask + (int64_t) (vec / p.group) * p.mask_stride_row +
                                                    (int64_t) (head % p.n_mask_head) * p.mask_stride_head +
                                                    (int64_t) (k.stream % p.n_mask_stream) * p.mask_stride_stream;
        float x[2], top = -INFINITY, sum = 0.0f;
        TQ_UNROLL
        for (int j = 0; j < 2; ++j) {
            const int e = lane + 32 * j;
            uint16_t bias = tokens[e] < 0 ? TQ_F16_NEGATIVE_INFINITY : 0;
            if (tokens[e] >= 0 && mask != NULL) {
                bias = ((const uint16_t *) (const void *) mask)[tokens[e]];
            }
            x[j] = -INFINITY;
            if (bias != TQ_F16_NEGATIVE_INFINITY) {
                x[j] = w[i * TQ_TAIL_ENTRIES + e] * p.scale;
                x[j] = (p.softcap > 0.0f ? p.softcap * tanhf(x[j]) : x[j]) + slope * tq_half_to_float(bias);
            }
            top = fmaxf(top, x[j]);
        }
        TQ_UNROLL
        for (int h = 1; h < 32; h *= 2) {
            top = fmaxf(top, tq_exchange(top, h));
        }
        TQ_UNROLL
        for (int j = 0; j < 2; ++j) {
            const float weight = x[j] == -INFINITY ? 0.0f : TQ_WEIGHT * tq_exp(x[j] - top);
            w[i * TQ_TAIL_ENTRIES + lane + 32 * j] = weight;
            sum += weight;
        }
        TQ_UNROLL
        for (int h = 1; h < 32; h *= 2) {
            sum += tq_exchange(sum, h);
        }
        if (lane < 2) {
            p.stats[2 * (first + (int64_t) i * p.n_parts) + lane] = lane == 0 ? top : sum;
        }
    }
    tq_sync();

    const float unit = p.v.ours ? tq_pqo3::unit() : 1.0f;
    for (int d = tq_thread(); d < dv; d += TQ_TAIL_ATTENTION_THREADS) {
        float o[8];
        TQ_UNROLL
        for (int i = 0; i < 8; ++i) {
            o[i] = 0.0f;
        }
        for (int e = 0; e < TQ_TAIL_ENTRIES; ++e) {
            if (tokens[e] < 0) {
                continue;
            }
            const float x = tq_token_value(p.v, k, tokens[e], owned[e] & 2 ? row0 + e % TQ_TAIL_SLOTS : -1, d) * unit;
            TQ_UNROLL
            for (int i = 0; i < 8; ++i) {
                const float weight = i < n_vec ? w[i * TQ_TAIL_ENTRIES + e] : 0.0f;
                o[i] += weight == 0.0f ? 0.0f : weight * x; /* f16 V may hold infinities where it is hidden */
            }
        }
        TQ_UNROLL
        for (int i = 0; i < 8; ++i) {
            if (i < n_vec) {
                p.partials[(first + (int64_t) i * p.n_parts) * dv + d] = o[i];
            }
        }
    }
}

#endif
