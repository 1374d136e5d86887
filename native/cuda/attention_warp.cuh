/* attention_warp.cuh: the same attention where heads of K and V have 64 or 128 values of one type of ours, or pqo4 and
 * pqo3: what decoding runs on, and so what must be fast. What it costs is instructions, not memory (docs/cuda.md).
 *
 * A warp works alone: 16 keys at a time, every eighth such tile of the block's range. It copies them, finds their
 * scores, keeps them in registers, and adds up the values of all DV dimensions. So nothing but the tables and q is
 * shared with other warps, and no barrier is met between the first key and the last; results are added at the end.
 *
 *   scores      S = K q: keys down, query vectors across.
 *   softmax     A lane has keys g and g + 8 of vectors 2 t and 2 t + 1. Weights are 2^(score - base); base follows the
 *               largest score only when a weight would get too large for f16: a common factor of weights cancels out.
 *   accumulate  O = V^T P: weights become the other operand by a transposition. A lane has the same vectors of O as of
 *               S, and takes half a block of each token's V, or a quarter with heads of 64.
 *
 * Two or three tiles per warp are on their way or in use, so that a warp waits for none but its own copies. */
#ifndef TQI_ATTENTION_WARP_CUH
#define TQI_ATTENTION_WARP_CUH

#include "attention.cuh"

#define TQI_WEIGHT_LOG2 10.0f      /* TQI_WEIGHT = 2^10 is what the largest score's weight begins as, */
#define TQI_MOST_WEIGHT_LOG2 15.0f /* and up to 2^15 it may grow */
#define TQI_NO_BASE -1e30f         /* no key has been seen: any score exceeds it, and hidden keys still get 0 */
#define TQI_ALL_HIDDEN (TQI_F16_NEGATIVE_INFINITY * 0x10001u)

template <int NT, int BLOCKS> struct tqi_results {
    float o[NT][2 * BLOCKS][4];
    float sum[NT][2];                /* of the weights of this lane's keys */
    float base[NT][2], scale[NT][2]; /* in units of log 2 */
};

/* ---- Copies ---- */

struct tqi_warp_loader {
    const uint8_t *k, *v, *mask; /* what the lane copies of the next tile */
    int to_k, to_v;              /* from the tile's K or V in a stage */
    int row_k, row_v;            /* the first row, TQI_MAX_TILE where the lane has none */
    int n_mask;                  /* lanes that copy eight values of the mask each; the others do what the first does */
    int to_mask, mask_step;
    int whole; /* as many keys are copied 16 bytes at a time */
};

/* begin: the warp's first key; one: whether K and V have one type. */
TQI_D tqi_warp_loader tqi_warp_loader_of(bool one, const tqi_attention & p, const tqi_task & task, int begin,
                                         int mask_in_stage) {
    const int lane = tqi_thread() % 32,
              n_vec = p.n_vec - task.vec0 < 8 * p.n_tiles ? p.n_vec - task.vec0 : 8 * p.n_tiles;
    const tqi_loader of_k = tqi_loader_of(p.k, task, lane, begin, 0), of_v = tqi_loader_of(p.v, task, lane, begin, 0);
    tqi_warp_loader l;
    l.n_mask = p.mask == NULL ? 0 : 2 * n_vec;
    const int of_mask = lane < l.n_mask ? lane : 0;
    l.k = of_k.from;
    l.v = of_v.from;
    l.mask = l.k; /* without a mask one and the same bytes of K: cheaper than a branch */
    if (p.mask != NULL) {
        l.mask = tqi_mask_of(p, task, task.vec0 + of_mask / 2) + 2 * (begin + 8 * (of_mask % 2));
    }
    l.mask_step = p.mask == NULL ? 0 : 2 * TQI_WARP_STEP;
    l.to_k = tqi_keep((int) (of_k.to_and_row & 0xfffffu));
    l.to_v = one ? l.to_k : tqi_keep((int) (of_v.to_and_row & 0xfffffu));
    l.row_k = (int) (of_k.to_and_row >> 20);
    l.row_v = one ? l.row_k : (int) (of_v.to_and_row >> 20);
    l.to_mask = tqi_keep(mask_in_stage + 16 * of_mask);
    l.whole = tqi_keep(p.wide ? TQI_WARP_TILE : INT32_MAX);
    return l;
}

