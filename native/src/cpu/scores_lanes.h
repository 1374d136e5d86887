/* scores_lanes.h: scores of keys whose blocks lie in lanes (lanes.h).
 *
 * The including file defines
 *   key_table, load_key_table(bits, codec)  a codebook for multiply_blocks
 *   multiply_blocks(bits, n_q, wide, &c, at, stride, n_tok, n, query, n_floats, total)  adds to total, one vector for
 *       each of n_q query vectors, the products of the first n <= wide blocks of a vector's tokens, from `at` on, with a
 *       part of the queries, which lie n_floats apart */
#ifndef TQI_SCORES_LANES_H
#define TQI_SCORES_LANES_H

/* Floats of a part of a query vector: what as many blocks as a vector has lanes are multiplied by. */
#define PART_FLOATS (TQI_QUERY_FLOATS(4) / 4 * N_LANES)

INLINE void scores_wide(int bits, int n_q, int wide, const tqi_codec * codec, const uint8_t * k, size_t stride,
                        int n_tok, const float * query, int n_blocks, float * s, int ld) {
    const key_table c = load_key_table(bits, codec);
    for (int t = 0; t < n_tok; t += LANES) {
        vec all[TQI_MAX_FUSED][N_LANES];
        for (int j = t; j < n_tok && j < t + LANES; ++j) {
            tqi_prefetch(k + (size_t) (TQI_AHEAD + j) * stride, (size_t) n_blocks * TQI_BLOCK_BYTES(bits));
        }
        for (int g = 0; g < wide; ++g) {
            const int t1 = t + g * N_TOKENS(wide);
            const uint8_t * at = k + (size_t) (t1 < n_tok ? t1 : n_tok - 1) * stride;
            vec total[TQI_MAX_FUSED];
            for (int i = 0; i < n_q; ++i) {
                total[i] = v_set1(0.0f);
            }
            for (int b = 0; b < n_blocks; b += wide) {
                multiply_blocks(bits, n_q, wide, &c, at + (size_t) b * TQI_BLOCK_BYTES(bits), stride, n_tok - t1,
                                n_blocks - b < wide ? n_blocks - b : wide, query + (size_t) (b / wide) * PART_FLOATS,
                                TQI_QUERY_FLOATS(n_blocks), total);
            }
            for (int i = 0; i < n_q; ++i) {
                all[i][g] = total[i];
            }
        }
        for (int i = 0; i < n_q; ++i) {
            v_store_first(s + i * ld + t, n_tok - t, sum_blocks(wide, all[i]));
        }
    }
}

INLINE void scores_lanes(int bits, int n_q, const tqi_codec * codec, const uint8_t * k, size_t stride, int n_tok,
                         const float * query, int n_blocks, float * s, int ld) {
    if (WIDE(n_blocks) < N_LANES) {
        scores_wide(bits, n_q, 2, codec, k, stride, n_tok, query, n_blocks, s, ld);
    } else {
        scores_wide(bits, n_q, N_LANES, codec, k, stride, n_tok, query, n_blocks, s, ld);
    }
}

#endif
