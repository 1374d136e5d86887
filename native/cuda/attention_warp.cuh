/* attention_warp.cuh: the same attention where heads of K and V have 64 or 128 values of one type of ours, or pqo4 and pqo3:
 * what decoding runs on, and so what must be fast. What it costs is instructions, not memory (docs/cuda.md).
 *
 * A warp works alone: 16 keys at a time, every eighth such tile of the block's range. It copies them, finds their scores, keeps
 * them in registers, and adds up the values of all DV dimensions. So nothing but the tables and q is shared with other warps, and
 * no barrier is met between the first key and the last; results are added at the end.
 *
 *   scores      S = K q: keys down, query vectors across
 *   softmax     A lane has keys g and g + 8 of vectors 2 t and 2 t + 1. Weights are 2^(score - base): base follows the largest
 *               score only when a weight would get too large for f16, as a common factor of weights cancels out.
 *   accumulate  O = V^T P: weights become the other operand by a transposition. A lane has the same vectors of O as of S, and
 *               takes half a block of each token's V, or a quarter with heads of 64.
 *
 * Two or three tiles per warp are on their way or in use, so that a warp waits for none but its own copies. */
#ifndef TQ_ATTENTION_WARP_CUH
#define TQ_ATTENTION_WARP_CUH

#include "attention.cuh"

#define TQ_WEIGHT_LOG2 10.0f      /* TQ_WEIGHT = 2^10 is what the largest score's weight begins as, */
#define TQ_MOST_WEIGHT_LOG2 15.0f /* and up to 2^15 it may grow */
#define TQ_NO_BASE -1e30f         /* no key has been seen: any score exceeds it, and hidden keys still get 0 */
#define TQ_ALL_HIDDEN (TQ_F16_NEGATIVE_INFINITY * 0x10001u)

template <int NT, int BLOCKS> struct tq_results {
    float o[NT][2 * BLOCKS][4];
    float sum[NT][2];                /* of the weights of this lane's keys */
    float base[NT][2], scale[NT][2]; /* in units of log 2 */
};

/* ---- Copies ---- */

struct tq_warp_loader {
    const uint8_t *k, *v, *mask; /* what the lane copies of the next tile */
    int to_k, to_v;              /* from the tile's K or V in a stage */
    int row_k, row_v;            /* the first row, TQ_MAX_TILE where the lane has none */
    int n_mask;                  /* lanes that copy eight values of the mask each; the others do what the first does */
    int to_mask, mask_step;
    int whole; /* as many keys are copied 16 bytes at a time */
};

/* one: whether K and V have one type. */
TQ_D tq_warp_loader tq_warp_loader_of(bool one, const tq_attention & p, const tq_task & k, int begin, int to_mask) {
    const int lane = tq_thread() % 32, n_vec = p.n_vec - k.vec0 < 8 * p.n_tiles ? p.n_vec - k.vec0 : 8 * p.n_tiles;
    const tq_loader of_k = tq_loader_of(p.k, k, lane, begin, 0), of_v = tq_loader_of(p.v, k, lane, begin, 0);
    tq_warp_loader l;
    l.n_mask = p.mask == NULL ? 0 : 2 * n_vec;
    const int of_mask = lane < l.n_mask ? lane : 0;
    l.k = of_k.from;
    l.v = of_v.from;
    l.mask = l.k; /* without a mask one and the same bytes of K: cheaper than a branch */
    if (p.mask != NULL) {
        l.mask = tq_mask_of(p, k, k.vec0 + of_mask / 2) + 2 * (begin + 8 * (of_mask % 2));
    }
    l.mask_step = p.mask == NULL ? 0 : 2 * TQ_WARP_STEP;
    l.to_k = tq_keep((int) (of_k.to_and_row & 0xfffffu));
    l.to_v = one ? l.to_k : tq_keep((int) (of_v.to_and_row & 0xfffffu));
    l.row_k = (int) (of_k.to_and_row >> 20);
    l.row_v = one ? l.row_k : (int) (of_v.to_and_row >> 20);
    l.to_mask = tq_keep(to_mask + 16 * of_mask);
    l.whole = tq_keep(p.wide ? TQ_WARP_TILE : INT32_MAX);
    return l;
}

