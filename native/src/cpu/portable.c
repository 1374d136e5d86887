/* portable.c: every step in plain C, the truth that the other kernels are held to. */
#include "kernels.h"
#include "transform.h"
#include "trellis.h"

#include <math.h>

static int supported(void) {
    return 1;
}

/* ---- Blocks ---- */

static int index_of(const tqi_codec * codec, float t) {
    int index = 0;
    for (int j = 0; j < codec->n_levels - 1; ++j) {
        index += t > codec->boundaries[j];
    }
    return index;
}

static void pack(int bits, const uint8_t * index, uint8_t * qs) {
    for (int g = 0; g < TQ_BLOCK / 8; ++g) {
        uint32_t word = 0;
        for (int j = 0; j < 8; ++j) {
            word |= (uint32_t) index[8 * g + j] << (bits * j);
        }
        for (int b = 0; b < bits; ++b) {
            qs[bits * g + b] = (uint8_t) (word >> (8 * b));
        }
    }
}

static void unpack_indices(int bits, const uint8_t * qs, uint8_t * index) {
    for (int g = 0; g < TQ_BLOCK / 8; ++g) {
        uint32_t word = 0;
        for (int b = 0; b < bits; ++b) {
            word |= (uint32_t) qs[bits * g + b] << (8 * b);
        }
        for (int j = 0; j < 8; ++j) {
            index[8 * g + j] = (uint8_t) ((word >> (bits * j)) & ((1u << bits) - 1u));
        }
    }
}

/* Writes scale d (f16 bits) and the indices of t, the values over their scale; a zero scale makes a zero block. */
static void put_block(const tqi_codec * codec, uint16_t d, const float * t, uint8_t * block) {
    uint8_t index[TQ_BLOCK];
    memset(block, 0, (size_t) codec->block_bytes);
    if ((d & 0x7fffu) == 0) {
        return;
    }
    for (int i = 0; i < TQ_BLOCK; ++i) {
        index[i] = (uint8_t) index_of(codec, t[i]);
    }
    memcpy(block, &d, sizeof d);
    pack(codec->bits, index, block + sizeof d);
}

/* sum y v and sum v v for the codebook values v nearest to y / d. */
static void fit(const tqi_codec * codec, const float * y, float d, float * yv, float * vv) {
    float a[TQ_BLOCK], b[TQ_BLOCK];
    const float inverse = 1.0f / d;
    for (int i = 0; i < TQ_BLOCK; ++i) {
        const float v = codec->levels[index_of(codec, y[i] * inverse)];
        a[i] = y[i] * v;
        b[i] = v * v;
    }
    *yv = tqi_sum32(a);
    *vv = tqi_sum32(b);
}

/* Least-squares scale over the candidates: with indices fixed, the squared error is sum y^2 - (sum y v)^2 / sum v^2. */
static float search_scale(const tqi_codec * codec, const float * y) {
    const float high = 1.0f / codec->levels[codec->n_levels - 1];
    const float low = 1.0f / codec->levels[0];
    float max = y[0], min = y[0];
    for (int i = 1; i < TQ_BLOCK; ++i) {
        max = y[i] > max ? y[i] : max;
        min = y[i] < min ? y[i] : min;
    }
    if (max < TQI_AMAX_MIN && -min < TQI_AMAX_MIN) {
        return 0.0f;
    }
    /* the smallest scale that clips nothing, with the codebook as it is and mirrored */
    const float base[2] = { fmaxf(max * high, min * low), -fmaxf(-min * high, -max * low) };
    float best = -1.0f, d = 0.0f;
    for (int f = 0; f < codec->n_factors; ++f) {
        for (int s = 0; s < 2; ++s) {
            float yv, vv;
            fit(codec, y, base[s] * codec->factors[f], &yv, &vv);
            const float gain = yv * yv / vv;
            if (gain > best) {
                best = gain;
                d = yv / vv;
            }
        }
    }
    return d;
}

