/* rows_f16.h: attention steps over the f16 rows of a tail, and conversion from and to f16, over the vocabulary of
 * vector.h. The rows are few beside the blocks of a cache, and converting them is most of what they cost. */
INLINE void scores_f16_rows(int n_q, const uint8_t * k, size_t stride, int n_tok, const float * q, int dim, float * s,
                            int ld) {
    for (int t = 0; t < n_tok; ++t) {
        const uint16_t * row = (const uint16_t *) (const void *) (k + (size_t) t * stride);
        vec sum[TQI_MAX_FUSED];
        for (int i = 0; i < n_q; ++i) {
            sum[i] = v_set1(0.0f);
        }
        for (int j = 0; j < dim; j += LANES) {
            const vec x = v_load_f16(row + j);
            for (int i = 0; i < n_q; ++i) {
                sum[i] = v_fma(x, v_load(q + i * dim + j), sum[i]);
            }
        }
        for (int i = 0; i < n_q; ++i) {
            s[i * ld + t] = v_sum(sum[i]);
        }
    }
}

INLINE void accumulate_f16_rows(int n_q, const uint8_t * v, size_t stride, int n_tok, const float * p, int ld, int dim,
                                float * o) {
    for (int j = 0; j < dim; j += LANES) {
        vec sum[TQI_MAX_FUSED];
        for (int i = 0; i < n_q; ++i) {
            sum[i] = v_load(o + i * dim + j);
        }
        for (int t = 0; t < n_tok; ++t) {
            const vec x = v_load_f16((const uint16_t *) (const void *) (v + (size_t) t * stride) + j);
            for (int i = 0; i < n_q; ++i) {
                sum[i] = v_fma(x, v_set1(p[i * ld + t]), sum[i]);
            }
        }
        for (int i = 0; i < n_q; ++i) {
            v_store(o + i * dim + j, sum[i]);
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
    for (int64_t i = 0; i < n; i += LANES) {
        v_store_f16(y + i, v_max(v_min(v_load(x + i), v_set1(TQI_F16_MAX)), v_set1(-TQI_F16_MAX)));
    }
}

static void widen(const uint16_t * x, int64_t n, float * y) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        v_store(y + i, v_load_f16(x + i));
    }
    for (; i < n; ++i) {
        y[i] = f16_to_f32(tqi_load_u16(x + i));
    }
}