/* Starts to copy a whole tile of one operand, 16 bytes at a time, to AT bytes behind to; up to three times, where rows remain. */
template <typename T, int BLOCKS, int AT>
TQ_D void tq_warp_copy(const tq_operand & x, const uint8_t * from, uint8_t * to) {
    const int units = tq_wide_units(T::BYTES * BLOCKS), rows_on = 32 / units, step = rows_on * TQ_FIXED_STRIDE(BLOCKS);
    const int row = tq_thread() % 32 / units, tile = TQ_WARP_TILE;
    if (row < rows_on) {
        tq_copy_async<16, AT>(to, from);
    }
    if (row < rows_on && row < tile - rows_on) {
        tq_copy_async<16, AT + step>(to, from + x.step);
    }
    if (row < rows_on && row < tile - 2 * rows_on) {
        tq_copy_async<16, AT + 2 * step>(to, from + 2 * x.step);
    }
}

/* Starts to load n keys, which may be too many for a tile, or none; K, V and mask. */
template <typename K, typename V, int BLOCKS>
TQ_D void tq_warp_load(const tq_attention & p, tq_warp_loader * l, int n, uint8_t * stage) {
    if (n >= l->whole) {
        tq_warp_copy<K, BLOCKS, 0>(p.k, l->k, stage + l->to_k);
        tq_warp_copy<V, BLOCKS, TQ_WARP_V(BLOCKS)>(p.v, l->v, stage + l->to_v);
        tq_copy_async<16>(stage + l->to_mask, l->mask);
    } else if (n > 0) {
        n = n < TQ_WARP_TILE ? n : TQ_WARP_TILE;
        tq_copy_operand<32>(p.k, { l->k, (uint32_t) l->to_k | (uint32_t) l->row_k << 20 }, n, stage);
        tq_copy_operand<32>(p.v, { l->v, (uint32_t) l->to_v | (uint32_t) l->row_v << 20 }, n,
                            stage + TQ_WARP_V(BLOCKS));
        uint16_t * mask = (uint16_t *) (void *) (stage + l->to_mask);
        for (int i = 0; i < 8 && tq_thread() % 32 < l->n_mask; ++i) {
            if (8 * (tq_thread() % 2) + i < n) {
                tq_copy_async<2>(mask + i, l->mask + 2 * i);
            }
        }
    }
    tq_copy_commit();
    l->k += p.k.step_tile;
    l->v += p.v.step_tile;
    l->mask += (uint32_t) l->mask_step;
}

/* ---- Softmax ---- */

/* Whether the mask hides all of a tile from all vectors. */
TQ_D bool tq_mask_hides(const tq_quad & m) {
    return (m.word[0] | m.word[1] | m.word[2] | m.word[3]) == TQ_ALL_HIDDEN &&
           (m.word[0] & m.word[1] & m.word[2] & m.word[3]) == TQ_ALL_HIDDEN;
}

/* The score of a tile's key for a vector, in units of log 2, where it is more than scale * S. mask: (vectors, 16); keys: a bit for
 * each that there is. */
TQ_D float tq_score(const tq_attention & p, const uint16_t * mask, int keys, const float * slope, float s, int key,
                    int vec) {
    const uint16_t bias = p.mask == NULL ? (uint16_t) 0 : mask[vec * TQ_WARP_TILE + key];
    s = p.softcap > 0.0f ? TQ_LOG2_E * p.softcap * tanhf(s) : s;
    return (keys >> key & 1) == 0 || bias == TQ_F16_NEGATIVE_INFINITY
               ? -INFINITY
               : s + TQ_LOG2_E * slope[vec] * tq_half_to_float(bias);
}

/* Raises the bases to the largest scores x, and brings what has been found so far to them. */
template <int NT, int BLOCKS> TQ_D void tq_raise(const float (*x)[4], tq_results<NT, BLOCKS> * r) {
    TQ_UNROLL
    for (int i = 0; i < NT; ++i) {
        TQ_UNROLL
        for (int c = 0; c < 2; ++c) {
            float top = fmaxf(x[i][c], x[i][c + 2]);
            TQ_UNROLL
            for (int h = 4; h < 32; h *= 2) {
                top = fmaxf(top, tq_exchange(top, h));
            }
            top = fmaxf(r->base[i][c], top - TQ_WEIGHT_LOG2);
            const float factor = tq_exp2(r->base[i][c] - top);
            r->base[i][c] = top;
            r->sum[i][c] *= factor;
            TQ_UNROLL
            for (int j = 0; j < 2 * BLOCKS; ++j) {
                r->o[i][j][c] *= factor;
                r->o[i][j][c + 2] *= factor;
            }
        }
    }
}