/* The modes of turboquant-rs: the scale from the largest magnitude, or from the norm before the transform. Divides y by
 * it. */
static float norm_scale(const tqi_codec * codec, float * y) {
    float d = 0.0f, squares[TQ_BLOCK];
    if (codec->mode == TQ_MODE_MAXNORM) {
        tqi_transform(codec->signs, y);
    }
    for (int i = 0; i < TQ_BLOCK; ++i) {
        d = fabsf(y[i]) > d ? fabsf(y[i]) : d;
        squares[i] = y[i] * y[i];
    }
    d = codec->mode == TQ_MODE_MAXNORM ? d / codec->outer : sqrtf(tqi_sum32(squares));
    d = d > TQI_NORM_MIN ? d : TQI_NORM_MIN;
    for (int i = 0; i < TQ_BLOCK; ++i) {
        y[i] = y[i] / d;
    }
    if (codec->mode == TQ_MODE_L2NORM) {
        tqi_transform(codec->signs, y);
    }
    return d < TQI_F16_MAX ? d : TQI_F16_MAX;
}

static void encode_block(const tqi_codec * codec, const float * x, uint8_t * block) {
    float y[TQ_BLOCK];
    for (int i = 0; i < TQ_BLOCK; ++i) {
        y[i] = tqi_sanitize(x[i]);
    }
    if (codec->mode != TQ_MODE_SEARCH) {
        const float d = norm_scale(codec, y);
        put_block(codec, tqi_f32_to_f16(d), y, block);
        return;
    }
    tqi_transform(codec->signs, y);
    const uint16_t h = tqi_f32_to_f16(tqi_sanitize(search_scale(codec, y)));
    const float inverse = 1.0f / tqi_f16_to_f32(h);
    for (int i = 0; i < TQ_BLOCK; ++i) {
        y[i] *= inverse;
    }
    put_block(codec, h, y, block);
}

static void encode(const tqi_codec * codec, const float * x, int64_t n_blocks, uint8_t * blocks) {
    for (int64_t b = 0; b < n_blocks; ++b) {
        encode_block(codec, x + b * TQ_BLOCK, blocks + b * codec->block_bytes);
    }
}

static void unpack(const tqi_codec * codec, const uint8_t * blocks, int64_t n_blocks, float * y) {
    for (int64_t b = 0; b < n_blocks; ++b, y += TQ_BLOCK, blocks += codec->block_bytes) {
        uint8_t index[TQ_BLOCK];
        const float d = tqi_block_scale(blocks);
        unpack_indices(codec->bits, blocks + sizeof(uint16_t), index);
        for (int i = 0; i < TQ_BLOCK; ++i) {
            y[i] = d * codec->levels[index[i]];
        }
    }
}

static void transform(tqi_sign_order order, float * y, int64_t n_blocks) {
    for (int64_t b = 0; b < n_blocks; ++b) {
        tqi_transform(order, y + b * TQ_BLOCK);
    }
}

/* ---- Attention ---- */

/* A block of either kind. */
static void unpack_block(const tqi_codec * codec, const uint8_t * block, float * y) {
    tqi_steps_of(&tqi_kernels_portable, codec)->unpack(codec, block, 1, y);
}

static void load_query(const tqi_codec * codec, const float * q, int n_blocks, float * query) {
    (void) codec;
    memcpy(query, q, (size_t) n_blocks * TQ_BLOCK * sizeof(float));
}

static void scores(const tqi_codec * codec, const uint8_t * k, size_t stride, int n_tok, const float * query, int n_q,
                   int n_blocks, float * s, int ld) {
    for (int t = 0; t < n_tok; ++t) {
        for (int i = 0; i < n_q; ++i) {
            s[i * ld + t] = 0.0f;
        }
        for (int b = 0; b < n_blocks; ++b) {
            float y[TQ_BLOCK];
            unpack_block(codec, k + (size_t) t * stride + (size_t) (b * codec->block_bytes), y);
            for (int i = 0; i < n_q; ++i) {
                const float * qb = query + i * (int) TQI_QUERY_FLOATS(n_blocks) + b * TQ_BLOCK;
                float sum = 0.0f;
                for (int j = 0; j < TQ_BLOCK; ++j) {
                    sum += y[j] * qb[j];
                }
                s[i * ld + t] += sum;
            }
        }
    }
}