/* Starts to copy a whole tile of one operand, 16 bytes at a time, to AT bytes behind to; up to four times, where rows
 * remain. */
template <typename T, int BLOCKS, int AT>
TQI_D void tqi_warp_copy(const tqi_operand & x, const uint8_t * from, uint8_t * to) {
    const int units = tqi_wide_units(T::BYTES * BLOCKS), rows_on = 32 / units;
    const int step = rows_on * tqi_warp_stride(T::TYPE, BLOCKS);
    const int row = tqi_thread() % 32 / units, tile = TQI_WARP_TILE;
    if (row < rows_on) {
        tqi_copy_async<16, AT>(to, from);
    }
    if (row < rows_on && row < tile - rows_on) {
        tqi_copy_async<16, AT + step>(to, from + x.step);
    }
    if (row < rows_on && row < tile - 2 * rows_on) {
        tqi_copy_async<16, AT + 2 * step>(to, from + 2 * x.step);
    }
    if (3 * rows_on < tile && row < rows_on && row < tile - 3 * rows_on) {
        tqi_copy_async<16, AT + 3 * step>(to, from + 3 * x.step);
    }
}

/* Starts to load n keys, which may be too many for a tile, or none; K, V and mask. */
template <typename K, typename V, int BLOCKS>
TQI_D void tqi_warp_load(const tqi_attention & p, tqi_warp_loader * l, int n, uint8_t * stage) {
    constexpr int v_in_stage = tqi_warp_layout_of(K::TYPE, V::TYPE, BLOCKS, 1).v_in_stage;
    if (n >= l->whole) {
        tqi_warp_copy<K, BLOCKS, 0>(p.k, l->k, stage + l->to_k);
        tqi_warp_copy<V, BLOCKS, v_in_stage>(p.v, l->v, stage + l->to_v);
        tqi_copy_async<16>(stage + l->to_mask, l->mask);
    } else if (n > 0) {
        n = n < TQI_WARP_TILE ? n : TQI_WARP_TILE;
        tqi_copy_operand<32>(p.k, { l->k, (uint32_t) l->to_k | (uint32_t) l->row_k << 20 }, n, stage);
        tqi_copy_operand<32>(p.v, { l->v, (uint32_t) l->to_v | (uint32_t) l->row_v << 20 }, n, stage + v_in_stage);
        uint16_t * mask = (uint16_t *) (void *) (stage + l->to_mask);
        for (int i = 0; i < 8 && tqi_thread() % 32 < l->n_mask; ++i) {
            if (8 * (tqi_thread() % 2) + i < n) {
                tqi_copy_async<2>(mask + i, l->mask + 2 * i);
            }
        }
    }
    tqi_copy_commit();
    l->k += p.k.step_tile;
    l->v += p.v.step_tile;
    l->mask += (uint32_t) l->mask_step;
}

/* ---- Softmax ---- */

/* Whether the mask hides all of a tile from all vectors. */
TQI_D bool tqi_mask_hides(const tqi_quad & m) {
    return (m.word[0] | m.word[1] | m.word[2] | m.word[3]) == TQI_ALL_HIDDEN &&
           (m.word[0] & m.word[1] & m.word[2] & m.word[3]) == TQI_ALL_HIDDEN;
}

/* The score of a tile's key for a vector, in units of log 2, where it is more than scale * S. mask: (vectors, 16);
 * keys: a bit for each that there is. */