/* weights <- 2^x as fragments; x: scores less their base. s: the scores, to be multiplied by scale if plain. */
template <int NT, int BLOCKS>
TQ_D void tq_warp_softmax(bool plain, const float (*s)[4], float (*x)[4], tq_results<NT, BLOCKS> * r,
                          uint32_t (*weights)[2]) {
    float most = x[0][0];
    TQ_UNROLL
    for (int i = 1; i < 4 * NT; ++i) {
        most = fmaxf(most, x[i / 4][i % 4]);
    }
    if (tq_any_lane(most > TQ_MOST_WEIGHT_LOG2)) {
        TQ_UNROLL
        for (int i = 0; i < 4 * NT; ++i) {
            x[i / 4][i % 4] = s[i / 4][i % 4] * (plain ? r->scale[i / 4][i % 2] : 1.0f);
        }
        tq_raise<NT, BLOCKS>(x, r);
        TQ_UNROLL
        for (int i = 0; i < 4 * NT; ++i) {
            x[i / 4][i % 4] -= r->base[i / 4][i % 2];
        }
    }
    TQ_UNROLL
    for (int i = 0; i < NT; ++i) {
        TQ_UNROLL
        for (int j = 0; j < 4; ++j) {
            x[i][j] = tq_exp2(x[i][j]);
            r->sum[i][j % 2] += x[i][j];
        }
        weights[i][0] = tq_transpose(tq_half2(x[i][0], x[i][1]));
        weights[i][1] = tq_transpose(tq_half2(x[i][2], x[i][3]));
    }
}

/* ---- Results ---- */

/* A number of each warp. */
struct alignas(16) tq_of_warps {
    float of[TQ_WARPS];
};
/* A lane's part of a tensor-core tile of results: two dimensions of two vectors. */
struct alignas(16) tq_tile_part {
    float of[4];
};
struct alignas(8) tq_pair {
    float of[2];
};

/* What each warp's results of eight query vectors are to be multiplied by, in place of its base: eight lanes take a vector. Writes
 * largest score and sum, or, where there is nothing to merge, puts the sum into the factors. */
TQ_D void tq_weigh_warps(const tq_attention & p, const tq_task & k, int vec0, tq_of_warps * bases,
                         const tq_of_warps * totals) {
    const int i = tq_thread() / TQ_WARPS, warp = tq_thread() % TQ_WARPS, vec = vec0 + i;
    if (i >= 8) {
        return;
    }
    const float mine = bases[i].of[warp];
    float base = mine;
    TQ_UNROLL
    for (int h = 1; h < TQ_WARPS; h *= 2) {
        base = fmaxf(base, tq_exchange(base, h));
    }
    float factor = tq_exp2(mine - base), total = factor * totals[i].of[warp];
    TQ_UNROLL
    for (int h = 1; h < TQ_WARPS; h *= 2) {
        total += tq_exchange(total, h);
    }
    const float max = base == TQ_NO_BASE ? -INFINITY : (base + TQ_WEIGHT_LOG2) / TQ_LOG2_E;
    if (p.n_parts > 1 && warp < 2 && vec < p.n_vec) {
        p.stats[2 * tq_part_of(p, k, vec) + warp] = warp == 0 ? max : total;
    }
    if (p.n_parts == 1 && vec < p.n_vec) {
        factor *= tq_normalizer(p, tq_head_of_vector(p, k, vec, tq_row_of_vector(p, vec)), max, total);
    }
    bases[i].of[warp] = factor;
}

/* Adds up what the warps found of eight query vectors, and writes it. parts: (warps, tiles of 2 * 8 dimensions, TQ_PART_STRIDE).
 * Sixteen lanes take a block of two vectors: each of them two dimensions. */
template <typename V, int BLOCKS>
TQ_D void tq_add_warps(const tq_attention & p, const tq_task & k, int vec0, const tq_tile_part * parts,
                       const tq_of_warps * factors) {
    const int lane = tq_thread() % 32, warp = tq_thread() / 32, b = warp / 2, t = warp % 2 * 2 + lane / 16,
              u = lane % 16;
    const int n_slices = BLOCKS / 2, slice = 4 * b + u / 4,
              from = (slice % n_slices * 4 + u % 4) * TQ_PART_STRIDE + slice / n_slices * 4 + t;
    const int dim = V::dim(u / 4, 2 * (u % 4)); /* and the next one */
    if (BLOCKS < 4 && b >= BLOCKS) {
        return;
    }
    const tq_of_warps factor[2] = { factors[2 * t], factors[2 * t + 1] };
    float x[2][2] = { { 0.0f, 0.0f }, { 0.0f, 0.0f } }; /* (vectors, dimensions) */
    TQ_UNROLL
    for (int i = 0; i < TQ_WARPS; ++i) {
        const tq_tile_part part = parts[from + i * 2 * BLOCKS * TQ_PART_STRIDE];
        TQ_UNROLL
        for (int j = 0; j < 4; ++j) {
            x[j % 2][j / 2] += factor[j % 2].of[i] * part.of[j];
        }
    }
    const int vec = vec0 + 2 * t;
    if (p.n_parts > 1) {
        float * to = p.partials + tq_part_of(p, k, vec) * (32 * BLOCKS) + b * TQ_BLOCK + dim;
        TQ_UNROLL
        for (int c = 0; c < 2; ++c) {
            if (vec + c < p.n_vec) {
                *(tq_pair *) (void *) (to + c * p.n_parts * (32 * BLOCKS)) = { { x[c][0], x[c][1] } };
            }
        }
        return;
    }
    TQ_UNROLL
    for (int c = 0; c < 2; ++c) {
        tq_transform_pairs(!p.v.signs_first, x[c], lane, dim);
        if (vec + c < p.n_vec) {
            float * out = tq_output_of(p, k, vec + c) + b * TQ_BLOCK + dim;
            out[0] = x[c][0];
            out[1] = x[c][1];
        }
    }
}

