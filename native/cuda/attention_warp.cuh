/* attention_warp.cuh: the same attention where heads of K and V have 64, 128, 256 or 512 values, for the pairs of types
 * of attention_kernels.cuh: what decoding runs on, and so what must be fast. What it costs is instructions, not memory
 * (docs/cuda.md).
 *
 * A warp works alone: 16 keys at a time, every eighth such tile of the block's range. It copies them, finds their
 * scores, keeps them in registers, and adds up the values of all DV dimensions. So nothing but the tables and q is
 * shared with other warps, and no barrier is met between the first key and the last; results are added at the end.
 *
 *   scores      S = K q: keys down, query vectors across.
 *   softmax     A lane has keys g and g + 8 of vectors 2 t and 2 t + 1. Weights are 2^(score - base); base follows the
 *               largest score only when a weight would get too large for f16: a common factor of weights cancels out.
 *   accumulate  O = V^T P: weights become the other operand by a transposition. A lane has the same vectors of O as of
 *               S, and takes half a block of each token's V, a quarter with heads of 64, all of it with those of 256.
 *
 * A warp has registers for the results of 8 blocks and eight query vectors. Of larger heads, or of 16 vectors, a team
 * of two or four warps takes the same keys, each warp a part of their K and V, which it copies by itself; what they
 * find of scores they add up behind a barrier of the team.
 *
 * Two or three tiles per warp are on their way or in use, so that a warp waits for none but its own copies. */
#ifndef TQI_ATTENTION_WARP_CUH
#define TQI_ATTENTION_WARP_CUH

#include "attention.cuh"

#define TQI_WEIGHT_LOG2 10.0f      /* TQI_WEIGHT = 2^10 is what the largest score's weight begins as, */
#define TQI_MOST_WEIGHT_LOG2 15.0f /* and up to 2^15 it may grow */
#define TQI_NO_BASE -1e30f         /* no key has been seen: any score exceeds it, and hidden keys still get 0 */
#define TQI_ALL_HIDDEN (TQI_F16_NEGATIVE_INFINITY * 0x10001u)

/* What a kernel is made for: types of K and V, tiles of eight query vectors, and blocks of a head. */
template <typename K_TYPE, typename V_TYPE, int N_TILES, int HEAD> struct tqi_warp_shape {
    typedef K_TYPE K;
    typedef V_TYPE V;
    static constexpr int NT = N_TILES;
    static constexpr int TEAM = tqi_team_of(HEAD, NT); /* warps that share a head's tile of keys */
    static constexpr int BLOCKS = HEAD / TEAM;         /* each one's part of the head */
    static constexpr tqi_warp_layout at = tqi_warp_layout_of(K::TYPE, V::TYPE, BLOCKS, NT, TEAM);
    static_assert(at.q % 16 == 0 && at.bases % 16 == 0 && at.scores % 16 == 0 && at.stages % 16 == 0 &&
                      at.stage_bytes % 16 == 0,
                  "copies and loads of 16 bytes");
};

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

/* begin: the warp's first key. */
template <typename S>
TQI_D tqi_warp_loader tqi_warp_loader_of(const tqi_attention & p, const tqi_task & task, int begin) {
    constexpr bool one = S::K::TYPE == S::V::TYPE;
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
    l.mask_step = p.mask == NULL ? 0 : 2 * tqi_warp_step(S::TEAM);
    l.to_k = tqi_keep((int) (of_k.to_and_row & 0xfffffu));
    l.to_v = one ? l.to_k : tqi_keep((int) (of_v.to_and_row & 0xfffffu));
    l.row_k = (int) (of_k.to_and_row >> 20);
    l.row_v = one ? l.row_k : (int) (of_v.to_and_row >> 20);
    l.to_mask = tqi_keep(S::at.mask_in_stage + 16 * of_mask);
    l.whole = tqi_keep(p.wide ? TQI_WARP_TILE : INT32_MAX);
    return l;
}