TQI_D float tqi_score(const tqi_attention & p, const uint16_t * mask, int keys, const float * slope, float s, int key,
                      int vec) {
    const uint16_t bias = p.mask == NULL ? (uint16_t) 0 : mask[vec * TQI_WARP_TILE + key];
    s = p.softcap > 0.0f ? TQI_LOG2_E * p.softcap * tanhf(s) : s;
    return (keys >> key & 1) == 0 || bias == TQI_F16_NEGATIVE_INFINITY
               ? -INFINITY
               : s + TQI_LOG2_E * slope[vec] * tqi_half_to_float(bias);
}

/* Raises the bases to the largest scores x, and brings what has been found so far to them. */
template <int NT, int BLOCKS> TQI_D void tqi_raise(const float (*x)[4], tqi_results<NT, BLOCKS> * r) {
    TQI_UNROLL
    for (int i = 0; i < NT; ++i) {
        TQI_UNROLL
        for (int c = 0; c < 2; ++c) {
            const float largest = tqi_largest_of_lanes<4, 32>(fmaxf(x[i][c], x[i][c + 2]));
            const float top = fmaxf(r->base[i][c], largest - TQI_WEIGHT_LOG2);
            const float factor = tqi_exp2(r->base[i][c] - top);
            r->base[i][c] = top;
            r->sum[i][c] *= factor;
            TQI_UNROLL
            for (int j = 0; j < 2 * BLOCKS; ++j) {
                r->o[i][j][c] *= factor;
                r->o[i][j][c + 2] *= factor;
            }
        }
    }
}

/* weights <- 2^x as fragments; x: scores less their base. s: the scores, to be multiplied by scale if plain. */
template <int NT, int BLOCKS>
TQI_D void tqi_warp_softmax(bool plain, const float (*s)[4], float (*x)[4], tqi_results<NT, BLOCKS> * r,
                            uint32_t (*weights)[2]) {
    float most = x[0][0];
    TQI_UNROLL
    for (int i = 1; i < 4 * NT; ++i) {
        most = fmaxf(most, x[i / 4][i % 4]);
    }
    if (tqi_any_lane(most > TQI_MOST_WEIGHT_LOG2)) {
        TQI_UNROLL
        for (int i = 0; i < 4 * NT; ++i) {
            x[i / 4][i % 4] = s[i / 4][i % 4] * (plain ? r->scale[i / 4][i % 2] : 1.0f);
        }
        tqi_raise<NT, BLOCKS>(x, r);
        TQI_UNROLL
        for (int i = 0; i < 4 * NT; ++i) {
            x[i / 4][i % 4] -= r->base[i / 4][i % 2];
        }
    }
    TQI_UNROLL
    for (int i = 0; i < NT; ++i) {
        TQI_UNROLL
        for (int j = 0; j < 4; ++j) {
            x[i][j] = tqi_exp2(x[i][j]);
            r->sum[i][j % 2] += x[i][j];
        }
        weights[i][0] = tqi_transpose(tqi_half2(x[i][0], x[i][1]));
        weights[i][1] = tqi_transpose(tqi_half2(x[i][2], x[i][3]));
    }
}

/* ---- Results ---- */

/* A number of each warp. */
struct alignas(16) tqi_of_warps {
    float of[TQI_WARPS];
};
/* A lane's part of a tensor-core tile of results: two dimensions of two vectors. */
struct alignas(16) tqi_tile_part {
    float of[4];
};
struct alignas(8) tqi_pair {
    float of[2];
};

/* What each warp's results of eight query vectors are to be multiplied by, in place of its base: eight lanes take a
 * vector. Writes largest score and sum, or, where there is nothing to merge, puts the sum into the factors. */
