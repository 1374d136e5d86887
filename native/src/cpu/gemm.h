/* gemm.h: the matrix product of tqi_kernels, over the vocabulary of vector.h. */

/* n_row rows of c, n_vec vectors of columns: their sums stay in registers over all k. */
INLINE void gemm_rows(int n_row, int n_vec, const float * a, int a_row, int a_k, const float * b, int n_k, int n_col,
                      int add, float * c) {
    vec sum[SUMS / 2][2];
    for (int r = 0; r < n_row; ++r) {
        for (int j = 0; j < n_vec; ++j) {
            sum[r][j] = add ? v_load(c + r * n_col + LANES * j) : v_set1(0.0f);
        }
    }
    for (int k = 0; k < n_k; ++k, a += a_k, b += n_col) {
        vec bk[2];
        for (int j = 0; j < n_vec; ++j) {
            bk[j] = v_load(b + LANES * j);
        }
        for (int r = 0; r < n_row; ++r) {
            const vec w = v_set1(a[r * a_row]);
            for (int j = 0; j < n_vec; ++j) {
                sum[r][j] = v_fma(w, bk[j], sum[r][j]);
            }
        }
    }
    for (int r = 0; r < n_row; ++r) {
        for (int j = 0; j < n_vec; ++j) {
            v_store(c + r * n_col + LANES * j, sum[r][j]);
        }
    }
}

INLINE void gemm_columns(int n_vec, const float * a, int a_row, int a_k, const float * b, int n_row, int n_k, int n_col,
                         int add, float * c) {
    int r = 0;
    for (; r + SUMS / 2 <= n_row; r += SUMS / 2) {
        gemm_rows(SUMS / 2, n_vec, a + (size_t) r * (size_t) a_row, a_row, a_k, b, n_k, n_col, add,
                  c + (size_t) r * (size_t) n_col);
    }
    for (; r + 4 <= n_row; r += 4) {
        gemm_rows(4, n_vec, a + (size_t) r * (size_t) a_row, a_row, a_k, b, n_k, n_col, add,
                  c + (size_t) r * (size_t) n_col);
    }
    for (; r < n_row; ++r) {
        gemm_rows(1, n_vec, a + (size_t) r * (size_t) a_row, a_row, a_k, b, n_k, n_col, add,
                  c + (size_t) r * (size_t) n_col);
    }
}

static void gemm(const float * a, int a_row, int a_k, const float * b, int n_row, int n_k, int n_col, int add,
                 float * c) {
    int j = 0;
    for (; j + 2 * LANES <= n_col; j += 2 * LANES) {
        gemm_columns(2, a, a_row, a_k, b + j, n_row, n_k, n_col, add, c + j);
    }
    if (TQI_LANES < 2 * LANES && j < n_col) {
        gemm_columns(1, a, a_row, a_k, b + j, n_row, n_k, n_col, add, c + j);
    }
}
