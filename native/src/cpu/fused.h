/* fused.h: the attention steps in f32, over the vocabulary of vector.h: each block is decoded once for all query
 * vectors. The including file defines what unpack.h needs, and
 *   DECODE_AHEAD   whether accumulate decodes codes of all tokens first, because opening a block takes long */
#include "unpack.h"

static void load_query(const tqi_codec * codec, const float * q, int n_blocks, float * query) {
    (void) codec;
    memcpy(query, q, (size_t) n_blocks * TQ_BLOCK * sizeof(float));
}

INLINE void scores_rows(int bits, int n_q, const tqi_codec * codec, const uint8_t * k, size_t stride, int n_tok,
                        const float * query, int n_blocks, float * s, int ld) {
    const decoder c = load_decoder(bits, codec);
    for (int t = 0; t < n_tok; ++t) {
        const uint8_t * in = k + (size_t) t * stride;
        vec total[TQI_MAX_FUSED];
        tqi_prefetch(in + TQI_AHEAD * stride, (size_t) n_blocks * TQI_BLOCK_BYTES(bits));
        for (int i = 0; i < n_q; ++i) {
            total[i] = v_set1(0.0f);
        }
        for (int b = 0; b < n_blocks; ++b, in += TQI_BLOCK_BYTES(bits)) {
            const vec d = v_set1(scale_of(in));
            const codes x = open_block(bits, &c, in);
            vec v[N_VEC];
            UNROLL
            for (int g = 0; g < N_VEC; ++g) {
                v[g] = values(bits, &c, x, g);
            }
            for (int i = 0; i < n_q; ++i) {
                const float * qi = query + i * (int) TQI_QUERY_FLOATS(n_blocks) + b * TQ_BLOCK;
                vec p = v_mul(v[0], v_load(qi));
                for (int g = 1; g < N_VEC; ++g) {
                    p = v_fma(v[g], v_load(qi + LANES * g), p);
                }
                total[i] = v_fma(d, p, total[i]);
            }
        }
        for (int i = 0; i < n_q; ++i) {
            s[i * ld + t] = v_sum(total[i]);
        }
    }
}

/* n_vec vectors of a block at a time keep their sums for all query vectors in registers over all tokens. */
INLINE void accumulate_rows(int bits, int n_q, const tqi_codec * codec, const uint8_t * v, size_t stride, int n_tok,
                            const float * p, int ld, int n_blocks, float * o) {
    const decoder c = load_decoder(bits, codec);
    const int most = SUMS / (n_q + 1), n_vec = most >= N_VEC ? N_VEC : most >= 2 ? 2 : 1;
    for (int b = 0; b < n_blocks; ++b, v += TQI_BLOCK_BYTES(bits)) {
        codes opened[TQI_AHEAD];
        float scale[TQI_AHEAD];
        for (int t = 0; t < n_tok && DECODE_AHEAD; ++t) {
            const uint8_t * in = v + (size_t) t * stride;
            tqi_prefetch(in + TQI_AHEAD * stride, TQI_BLOCK_BYTES(bits));
            opened[t] = open_block(bits, &c, in);
            scale[t] = scale_of(in);
        }
        for (int g = 0; g < N_VEC; g += n_vec) {
            const uint8_t * in = v;
            float * ob = o + b * TQ_BLOCK + LANES * g;
            vec sum[TQI_MAX_FUSED][N_VEC];
            for (int i = 0; i < n_q; ++i) {
                for (int h = 0; h < n_vec; ++h) {
                    sum[i][h] = v_load(ob + i * n_blocks * TQ_BLOCK + LANES * h);
                }
            }
            for (int t = 0; t < n_tok; ++t, in += stride) {
                const vec d = v_set1(DECODE_AHEAD ? scale[t] : scale_of(in));
                const codes from = DECODE_AHEAD ? opened[t] : open_block(bits, &c, in);
                vec x[N_VEC];
                if (!DECODE_AHEAD && g == 0) {
                    tqi_prefetch(in + TQI_AHEAD * stride, TQI_BLOCK_BYTES(bits));
                }
                for (int h = 0; h < n_vec; ++h) {
                    x[h] = values(bits, &c, from, g + h);
                }
                for (int i = 0; i < n_q; ++i) {
                    const vec w = v_mul(d, v_load_all(p + i * ld + t));
                    for (int h = 0; h < n_vec; ++h) {
                        sum[i][h] = v_fma(w, x[h], sum[i][h]);
                    }
                }
            }
            for (int i = 0; i < n_q; ++i) {
                for (int h = 0; h < n_vec; ++h) {
                    v_store(ob + i * n_blocks * TQ_BLOCK + LANES * h, sum[i][h]);
                }
            }
        }
    }
}