TQI_D void tqi_weigh_warps(const tqi_attention & p, const tqi_task & task, int vec0, tqi_of_warps * bases,
                           const tqi_of_warps * totals) {
    const int i = tqi_thread() / TQI_WARPS, warp = tqi_thread() % TQI_WARPS, vec = vec0 + i;
    if (i >= 8) {
        return;
    }
    const float mine = bases[i].of[warp];
    const float base = tqi_largest_of_lanes<1, TQI_WARPS>(mine);
    float factor = tqi_exp2(mine - base);
    const float total = tqi_add_lanes<1, TQI_WARPS>(factor * totals[i].of[warp]);
    const float max = base == TQI_NO_BASE ? -INFINITY : (base + TQI_WEIGHT_LOG2) / TQI_LOG2_E;
    if (p.n_parts > 1 && warp < 2 && vec < p.n_vec) {
        p.stats[2 * tqi_part_of(p, task, vec) + warp] = warp == 0 ? max : total;
    }
    if (p.n_parts == 1 && vec < p.n_vec) {
        factor *= tqi_normalizer(p, tqi_head_of_vector(p, task, vec, tqi_row_of_vector(p, vec)), max, total);
    }
    bases[i].of[warp] = factor;
}

/* Adds up what the warps found of eight query vectors, and writes it. parts: (warps, tiles of 2 * 8 dimensions,
 * TQI_PART_STRIDE). Sixteen lanes take a block of two vectors: each of them two dimensions. */
template <typename V, int BLOCKS>
TQI_D void tqi_add_warps(const tqi_attention & p, const tqi_task & task, int vec0, const tqi_tile_part * parts,
                         const tqi_of_warps * factors) {
    const int lane = tqi_thread() % 32, warp = tqi_thread() / 32, b = warp / 2, t = warp % 2 * 2 + lane / 16,
              u = lane % 16;
    const int n_slices = BLOCKS / 2, slice = 4 * b + u / 4,
              from = (slice % n_slices * 4 + u % 4) * TQI_PART_STRIDE + slice / n_slices * 4 + t;
    const int dim = V::dim(u / 4, 2 * (u % 4)); /* and the next one */
    if (BLOCKS < 4 && b >= BLOCKS) {
        return;
    }
    const tqi_of_warps factor[2] = { factors[2 * t], factors[2 * t + 1] };
    float x[2][2] = { { 0.0f, 0.0f }, { 0.0f, 0.0f } }; /* (vectors, dimensions) */
    TQI_UNROLL
    for (int i = 0; i < TQI_WARPS; ++i) {
        const tqi_tile_part part = parts[from + i * 2 * BLOCKS * TQI_PART_STRIDE];
        TQI_UNROLL
        for (int j = 0; j < 4; ++j) {
            x[j % 2][j / 2] += factor[j % 2].of[i] * part.of[j];
        }
    }
    const int vec = vec0 + 2 * t;
    if (p.n_parts > 1) {
        float * to = p.partials + tqi_part_of(p, task, vec) * (32 * BLOCKS) + b * TQ_BLOCK + dim;
        TQI_UNROLL
        for (int c = 0; c < 2; ++c) {
            if (vec + c < p.n_vec) {
                *(tqi_pair *) (void *) (to + c * p.n_parts * (32 * BLOCKS)) = { { x[c][0], x[c][1] } };
            }
        }
        return;
    }
    TQI_UNROLL
    for (int c = 0; c < 2; ++c) {
        tqi_transform_pairs(!p.v.signs_first, x[c], lane, dim);
        if (vec + c < p.n_vec) {
            float * out = tqi_output_of(p, task, vec + c) + b * TQ_BLOCK + dim;
            out[0] = x[c][0];
            out[1] = x[c][1];
        }
    }
}

/* ---- One range of keys ---- */

