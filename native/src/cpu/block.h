/* block.h: one block of 32 values in vectors (vector.h), and its transform. Operation by operation what transform.h
 * does: the encoders give the same bytes. */
#ifndef TQI_BLOCK_H
#define TQI_BLOCK_H

#define N_VEC (TQ_BLOCK / LANES)

typedef struct {
    vec v[N_VEC];
} block;

INLINE block load_block(const float * x) {
    block y;
    UNROLL
    for (int i = 0; i < N_VEC; ++i) {
        y.v[i] = v_load(x + LANES * i);
    }
    return y;
}

INLINE void store_block(float * x, block y) {
    UNROLL
    for (int i = 0; i < N_VEC; ++i) {
        v_store(x + LANES * i, y.v[i]);
    }
}

INLINE block multiply(block a, block b) {
    UNROLL
    for (int i = 0; i < N_VEC; ++i) {
        a.v[i] = v_mul(a.v[i], b.v[i]);
    }
    return a;
}

INLINE block multiply_by(block y, float factor) {
    UNROLL
    for (int i = 0; i < N_VEC; ++i) {
        y.v[i] = v_mul(y.v[i], v_set1(factor));
    }
    return y;
}

INLINE block hadamard32(block y) {
    UNROLL
    for (int i = 0; i < N_VEC; ++i) {
        y.v[i] = v_hadamard(y.v[i]);
    }
    UNROLL
    for (int h = 1; h < N_VEC; h *= 2) {
        UNROLL
        for (int i = 0; i < N_VEC; ++i) {
            if (!(i & h)) {
                const vec a = y.v[i], b = y.v[i + h];
                y.v[i] = v_add(a, b);
                y.v[i + h] = v_sub(a, b);
            }
        }
    }
    return multiply_by(y, TQI_RSQRT_BLOCK);
}

INLINE block transform_block(tqi_sign_order order, block y) {
    const block signs = load_block(tqi_signs);
    return order == TQI_SIGNS_FIRST ? hadamard32(multiply(signs, y)) : multiply(signs, hadamard32(y));
}

/* tqi_sum32's halving tree. */
INLINE float sum32(block p) {
    UNROLL
    for (int h = N_VEC / 2; h > 0; h /= 2) {
        UNROLL
        for (int i = 0; i < h; ++i) {
            p.v[i] = v_add(p.v[i], p.v[i + h]);
        }
    }
    return v_sum(p.v[0]);
}

INLINE void find_range(block y, float * min, float * max) {
    vec low = y.v[0], high = y.v[0];
    UNROLL
    for (int i = 1; i < N_VEC; ++i) {
        low = v_min(low, y.v[i]);
        high = v_max(high, y.v[i]);
    }
    *min = -v_highest(v_sub(v_set1(0.0f), low));
    *max = v_highest(high);
}

/* tqi_block_scale with the processor's conversion: portable code took a quarter of unpack. */
INLINE float block_scale(const uint8_t * in) {
    const uint16_t h = tqi_load_u16(in);
    return f16_to_f32((h & 0x7c00u) == 0x7c00u ? 0 : h);
}

/* tqi_sanitize, value by value. */
INLINE block sanitize(block x) {
    UNROLL
    for (int i = 0; i < N_VEC; ++i) {
        const vec number = v_keep(v_equal(x.v[i], x.v[i]), x.v[i]);
        x.v[i] = v_max(v_min(number, v_set1(TQI_F16_MAX)), v_set1(-TQI_F16_MAX));
    }
    return x;
}

#endif
