/* scale_search.h: the encoder of the PQO types in all modes, over the vocabulary of vector.h. It computes what
 * portable.c computes, operation by operation: the same bytes.
 *
 * The including file defines
 *   table                    a codebook in registers, its levels among others; load_table(bits, codec)
 *   index_of(bits, &c, t)    how many boundaries lie below each lane of t, as words
 *   levels_at(bits, &c.levels, i)  the levels of those indices
 *   pack(bits, i, out)       writes LANES indices as LANES * bits / 8 bytes */
#include "block.h"

#include <math.h>

/* Writes scale d (f16 bits) and the indices of t, the values over their scale; a zero scale makes a zero block. */
INLINE void put_block(int bits, const table * c, uint16_t d, block t, uint8_t * out) {
    if ((d & 0x7fffu) == 0) {
        memset(out, 0, TQI_BLOCK_BYTES(bits));
        return;
    }
    memcpy(out, &d, sizeof d);
    UNROLL
    for (int i = 0; i < N_VEC; ++i) {
        pack(bits, index_of(bits, c, t.v[i]), out + sizeof d + i * (LANES * bits / 8));
    }
}

/* The scale of least squared error among the candidates: see portable.c. */
INLINE float search_scale(int bits, const tqi_codec * codec, const table * c, block y) {
    const float high = 1.0f / codec->levels[codec->n_levels - 1];
    const float low = 1.0f / codec->levels[0];
    float max, min;
    find_range(y, &min, &max);
    if (max < TQI_AMAX_MIN && -min < TQI_AMAX_MIN) {
        return 0.0f;
    }
    const float base[2] = { fmaxf(max * high, min * low), -fmaxf(-min * high, -max * low) };
    float best = -1.0f, d = 0.0f;
    for (int f = 0; f < codec->n_factors; ++f) {
        for (int s = 0; s < 2; ++s) {
            const block t = multiply_by(y, 1.0f / (base[s] * codec->factors[f]));
            block v;
            UNROLL
            for (int i = 0; i < N_VEC; ++i) {
                v.v[i] = levels_at(bits, &c->levels, index_of(bits, c, t.v[i]));
            }
            const float yv = sum32(multiply(y, v)), vv = sum32(multiply(v, v));
            const float gain = yv * yv / vv;
            if (gain > best) {
                best = gain;
                d = yv / vv;
            }
        }
    }
    return d;
}

/* The largest magnitude. */
INLINE float largest(block y) {
    vec top = v_abs(y.v[0]);
    UNROLL
    for (int i = 1; i < N_VEC; ++i) {
        top = v_max(top, v_abs(y.v[i]));
    }
    return v_highest(top);
}

/* The modes of turboquant-rs: scale from the largest magnitude, or from the norm. Returns it and divides y by it. */
INLINE uint16_t norm_scale(const tqi_codec * codec, block * y) {
    float d;
    if (codec->mode == TQ_MODE_MAXNORM) {
        *y = transform_block(TQI_SIGNS_LAST, *y);
        d = largest(*y) / codec->outer;
    } else {
        d = sqrtf(sum32(multiply(*y, *y)));
    }
    d = d > TQI_NORM_MIN ? d : TQI_NORM_MIN;
    UNROLL
    for (int i = 0; i < N_VEC; ++i) {
        y->v[i] = v_div(y->v[i], v_set1(d));
    }
    if (codec->mode == TQ_MODE_L2NORM) {
        *y = transform_block(TQI_SIGNS_LAST, *y);
    }
    return f32_to_f16(d < TQI_F16_MAX ? d : TQI_F16_MAX);
}

INLINE void encode_rows(int bits, int search, const tqi_codec * codec, const float * x, int64_t n_blocks,
                        uint8_t * blocks) {
    const table c = load_table(bits, codec);
    for (int64_t b = 0; b < n_blocks; ++b, x += TQ_BLOCK, blocks += TQI_BLOCK_BYTES(bits)) {
        block y = sanitize(load_block(x));
        uint16_t d;
        if (search) {
            y = transform_block(TQI_SIGNS_FIRST, y);
            d = f32_to_f16(tqi_sanitize(search_scale(bits, codec, &c, y)));
            y = multiply_by(y, 1.0f / f16_to_f32(d));
        } else {
            d = norm_scale(codec, &y);
        }
        put_block(bits, &c, d, y, blocks);
    }
}

static void encode(const tqi_codec * codec, const float * x, int64_t n_blocks, uint8_t * blocks) {
    if (codec->mode == TQ_MODE_SEARCH) {
        TQI_BY_BITS(encode_rows, codec->bits, 1, codec, x, n_blocks, blocks)
    } else {
        TQI_BY_BITS(encode_rows, codec->bits, 0, codec, x, n_blocks, blocks)
    }
}

static void transform(tqi_sign_order order, float * y, int64_t n_blocks) {
    for (int64_t b = 0; b < n_blocks; ++b, y += TQ_BLOCK) {
        store_block(y, transform_block(order, load_block(y)));
    }
}