/* What a lane knows all along. */
template <typename K, typename V, int NT, int BLOCKS> struct tqi_warp_lane {
    static constexpr tqi_warp_layout at = tqi_warp_layout_of(K::TYPE, V::TYPE, BLOCKS, NT);
    static constexpr int n_slices = BLOCKS / 2; /* of V's that a lane takes */
    static_assert(at.q % 16 == 0 && at.bases % 16 == 0 && at.stages % 16 == 0 && at.stage_bytes % 16 == 0,
                  "copies and loads of 16 bytes");

    int in_k, in_v; /* its rows in a stage */
    typename K::place k_part;
    tqi_parts<V, n_slices> v_parts;
    tqi_quad q[NT == 1 ? BLOCKS : 1]; /* in registers where there is room */
    tqi_results<NT, BLOCKS> results;
};

/* Fills the tables and q, for all warps. */
template <typename K, typename V, int NT, int BLOCKS>
TQI_D void tqi_warp_prepare(const tqi_attention & p, const tqi_task & task, unsigned char * shared) {
    constexpr tqi_warp_layout at = tqi_warp_layout_of(K::TYPE, V::TYPE, BLOCKS, NT);
    tqi_fill_table<K>(p.k.levels, (uint32_t *) (void *) shared);
    if (K::TYPE != V::TYPE) {
        tqi_fill_table<V>(p.v.levels, (uint32_t *) (void *) (shared + at.v_table));
    }
    tqi_load_queries<K, BLOCKS>(p, task, (tqi_quad *) (void *) (shared + at.q), (float *) (void *) (shared + at.scale),
                                (float *) (void *) (shared + at.slope));
    tqi_sync();
}

/* Nothing found yet. scale: (vectors). */
template <int NT, int BLOCKS>
TQI_D void tqi_warp_begin(const tqi_attention & p, const float * scale, tqi_results<NT, BLOCKS> * r) {
    TQI_UNROLL
    for (int i = 0; i < NT; ++i) {
        TQI_UNROLL
        for (int j = 0; j < 2 * BLOCKS; ++j) {
            r->o[i][j][0] = r->o[i][j][1] = r->o[i][j][2] = r->o[i][j][3] = 0.0f;
        }
        TQI_UNROLL
        for (int c = 0; c < 2; ++c) {
            r->sum[i][c] = 0.0f;
            r->base[i][c] = TQI_NO_BASE;
            r->scale[i][c] = scale[8 * i + c] * (p.softcap > 0.0f ? 1.0f : TQI_LOG2_E);
        }
    }
}

/* Which keys of a tile count. */
struct tqi_tile_keys {
    int left;   /* keys from the tile's first to the range's end */
    int owned;  /* by the tail: a bit for each key */
    bool plain; /* all of them count, as they are */
};

/* most_left: with fewer keys a tile is not plain. */
TQI_D tqi_tile_keys tqi_warp_keys(const tqi_attention & p, const tqi_task & task, const tqi_warp_loader & loader,
                                  const tqi_quad * mask, int t0, int most_left) {
    const int lane = tqi_thread() % 32;
    tqi_tile_keys keys = { task.end - t0, 0, false };
    uint32_t some = 0;
    if (p.n_recent > 0) {
        const bool owned = lane < keys.left && lane < TQI_WARP_TILE && tqi_owns_row(p, task, t0 + lane);
        keys.owned = (int) tqi_which_lanes(owned);
    }
    if (loader.n_mask > 0) {
        some = mask->word[0] | mask->word[1] | mask->word[2] | mask->word[3];
    }
    keys.plain = !tqi_any_lane(keys.left < most_left || (some | (uint32_t) keys.owned) != 0);
    return keys;
}