/* Starts to copy a whole tile of one operand, 16 bytes at a time, to AT bytes behind to: each lane of every so many
 * rows, rows FIRST and after. */
template <typename T, int BLOCKS, int AT, int FIRST = 0>
TQI_D void tqi_warp_copy(const tqi_operand & x, const uint8_t * from, uint8_t * to) {
    constexpr int units = tqi_wide_units(T::BYTES * BLOCKS), rows_on = 32 / units;
    constexpr int at = AT + FIRST * tqi_warp_stride(T::TYPE, BLOCKS);
    static_assert(units <= 32, "a row is copied by one warp at once");
    const int row = tqi_thread() % 32 / units;
    if (row < rows_on && row < TQI_WARP_TILE - FIRST) {
        tqi_copy_async<16, at>(to, from + FIRST / rows_on * x.step);
    }
    if constexpr (FIRST + rows_on < TQI_WARP_TILE) {
        tqi_warp_copy<T, BLOCKS, AT, FIRST + rows_on>(x, from, to);
    }
}

/* Starts to load n keys, which may be too many for a tile, or none; K, V and mask. */
template <typename S> TQI_D void tqi_warp_load(const tqi_attention & p, tqi_warp_loader * l, int n, uint8_t * stage) {
    constexpr int v_in_stage = S::at.v_in_stage;
    if (n >= l->whole) {
        tqi_warp_copy<typename S::K, S::BLOCKS, 0>(p.k, l->k, stage + l->to_k);
        tqi_warp_copy<typename S::V, S::BLOCKS, v_in_stage>(p.v, l->v, stage + l->to_v);
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

/* Halves of f16 pairs: all of them, or those of tokens first and first + 1 that have a bit in `some`. */
TQI_D uint32_t tqi_halves_of(int some, int first) {
    return (some >> first & 1 ? 0xffffu : 0u) | (some >> first & 2 ? 0xffff0000u : 0u);
}

/* A bit for each of 16 keys that has some weight. x: weights, of keys g and g + 8; n_vec: query vectors that there are,
 * for others have no mask. */
template <int NT> TQI_D int tqi_keys_with_weight(const float (*x)[4], int n_vec) {
    const int vec = 2 * (tqi_thread() % 4);
    bool any[2] = { false, false };
    TQI_UNROLL
    for (int i = 0; i < 4 * NT; ++i) {
        const bool there = i / 4 * 8 + vec + i % 2 < n_vec;
        any[i % 4 / 2] = any[i % 4 / 2] || (there && x[i / 4][i % 4] != 0.0f);
    }
    int some = 0;
    TQI_UNROLL
    for (int c = 0; c < 2; ++c) {
        uint32_t lanes = tqi_which_lanes(any[c]); /* four for each key */
        lanes = (lanes | lanes >> 1 | lanes >> 2 | lanes >> 3) & 0x11111111u;
        lanes = (lanes | lanes >> 3) & 0x03030303u;
        lanes = (lanes | lanes >> 6) & 0x000f000fu;
        some |= (int) ((lanes | lanes >> 12) & 0xffu) << (8 * c);
    }
    return some;
}

/* weights <- 2^x as fragments; x: scores less their base, then the weights. s: the scores, to be multiplied by scale if
 * plain. */
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

/* Where the lanes of tqi_add_warps find two values. Sixteen lanes take a block of two vectors, u and t of 16 and 4; b:
 * blocks from the first of a round on. */
struct tqi_found {
    int tile, g; /* of a lane's results, and which lanes: g counts from the first of the round */
    int value;   /* the first of the two, from the round's first block on; in f16, of the part of the head */
};

template <typename V, int BLOCKS> TQI_D tqi_found tqi_found_of(int round, int b, int u) {
    const int n_slices = BLOCKS / 2, slice = 4 * b + u / 4;
    if constexpr (V::TYPE == TQ_TYPE_F16) { /* tqi_multiply_plain_values */
        const int n = tqi_result_lanes(BLOCKS) / 4, tile = (16 * b + u) / n, g = (16 * b + u) % n;
        return { tile, g, 16 * tile + 2 * (round * n + g) };
    }
    return { slice % n_slices * 4 + u % 4, slice / n_slices,
             (4 * round + b) * TQ_BLOCK + tqi_dim(V::ORDER, u / 4, 2 * (u % 4)) };
}

/* Adds up what the warps found of eight query vectors in a part of the head, in the four blocks of a round or fewer,
 * and writes it. parts: (warps that have that part, tiles of 2 * 8 dimensions, tqi_part_stride). */
template <typename S>
TQI_D void tqi_add_warps(const tqi_attention & p, const tqi_task & task, int vec0, int part, int round,
                         const tqi_tile_part * parts, const tqi_of_warps * factors) {
    constexpr int BLOCKS = S::BLOCKS, n_values = S::TEAM * BLOCKS * TQ_BLOCK;
    const int lane = tqi_thread() % 32, warp = tqi_thread() / 32, b = warp / 2, t = warp % 2 * 2 + lane / 16;
    const tqi_found found = tqi_found_of<typename S::V, BLOCKS>(round, b, lane % 16);
    const int stride = tqi_part_stride(BLOCKS), from = found.tile * stride + found.g * 4 + t;
    const int dim = part * BLOCKS * TQ_BLOCK + found.value; /* and the next one */
    if (BLOCKS < 4 && b >= BLOCKS) {
        return;
    }
    const tqi_of_warps factor[2] = { factors[2 * t], factors[2 * t + 1] };
    float x[2][2] = { { 0.0f, 0.0f }, { 0.0f, 0.0f } }; /* (vectors, dimensions) */
    TQI_UNROLL
    for (int i = 0; i < TQI_WARPS / S::TEAM; ++i) {
        const tqi_tile_part mine = parts[from + i * 2 * BLOCKS * stride];
        TQI_UNROLL
        for (int j = 0; j < 4; ++j) {
            x[j % 2][j / 2] += factor[j % 2].of[i * S::TEAM + part] * mine.of[j];
        }
    }
    const int vec = vec0 + 2 * t;
    if (p.n_parts > 1) {
        float * to = p.partials + tqi_part_of(p, task, vec) * n_values + dim;
        TQI_UNROLL
        for (int c = 0; c < 2; ++c) {
            if (vec + c < p.n_vec) {
                *(tqi_pair *) (void *) (to + c * p.n_parts * n_values) = { { x[c][0], x[c][1] } };
            }
        }
        return;
    }
    TQI_UNROLL
    for (int c = 0; c < 2; ++c) {
        if (tqi_bits_of(S::V::TYPE) > 0) {
            tqi_transform_pairs(!p.v.signs_first, x[c], lane, dim % TQ_BLOCK);
        }
        if (vec + c < p.n_vec) {
            float * out = tqi_output_of(p, task, vec + c) + dim;
            out[0] = x[c][0];
            out[1] = x[c][1];
        }
    }
}

/* ---- One range of keys ---- */

/* What a lane knows all along. */
template <typename S> struct tqi_warp_lane {
    static constexpr int n_slices = S::BLOCKS / 2;                /* of V's that a lane takes */
    static constexpr bool keeps_q = S::NT == 1 && S::BLOCKS <= 4; /* in registers, where there is room */

    int in_k, in_v; /* its rows in a stage */
    int turn;       /* of the two places where a team adds up scores */
    typename S::K::place k_part;
    tqi_parts<typename S::V, n_slices> v_parts;
    tqi_quad q[keeps_q ? S::BLOCKS : 1];
    tqi_results<S::NT, S::BLOCKS> results;
};

/* Fragment b of its part of query vectors 8 i to 8 i + 7, in shared memory. */
template <typename S> TQI_D tqi_quad tqi_warp_query(const unsigned char * shared, int b, int i) {
    const int lane = tqi_thread() % 32, warp = tqi_thread() / 32,
              block = (i * S::TEAM + (S::TEAM > 1 ? warp % S::TEAM : 0)) * S::BLOCKS + b;
    return ((const tqi_quad *) (const void *) (shared + S::at.q))[block * 32 + lane];
}

/* Fills the tables and q, for all warps. */
template <typename S>
TQI_D void tqi_warp_prepare(const tqi_attention & p, const tqi_task & task, unsigned char * shared) {
    tqi_fill_table<typename S::K>(p.k.levels, (uint32_t *) (void *) shared);
    if (S::K::TYPE != S::V::TYPE) {
        tqi_fill_table<typename S::V>(p.v.levels, (uint32_t *) (void *) (shared + S::at.v_table));
    }
    tqi_load_queries<typename S::K, S::TEAM * S::BLOCKS>(p, task, (tqi_quad *) (void *) (shared + S::at.q),
                                                         (float *) (void *) (shared + S::at.scale),
                                                         (float *) (void *) (shared + S::at.slope));
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

/* Scores of a tile: what the warps of a team found, each of its part of the head, added up in one order, so that all of
 * them go on with the same. There are two places for it, in turn: who writes one again knows that all have read it. */
template <typename S> TQI_D void tqi_add_scores(unsigned char * shared, int * turn, float (*s)[4]) {
    const int lane = tqi_thread() % 32, warp = tqi_thread() / 32, first = warp / S::TEAM * S::TEAM;
    tqi_tile_part * scores = (tqi_tile_part *) (void *) (shared + S::at.scores + *turn) + lane;
    TQI_UNROLL
    for (int i = 0; i < S::NT; ++i) {
        scores[(warp * S::NT + i) * 32] = { { s[i][0], s[i][1], s[i][2], s[i][3] } };
    }
    tqi_sync_warps<S::TEAM>();
    TQI_UNROLL
    for (int i = 0; i < S::NT; ++i) {
        TQI_UNROLL
        for (int part = 0; part < S::TEAM; ++part) {
            const tqi_tile_part x = scores[((first + part) * S::NT + i) * 32];
            TQI_UNROLL
            for (int j = 0; j < 4; ++j) {
                s[i][j] = part == 0 ? x.of[j] : s[i][j] + x.of[j];
            }
        }
    }
    *turn ^= TQI_WARPS * S::NT * TQI_FRAGMENTS_BYTES;
}

/* A tile of which some key counts: scores, weights, and what they find of V. */
template <typename S>
TQI_D void tqi_warp_tile(const tqi_attention & p, int n_vec, unsigned char * shared, const uint8_t * stage,
                         const tqi_tile_keys & keys, tqi_warp_lane<S> * l) {
    typedef typename S::K K;
    typedef typename S::V V;
    constexpr int NT = S::NT, BLOCKS = S::BLOCKS;
    const int lane = tqi_thread() % 32, g = lane / 4, t = lane % 4;
    const int k_stride = tqi_warp_stride(K::TYPE, BLOCKS), v_stride = tqi_warp_stride(V::TYPE, BLOCKS);
    tqi_results<NT, BLOCKS> * r = &l->results;
    float s[NT][4], x[NT][4];
    uint32_t weights[NT][2];
    const auto fragment = [&](int b, int i) {
        return l->keeps_q ? l->q[l->keeps_q ? b : 0] : tqi_warp_query<S>(shared, b, i);
    };
    tqi_multiply_keys<K, NT, BLOCKS>((const uint32_t *) (const void *) shared, stage + l->in_k, k_stride, l->k_part,
                                     BLOCKS, fragment, s);
    if constexpr (S::TEAM > 1) {
        tqi_add_scores<S>(shared, &l->turn, s);
    }
    if (keys.plain) {
        TQI_UNROLL
        for (int i = 0; i < 4 * NT; ++i) {
            x[i / 4][i % 4] = fmaf(s[i / 4][i % 4], r->scale[i / 4][i % 2], -r->base[i / 4][i % 2]);
        }
    } else {
        const int some = (keys.left < TQI_WARP_TILE ? (1 << keys.left) - 1 : 0xffff) & ~keys.owned;
        const uint16_t * mask = (const uint16_t *) (const void *) (stage + S::at.mask_in_stage);
        const float * slope = (const float *) (const void *) (shared + S::at.slope);
        TQI_UNROLL
        for (int i = 0; i < 4 * NT; ++i) {
            const int j = i % 4, vec = i / 4 * 8 + 2 * t + j % 2;
            s[i / 4][j] = tqi_score(p, mask, some, slope, s[i / 4][j] * r->scale[i / 4][j % 2], g + 8 * (j / 2), vec);
            x[i / 4][j] = s[i / 4][j] - r->base[i / 4][j % 2];
        }
    }
    tqi_warp_softmax<NT, BLOCKS>(keys.plain, s, x, r, weights);
    if constexpr (V::TYPE == TQ_TYPE_F16) {
        const int some = keys.plain ? 0xffff : tqi_keys_with_weight<NT>(x, n_vec);
        const uint32_t keep[2] = { tqi_halves_of(some, 2 * t), tqi_halves_of(some, 2 * t + 8) };
        tqi_multiply_plain_values<NT, BLOCKS>(stage + l->in_v, v_stride, keep, weights, r->o);
    } else {
        tqi_multiply_values<V, NT, BLOCKS / 2>((const uint32_t *) (const void *) (shared + S::at.v_table),
                                               stage + l->in_v, v_stride, l->v_parts, 0xffffffffu, weights, r->o);
    }
}

/* All warps' results, through the memory where tiles were. */
template <typename S>
TQI_D void tqi_warp_end(const tqi_attention & p, const tqi_task & task, unsigned char * shared,
                        tqi_results<S::NT, S::BLOCKS> * r) {
    const int lane = tqi_thread() % 32, warp = tqi_thread() / 32, g = lane / 4, t = lane % 4;
    tqi_of_warps * bases = (tqi_of_warps *) (void *) (shared + S::at.bases);
    tqi_of_warps * totals = (tqi_of_warps *) (void *) (shared + S::at.totals);
    tqi_tile_part * parts = (tqi_tile_part *) (void *) (shared + S::at.stages);
    constexpr int n_lanes = tqi_result_lanes(S::BLOCKS), n_rounds = 32 / n_lanes, stride = tqi_part_stride(S::BLOCKS);
    TQI_UNROLL
    for (int i = 0; i < S::NT; ++i) {
        const int vec0 = task.vec0 + 8 * i;
        TQI_UNROLL
        for (int c = 0; c < 2; ++c) {
            r->sum[i][c] = tqi_add_lanes<4, 32>(r->sum[i][c]);
            if (g == 0) {
                bases[8 * i + 2 * t + c].of[warp] = r->base[i][c];
                totals[8 * i + 2 * t + c].of[warp] = task.part == 0 ? r->sum[i][c] : 0.0f; /* a team has one sum */
            }
        }
        TQI_UNROLL
        for (int j = 0; j < S::TEAM * n_rounds;
             ++j) { /* a part of the head, and of it the lanes that have four blocks */
            const bool mine =
                (S::TEAM == 1 || task.part == j / n_rounds) && (n_rounds == 1 || lane / n_lanes == j % n_rounds);
            tqi_sync();
            TQI_UNROLL
            for (int n = 0; n < 2 * S::BLOCKS; ++n) {
                const float * o = r->o[i][n];
                if (mine) {
                    parts[(warp / S::TEAM * 2 * S::BLOCKS + n) * stride + lane % n_lanes] = { { o[0], o[1], o[2],
                                                                                                o[3] } };
                }
            }
            tqi_sync();
            if (j == 0) {
                tqi_weigh_warps(p, task, vec0, bases + 8 * i, totals + 8 * i);
                tqi_sync();
            }
            tqi_add_warps<S>(p, task, vec0, j / n_rounds, j % n_rounds, parts, bases + 8 * i);
        }
    }
}

/* One range of keys, from beginning to end. S: a tqi_warp_shape. */
template <typename S> TQI_D void tqi_attend_by_warps(const tqi_attention & p, unsigned char * shared) {
    typedef typename S::K K;
    typedef typename S::V V;
    constexpr int NT = S::NT, BLOCKS = S::BLOCKS, step = tqi_warp_step(S::TEAM), stage_bytes = S::at.stage_bytes;
    const int lane = tqi_thread() % 32, warp = tqi_thread() / 32, g = lane / 4, t = lane % 4;
    tqi_task task = tqi_task_of(p, 8 * NT);
    task.part = S::TEAM > 1 ? warp % S::TEAM : 0;
    const int begin = task.begin + TQI_WARP_TILE * (warp / S::TEAM), slice = g * (BLOCKS / 2); /* the first of V's */
    const int first = S::at.stages + warp * p.n_stages * stage_bytes; /* of the stages that this warp has */
    tqi_warp_lane<S> l;
    l.in_k = tqi_keep(tqi_lead(p.k, task) + g * tqi_warp_stride(K::TYPE, BLOCKS));
    l.in_v = tqi_keep(S::at.v_in_stage + tqi_lead(p.v, task) + 2 * t * tqi_warp_stride(V::TYPE, BLOCKS));
    l.turn = 0;
    tqi_warp_loader loader = tqi_warp_loader_of<S>(p, task, begin);
    for (int i = 0; i < p.n_stages - 1; ++i) {
        tqi_warp_load<S>(p, &loader, task.end - begin - i * step, shared + first + i * stage_bytes);
    }
    tqi_warp_prepare<S>(p, task, shared);
    TQI_UNROLL
    for (int b = 0; b < BLOCKS && l.keeps_q; ++b) {
        l.q[l.keeps_q ? b : 0] = tqi_warp_query<S>(shared, b, 0);
    }
    tqi_warp_begin<NT, BLOCKS>(p, (const float *) (const void *) (shared + S::at.scale) + 2 * t, &l.results);
    l.k_part = K::place_of(t);
    l.v_parts = tqi_parts_of<V, BLOCKS / 2>(slice / 4, slice % 4);

    const int most_left = tqi_keep(p.softcap > 0.0f ? INT32_MAX : TQI_WARP_TILE);
    const int last = tqi_keep(first + (p.n_stages - 1) * stage_bytes);
    const int ahead = tqi_keep(task.end - (p.n_stages - 1) * step);
    int stage = first, free = last; /* the tile's, and the one that its predecessor was in */
    TQI_NO_UNROLL
    for (int t0 = begin; t0 < task.end; t0 += step) {
        if (p.n_stages == 3) {
            tqi_copy_wait<1>();
        } else {
            tqi_copy_wait<0>();
        }
        tqi_sync_warp(); /* the tile is there, and the one before it is done with */
        tqi_warp_load<S>(p, &loader, ahead - t0, shared + free);
        const tqi_quad * mask = (const tqi_quad *) (const void *) (shared + stage + loader.to_mask);
        const tqi_tile_keys keys = tqi_warp_keys(p, task, loader, mask, t0, most_left);
        if (keys.plain || (keys.owned != 0xffff && (loader.n_mask == 0 || tqi_any_lane(!tqi_mask_hides(*mask))))) {
            tqi_warp_tile(p, p.n_vec - task.vec0, shared, shared + stage, keys, &l);
        }
        free = stage;
        stage = stage == last ? first : stage + stage_bytes;
    }
    tqi_warp_end<S>(p, task, shared, &l.results);
}

#endif