static void accumulate(const tqi_codec * codec, const uint8_t * v, size_t stride, int n_tok, const float * p, int ld,
                       int n_q, int n_blocks, float * o) {
    for (int t = 0; t < n_tok; ++t) {
        for (int b = 0; b < n_blocks; ++b) {
            float y[TQ_BLOCK];
            unpack_block(codec, v + (size_t) t * stride + (size_t) (b * codec->block_bytes), y);
            for (int i = 0; i < n_q; ++i) {
                float * ob = o + (i * n_blocks + b) * TQ_BLOCK;
                for (int j = 0; j < TQ_BLOCK; ++j) {
                    ob[j] += p[i * ld + t] * y[j];
                }
            }
        }
    }
}

static float softmax_row(float * s, int n, float * max, float * sum) {
    float top = *max;
    for (int t = 0; t < n; ++t) {
        top = fmaxf(top, s[t]);
    }
    const float factor = top == *max ? 1.0f : expf(*max - top);
    const float base = top == -INFINITY ? 0.0f : top; /* no key seen: zeros, but NaN stays NaN */
    *sum *= factor;
    for (int t = 0; t < n; ++t) {
        s[t] = expf(s[t] - base);
        *sum += s[t];
    }
    *max = top;
    return factor;
}

static void gemm(const float * a, int a_row, int a_k, const float * b, int n_row, int n_k, int n_col, int add,
                 float * c) {
    for (int r = 0; r < n_row; ++r) {
        float * cr = c + (size_t) r * (size_t) n_col;
        if (!add) {
            memset(cr, 0, (size_t) n_col * sizeof(float));
        }
        for (int k = 0; k < n_k; ++k) {
            const float w = a[(size_t) r * (size_t) a_row + (size_t) k * (size_t) a_k];
            const float * bk = b + (size_t) k * (size_t) n_col;
            for (int j = 0; j < n_col; ++j) {
                cr[j] += w * bk[j];
            }
        }
    }
}

static void softmax_columns(float * s, int n_row, int n_col, float * max, float * sum, float * factor) {
    for (int j = 0; j < n_col; ++j) {
        float top = max[j];
        for (int t = 0; t < n_row; ++t) {
            top = fmaxf(top, s[t * n_col + j]);
        }
        factor[j] = top == max[j] ? 1.0f : expf(max[j] - top);
        sum[j] *= factor[j];
        const float base = top == -INFINITY ? 0.0f : top;
        for (int t = 0; t < n_row; ++t) {
            float * e = &s[t * n_col + j];
            *e = expf(*e - base);
            sum[j] += *e;
        }
        max[j] = top;
    }
}

/* ---- Rows of a tail ---- */

/* The words of vector.h that rows_f16.h takes, for vectors of one float. */
#define INLINE static inline
#define LANES 1
typedef float vec;
#define v_set1(x) (x)
#define v_load(p) (*(p))
#define v_store(p, a) (*(p) = (a))
#define v_load_f16(p) tqi_f16_to_f32(tqi_load_u16(p))
#define v_min(a, b) fminf(a, b)
#define v_max(a, b) fmaxf(a, b)
#define v_fma(a, b, c) ((a) * (b) + (c))
#define v_sum(a) (a)
#define f16_to_f32(h) tqi_f16_to_f32(h)

static void v_store_f16(uint16_t * to, float x) {
    const uint16_t h = tqi_f32_to_f16(x);
    memcpy(to, &h, sizeof h);
}

#include "rows_f16.h"

static const tqi_steps trellis = {
    tqi_trellis_encode_portable, tqi_trellis_unpack_portable, load_query, scores, accumulate, NULL
};

TQI_KERNELS(portable, NULL, &trellis);