/* A tile of which some key counts: scores, weights, and what they find of V. */
template <typename K, typename V, int NT, int BLOCKS>
TQI_D void tqi_warp_tile(const tqi_attention & p, const unsigned char * shared, const uint8_t * stage,
                         const tqi_tile_keys & keys, tqi_warp_lane<K, V, NT, BLOCKS> * l) {
    constexpr tqi_warp_layout at = tqi_warp_layout_of(K::TYPE, V::TYPE, BLOCKS, NT);
    const int lane = tqi_thread() % 32, g = lane / 4, t = lane % 4;
    const int k_stride = tqi_warp_stride(K::TYPE, BLOCKS), v_stride = tqi_warp_stride(V::TYPE, BLOCKS);
    const tqi_quad * in_q = (const tqi_quad *) (const void *) (shared + at.q);
    tqi_results<NT, BLOCKS> * r = &l->results;
    float s[NT][4], x[NT][4];
    uint32_t weights[NT][2];
    const auto fragment = [&](int b, int i) {
        return NT == 1 ? l->q[NT == 1 ? b : 0] : in_q[(i * BLOCKS + b) * 32 + lane];
    };
    tqi_multiply_keys<K, NT, BLOCKS>((const uint32_t *) (const void *) shared, stage + l->in_k, k_stride, l->k_part,
                                     BLOCKS, fragment, s);
    if (keys.plain) {
        TQI_UNROLL
        for (int i = 0; i < 4 * NT; ++i) {
            x[i / 4][i % 4] = fmaf(s[i / 4][i % 4], r->scale[i / 4][i % 2], -r->base[i / 4][i % 2]);
        }
    } else {
        const int some = (keys.left < TQI_WARP_TILE ? (1 << keys.left) - 1 : 0xffff) & ~keys.owned;
        const uint16_t * mask = (const uint16_t *) (const void *) (stage + at.mask_in_stage);
        const float * slope = (const float *) (const void *) (shared + at.slope);
        TQI_UNROLL
        for (int i = 0; i < 4 * NT; ++i) {
            const int j = i % 4, vec = i / 4 * 8 + 2 * t + j % 2;
            s[i / 4][j] = tqi_score(p, mask, some, slope, s[i / 4][j] * r->scale[i / 4][j % 2], g + 8 * (j / 2), vec);
            x[i / 4][j] = s[i / 4][j] - r->base[i / 4][j % 2];
        }
    }
    tqi_warp_softmax<NT, BLOCKS>(keys.plain, s, x, r, weights);
    tqi_multiply_values<V, NT, BLOCKS / 2>((const uint32_t *) (const void *) (shared + at.v_table), stage + l->in_v,
                                           v_stride, l->v_parts, 0xffffffffu, weights, r->o);
}

/* All warps' results, through the memory where tiles were. */
template <typename K, typename V, int NT, int BLOCKS>
TQI_D void tqi_warp_end(const tqi_attention & p, const tqi_task & task, unsigned char * shared,
                        tqi_results<NT, BLOCKS> * r) {
    constexpr tqi_warp_layout at = tqi_warp_layout_of(K::TYPE, V::TYPE, BLOCKS, NT);
    const int lane = tqi_thread() % 32, warp = tqi_thread() / 32, g = lane / 4, t = lane % 4;
    tqi_of_warps * bases = (tqi_of_warps *) (void *) (shared + at.bases);
    tqi_of_warps * totals = (tqi_of_warps *) (void *) (shared + at.totals);
    tqi_tile_part * parts = (tqi_tile_part *) (void *) (shared + at.stages);
    TQI_UNROLL
    for (int i = 0; i < NT; ++i) {
        tqi_sync();
        TQI_UNROLL
        for (int j = 0; j < 2 * BLOCKS; ++j) {
            const float * o = r->o[i][j];
            parts[(warp * 2 * BLOCKS + j) * TQI_PART_STRIDE + lane] = { { o[0], o[1], o[2], o[3] } };
        }
        TQI_UNROLL
        for (int c = 0; c < 2; ++c) {
            r->sum[i][c] = tqi_add_lanes<4, 32>(r->sum[i][c]);
            if (g == 0) {
                bases[8 * i + 2 * t + c].of[warp] = r->base[i][c];
                totals[8 * i + 2 * t + c].of[warp] = r->sum[i][c];
            }
        }
        tqi_sync();
        tqi_weigh_warps(p, task, task.vec0 + 8 * i, bases + 8 * i, totals + 8 * i);
        tqi_sync();
        tqi_add_warps<V, BLOCKS>(p, task, task.vec0 + 8 * i, parts, bases + 8 * i);
    }
}

