/* rows_f16.h: attention steps over the f16 rows of a tail, and how such rows are rounded, for any width of vector.
 *
 * The including file defines lanes of f32: VF (type), VF_LANES (1, 4, 8 or 16), vf_zero(), vf_set1(x), vf_load(p), vf_store(p, a),
 * vf_load_f16(p), vf_store_f16(p, a) (rounds to nearest even), vf_clamp(a, limit), vf_fma(a, b, c) = a b + c, vf_sum(a); and
 * INLINE. The rows are few beside the blocks of a cache and are read in f32: what they cost is the conversion. */
#include "kernels.h"

INLINE void scores_f16_rows(int n_q, const uint8_t * k, size_t stride, int n_tok, const float * q, int dim, float * s,
                            int ld) {
    for (int t = 0; t < n_tok; ++t) {
        const uint16_t * row = (const uint16_t *) (const void *) (k + (size_t) t * stride);
        VF sum[TQI_MAX_FUSED];
        for (int i = 0; i < n_q; ++i) {
            sum[i] = vf_zero();
        }
        for (int j = 0; j < dim; j += VF_LANES) {
            const VF x = vf_load_f16(row + j);
            for (int i = 0; i < n_q; ++i) {
                sum[i] = vf_fma(x, vf_load(q + i * dim + j), sum[i]);
            }
        }
        for (int i = 0; i < n_q; ++i) {
            s[i * ld + t] = vf_sum(sum[i]);
        }
    }
}

INLINE void accumulate_f16_rows(int n_q, const uint8_t * v, size_t stride, int n_tok, const float * p, int ld, int dim,
                                float * o) {
    for (int j = 0; j < dim; j += VF_LANES) {
        VF sum[TQI_MAX_FUSED];
        for (int i = 0; i < n_q; ++i) {
            sum[i] = vf_load(o + i * dim + j);
        }
        for (int t = 0; t < n_tok; ++t) {
            const VF x = vf_load_f16((const uint16_t *) (const void *) (v + (size_t) t * stride) + j);
            for (int i = 0; i < n_q; ++i) {
                sum[i] = vf_fma(x, vf_set1(p[i * ld + t]), sum[i]);
            }
        }
        for (int i = 0; i < n_q; ++i) {
            vf_store(o + i * dim + j, sum[i]);
        }
    }
}

#define SCORES_F16(BITS, N_Q, ...) scores_f16_rows(N_Q, __VA_ARGS__)
#define ACCUMULATE_F16(BITS, N_Q, ...) accumulate_f16_rows(N_Q, __VA_ARGS__)

static void scores_f16(const uint8_t * k, size_t stride, int n_tok, const float * q, int n_q, int dim, float * s,
                       int ld) {
    TQI_BY_N_Q(SCORES_F16, 16, n_q, k, stride, n_tok, q, dim, s, ld)
}

static void accumulate_f16(const uint8_t * v, size_t stride, int n_tok, const float * p, int ld, int n_q, int dim,
                           float * o) {
    TQI_BY_N_Q(ACCUMULATE_F16, 16, n_q, v, stride, n_tok, p, ld, dim, o)
}

static void narrow(const float * x, int64_t n, uint16_t * y) {
    for (int64_t i = 0; i < n; i += VF_LANES) {
        vf_store_f16(y + i, vf_clamp(vf_load(x + i), TQI_F16_MAX));
    }
}