/* One range of keys, from beginning to end. K, V: types. */
template <typename K, typename V, int NT, int BLOCKS>
TQ_D void tq_attend_by_warps(const tq_attention & p, unsigned char * shared) {
    const tq_task k = tq_task_of(p);
    const int lane = tq_thread() % 32, warp = tq_thread() / 32, g = lane / 4, t = lane % 4,
              stride = TQ_FIXED_STRIDE(BLOCKS);
    const int n_slices = BLOCKS / 2, slice = g * n_slices; /* of V: those that this lane takes, and the first of them */
    const bool one = tq_one_type<K, V>::value;
    uint32_t * k_table = (uint32_t *) (void *) shared;
    uint32_t * v_table = one ? k_table : k_table + K::ENTRIES * K::SPACING / 4;
    tq_quad * in_q = (tq_quad *) (void *) (shared + p.at_q);
    float * in_scale = (float *) (void *) (shared + p.at_vectors);
    float * slope = in_scale + 8 * NT;
    tq_of_warps * bases = (tq_of_warps *) (void *) (slope + 8 * NT); /* of each vector */
    tq_of_warps * totals = bases + 8 * NT;
    const int begin = k.begin + TQ_WARP_TILE * warp, stage_bytes = TQ_WARP_STAGE(BLOCKS, NT);
    const int first = p.at_stages + warp * p.n_stages * stage_bytes; /* of the stages that this warp has */
    const int in_k = tq_keep(tq_lead(p.k, k) + g * stride),
              in_v = tq_keep(TQ_WARP_V(BLOCKS) + tq_lead(p.v, k) + 2 * t * stride);
    tq_warp_loader loader = tq_warp_loader_of(one, p, k, begin, TQ_WARP_MASK(BLOCKS));
    for (int i = 0; i < p.n_stages - 1; ++i) {
        tq_warp_load<K, V, BLOCKS>(p, &loader, k.end - begin - i * TQ_WARP_STEP, shared + first + i * stage_bytes);
    }
    tq_fill_table<K>(p.k.levels, k_table);
    if (!one) {
        tq_fill_table<V>(p.v.levels, v_table);
    }
    tq_load_queries<K, BLOCKS>(p, k, in_q, in_scale, slope);
    tq_sync();

    tq_results<NT, BLOCKS> r;
    tq_quad q[NT == 1 ? BLOCKS : 1]; /* in registers where there is room */
    TQ_UNROLL
    for (int b = 0; b < BLOCKS && NT == 1; ++b) {
        q[NT == 1 ? b : 0] = in_q[b * 32 + lane];
    }
    TQ_UNROLL
    for (int i = 0; i < NT; ++i) {
        TQ_UNROLL
        for (int j = 0; j < 2 * BLOCKS; ++j) {
            r.o[i][j][0] = r.o[i][j][1] = r.o[i][j][2] = r.o[i][j][3] = 0.0f;
        }
        r.sum[i][0] = r.sum[i][1] = 0.0f;
        TQ_UNROLL
        for (int c = 0; c < 2; ++c) {
            r.base[i][c] = TQ_NO_BASE;
            r.scale[i][c] = in_scale[8 * i + 2 * t + c] * (p.softcap > 0.0f ? 1.0f : TQ_LOG2_E);
        }
    }

    const auto k_part = K::place_of(t);
    const auto v_parts = tq_parts_of<V, n_slices>(slice / 4, slice % 4);
    const int most_left =
        tq_keep(p.softcap > 0.0f ? INT32_MAX : TQ_WARP_TILE); /* with fewer keys a tile is not plain */
    const int last = tq_keep(first + (p.n_stages - 1) * stage_bytes),
              ahead = tq_keep(k.end - (p.n_stages - 1) * TQ_WARP_STEP);
    int at = first, free = last; /* the tile's stage, and the one that its predecessor was in */
    TQ_NO_UNROLL
    for (int t0 = begin; t0 < k.end; t0 += TQ_WARP_STEP) {
        if (p.n_stages == 3) {
            tq_copy_wait<1>();
        } else {
            tq_copy_wait<0>();
        }
        tq_sync_warp(); /* the tile is there, and the one before it is done with */
        tq_warp_load<K, V, BLOCKS>(p, &loader, ahead - t0, shared + free);
        const uint8_t * stage = shared + at;
        const int left = k.end - t0;
        const tq_quad * mask = (const tq_quad *) (const void *) (stage + loader.to_mask);
        int owned = 0; /* by the tail: a bit for each key */
        uint32_t some = 0;
        if (p.n_recent > 0) {
            owned = (int) tq_which_lanes(lane < left && lane < TQ_WARP_TILE && tq_owns_row(p, k, t0 + lane));
        }
        if (loader.n_mask > 0) {
            some = mask->word[0] | mask->word[1] | mask->word[2] | mask->word[3];
        }
        const bool plain =
            !tq_any_lane(left < most_left || (some | (uint32_t) owned) != 0); /* all keys count, as they are */
        if (plain || (owned != 0xffff && (loader.n_mask == 0 || tq_any_lane(!tq_mask_hides(*mask))))) {
            float s[NT][4], x[NT][4];
            uint32_t weights[NT][2];
            const auto fragment = [&](int b, int i) {
                return NT == 1 ? q[NT == 1 ? b : 0] : in_q[(i * BLOCKS + b) * 32 + lane];
            };
            tq_multiply_keys<K, NT, BLOCKS>(k_table, stage + in_k, stride, k_part, BLOCKS, fragment, s);
            if (plain) {
                TQ_UNROLL
                for (int i = 0; i < 4 * NT; ++i) {
                    x[i / 4][i % 4] = fmaf(s[i / 4][i % 4], r.scale[i / 4][i % 2], -r.base[i / 4][i % 2]);
                }
            } else {
                const int keys = (left < TQ_WARP_TILE ? (1 << left) - 1 : 0xffff) & ~owned;
                const uint16_t * values = (const uint16_t *) (const void *) (stage + TQ_WARP_MASK(BLOCKS));
                TQ_UNROLL
                for (int i = 0; i < 4 * NT; ++i) {
                    const int j = i % 4, vec = i / 4 * 8 + 2 * t + j % 2;
                    s[i / 4][j] =
                        tq_score(p, values, keys, slope, s[i / 4][j] * r.scale[i / 4][j % 2], g + 8 * (j / 2), vec);
                    x[i / 4][j] = s[i / 4][j] - r.base[i / 4][j % 2];
                }
            }
            tq_warp_softmax<NT, BLOCKS>(plain, s, x, &r, weights);
            tq_multiply_values<V, NT, n_slices>(v_table, stage + in_v, stride, v_parts, 0xffffffffu, weights, r.o);
        }
        free = at;
        at = at == last ? first : at + stage_bytes;
    }

    tq_tile_part * parts = (tq_tile_part *) (void *) (shared + p.at_stages); /* where tiles were */
    TQ_UNROLL
    for (int i = 0; i < NT; ++i) {
        tq_sync();
        TQ_UNROLL
        for (int j = 0; j < 2 * BLOCKS; ++j) {
            parts[(warp * 2 * BLOCKS + j) * TQ_PART_STRIDE + lane] = { { r.o[i][j][0], r.o[i][j][1], r.o[i][j][2],
                                                                         r.o[i][j][3] } };
        }
        TQ_UNROLL
        for (int c = 0; c < 2; ++c) {
            TQ_UNROLL
            for (int h = 4; h < 32; h *= 2) {
                r.sum[i][c] += tq_exchange(r.sum[i][c], h);
            }
            if (g == 0) {
                bases[8 * i + 2 * t + c].of[warp] = r.base[i][c];
                totals[8 * i + 2 * t + c].of[warp] = r.sum[i][c];
            }
        }
        tq_sync();
        tq_weigh_warps(p, k, k.vec0 + 8 * i, bases + 8 * i, totals + 8 * i);
        tq_sync();
        tq_add_warps<V, BLOCKS>(p, k, k.vec0 + 8 * i, parts, bases + 8 * i);
    }
}

#endif
