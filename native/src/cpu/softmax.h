/* softmax.h: exp and the two online softmaxes of tqi_kernels, over the vocabulary of vector.h. */
#include <math.h>

/* exp for x <= 0: x = n ln 2 + r, |r| <= ln 2 / 2, degree-6 Taylor polynomial for e^r; 0 below -87.3. Relative error
 * under 2e-7 (ln 2 in two parts after Cody and Waite). */
INLINE vec v_exp(vec x) {
    const truth normal = v_not_less(x, v_set1(-87.3f));
    const vec n = v_round(v_mul(x, v_set1(1.44269504f)));
    vec r = v_fma(n, v_set1(-0.693359375f), x);
    r = v_fma(n, v_set1(2.12194440e-4f), r);
    vec e = v_set1(1.0f / 720.0f);
    e = v_fma(e, r, v_set1(1.0f / 120.0f));
    e = v_fma(e, r, v_set1(1.0f / 24.0f));
    e = v_fma(e, r, v_set1(1.0f / 6.0f));
    e = v_fma(e, r, v_set1(0.5f));
    e = v_fma(e, r, v_set1(1.0f));
    e = v_fma(e, r, v_set1(1.0f));
    return v_scale(normal, e, n);
}

static float softmax_row(float * s, int n, float * max, float * sum) {
    vec high = v_set1(*max);
    for (int t = n; t % LANES != 0; ++t) {
        s[t] = -INFINITY; /* fills the last vector up */
    }
    for (int t = 0; t < n; t += LANES) {
        high = v_max(high, v_load(s + t));
    }
    const float top = v_highest(high);
    const float base = top == -INFINITY ? 0.0f : top; /* no key seen: zeros, but NaN stays NaN */
    const float factor = top == *max ? 1.0f : expf(*max - top);
    vec total = v_set1(0.0f);
    for (int t = 0; t < n; t += LANES) {
        const vec e = v_exp(v_sub(v_load(s + t), v_set1(base)));
        v_store(s + t, e);
        total = v_add(total, e);
    }
    *max = top;
    *sum = *sum * factor + v_sum(total);
    return factor;
}

static void softmax_columns(float * s, int n_row, int n_col, float * max, float * sum, float * factor) {
    for (int j = 0; j < n_col; j += LANES) {
        const vec old = v_load(max + j);
        vec top = old;
        for (int t = 0; t < n_row; ++t) {
            top = v_max(v_load(s + t * n_col + j), top);
        }
        /* A column that has seen no key yet: subtract 0 instead of -infinity, so that its exponentials are 0, not
         * NaN. */
        const vec base = v_select(v_equal(top, v_set1(-INFINITY)), v_set1(0.0f), top);
        const vec f = v_exp(v_sub(old, base));
        vec total = v_mul(f, v_load(sum + j));
        for (int t = 0; t < n_row; ++t) {
            const vec e = v_exp(v_sub(v_load(s + t * n_col + j), base));
            v_store(s + t * n_col + j, e);
            total = v_add(total, e);
        }
        v_store(max + j, top);
        v_store(sum + j, total);
        v_store(factor + j, f);
    }
}