/* One range of keys, from beginning to end. K, V: types. */
template <typename K, typename V, int NT, int BLOCKS>
TQI_D void tqi_attend_by_warps(const tqi_attention & p, unsigned char * shared) {
    constexpr tqi_warp_layout at = tqi_warp_layout_of(K::TYPE, V::TYPE, BLOCKS, NT);
    const tqi_task task = tqi_task_of(p, 8 * NT);
    const int lane = tqi_thread() % 32, warp = tqi_thread() / 32, g = lane / 4, t = lane % 4;
    const int begin = task.begin + TQI_WARP_TILE * warp, slice = g * (BLOCKS / 2); /* the first of V's */
    const int first = at.stages + warp * p.n_stages * at.stage_bytes; /* of the stages that this warp has */
    tqi_warp_lane<K, V, NT, BLOCKS> l;
    l.in_k = tqi_keep(tqi_lead(p.k, task) + g * tqi_warp_stride(K::TYPE, BLOCKS));
    l.in_v = tqi_keep(at.v_in_stage + tqi_lead(p.v, task) + 2 * t * tqi_warp_stride(V::TYPE, BLOCKS));
    tqi_warp_loader loader = tqi_warp_loader_of(K::TYPE == V::TYPE, p, task, begin, at.mask_in_stage);
    for (int i = 0; i < p.n_stages - 1; ++i) {
        tqi_warp_load<K, V, BLOCKS>(p, &loader, task.end - begin - i * TQI_WARP_STEP,
                                    shared + first + i * at.stage_bytes);
    }
    tqi_warp_prepare<K, V, NT, BLOCKS>(p, task, shared);
    TQI_UNROLL
    for (int b = 0; b < BLOCKS && NT == 1; ++b) {
        l.q[NT == 1 ? b : 0] = ((const tqi_quad *) (const void *) (shared + at.q))[b * 32 + lane];
    }
    tqi_warp_begin<NT, BLOCKS>(p, (const float *) (const void *) (shared + at.scale) + 2 * t, &l.results);
    l.k_part = K::place_of(t);
    l.v_parts = tqi_parts_of<V, BLOCKS / 2>(slice / 4, slice % 4);

    const int most_left = tqi_keep(p.softcap > 0.0f ? INT32_MAX : TQI_WARP_TILE);
    const int last = tqi_keep(first + (p.n_stages - 1) * at.stage_bytes);
    const int ahead = tqi_keep(task.end - (p.n_stages - 1) * TQI_WARP_STEP);
    int stage = first, free = last; /* the tile's, and the one that its predecessor was in */
    TQI_NO_UNROLL
    for (int t0 = begin; t0 < task.end; t0 += TQI_WARP_STEP) {
        if (p.n_stages == 3) {
            tqi_copy_wait<1>();
        } else {
            tqi_copy_wait<0>();
        }
        tqi_sync_warp(); /* the tile is there, and the one before it is done with */
        tqi_warp_load<K, V, BLOCKS>(p, &loader, ahead - t0, shared + free);
        const tqi_quad * mask = (const tqi_quad *) (const void *) (shared + stage + loader.to_mask);
        const tqi_tile_keys keys = tqi_warp_keys(p, task, loader, mask, t0, most_left);
        if (keys.plain || (keys.owned != 0xffff && (loader.n_mask == 0 || tqi_any_lane(!tqi_mask_hides(*mask))))) {
            tqi_warp_tile(p, shared, shared + stage, keys, &l);
        }
        free = stage;
        stage = stage == last ? first : stage + at.stage_bytes;
    }
    tqi_warp_end<K, V, NT, BLOCKS>(p, task, shared, &l.results);
}

#endif
