/* neon.c: AArch64 Advanced SIMD. One block is eight vectors of four values; codebooks are looked up as bytes with
 * tbl. encode and decode follow the portable order of operations exactly; the attention steps use FMA. */
#include "kernels.h"
#include "trellis.h"

#include <arm_neon.h>
#include <math.h>

static int supported(void) {
    return 1; /* part of the AArch64 base */
}

#define INLINE static inline __attribute__((always_inline))

/* ---- Transform ---- */

typedef struct {
    float32x4_t v[8]; /* values 4i .. 4i + 3 */
} block;

INLINE block load_block(const float * x) {
    block y;
    for (int i = 0; i < 8; ++i) {
        y.v[i] = vld1q_f32(x + 4 * i);
    }
    return y;
}

INLINE void store_block(float * x, block y) {
    for (int i = 0; i < 8; ++i) {
        vst1q_f32(x + 4 * i, y.v[i]);
    }
}

INLINE block hadamard32(block y) {
    for (int i = 0; i < 8; ++i) {
        const float32x4_t x = y.v[i];
        /* stage 1: neighbours; stage 2: halves */
        const float32x4_t even = vtrn1q_f32(x, x), odd = vtrn2q_f32(x, x);
        const float32x4_t s = vtrn1q_f32(vaddq_f32(even, odd), vsubq_f32(even, odd));
        const float32x2_t low = vget_low_f32(s), high = vget_high_f32(s);
        y.v[i] = vcombine_f32(vadd_f32(low, high), vsub_f32(low, high));
    }
    for (int h = 1; h < 8; h *= 2) {
        for (int i = 0; i < 8; i += 2 * h) {
            for (int j = i; j < i + h; ++j) {
                const float32x4_t a = y.v[j], b = y.v[j + h];
                y.v[j] = vaddq_f32(a, b);
                y.v[j + h] = vsubq_f32(a, b);
            }
        }
    }
    for (int i = 0; i < 8; ++i) {
        y.v[i] = vmulq_n_f32(y.v[i], TQI_RSQRT_BLOCK);
    }
    return y;
}

INLINE block apply_signs(block y) {
    for (int i = 0; i < 8; ++i) {
        y.v[i] = vmulq_f32(y.v[i], vld1q_f32(tqi_signs + 4 * i));
    }
    return y;
}

INLINE block transform_block(tqi_sign_order order, block y) {
    return order == TQI_SIGNS_FIRST ? hadamard32(apply_signs(y)) : apply_signs(hadamard32(y));
}

static void transform(tqi_sign_order order, float * y, int64_t n_blocks) {
    for (int64_t b = 0; b < n_blocks; ++b, y += TQ_BLOCK) {
        store_block(y, transform_block(order, load_block(y)));
    }
}

static void inverse_transform(tqi_sign_order order, float * y, int64_t n_blocks) {
    transform(order == TQI_SIGNS_FIRST ? TQI_SIGNS_LAST : TQI_SIGNS_FIRST, y, n_blocks);
}

/* ---- Codebooks ---- */

typedef struct {
    uint8x16x4_t levels; /* the bytes of up to 16 floats */
} table;

INLINE table load_table(const tqi_codec * codec) {
    return (table) { vld1q_u8_x4((const uint8_t *) (const void *) codec->levels) };
}

/* Levels of four indices below n_levels: index -> the positions of its four bytes. */
INLINE float32x4_t level4(int bits, const table * c, uint32x4_t index) {
    const uint8x16_t at = vreinterpretq_u8_u32(vmlaq_n_u32(vdupq_n_u32(0x03020100u), index, 0x04040404u));
    if (bits == 3) {
        const uint8x16x2_t low = { { c->levels.val[0], c->levels.val[1] } };
        return vreinterpretq_f32_u8(vqtbl2q_u8(low, at));
    }
    return vreinterpretq_f32_u8(vqtbl4q_u8(c->levels, at));
}

/* The number of boundaries below t: a true comparison is -1. */
INLINE uint32x4_t index4(int bits, const tqi_codec * codec, float32x4_t t) {
    uint32x4_t index = vdupq_n_u32(0);
    for (int j = 0; j < (1 << bits) - 1; ++j) {
        index = vsubq_u32(index, vcgtq_f32(t, vdupq_n_f32(codec->boundaries[j])));
    }
    return index;
}

/* ---- Encode ---- */

/* tqi_sum32's halving tree. */
INLINE float sum32(block p) {
    for (int h = 4; h > 0; h /= 2) {
        for (int i = 0; i < h; ++i) {
            p.v[i] = vaddq_f32(p.v[i], p.v[i + h]);
        }
    }
    const float32x2_t r = vadd_f32(vget_low_f32(p.v[0]), vget_high_f32(p.v[0]));
    return vget_lane_f32(r, 0) + vget_lane_f32(r, 1);
}

INLINE block sanitize(block x) {
    for (int i = 0; i < 8; ++i) {
        const uint32x4_t ordered = vceqq_f32(x.v[i], x.v[i]);
        const float32x4_t number = vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x.v[i]), ordered));
        x.v[i] = vmaxq_f32(vminq_f32(number, vdupq_n_f32(TQI_F16_MAX)), vdupq_n_f32(-TQI_F16_MAX));
    }
    return x;
}

INLINE void put_block(int bits, const tqi_codec * codec, uint16_t d, block t, uint8_t * out) {
    if ((d & 0x7fffu) == 0) {
        memset(out, 0, (size_t) (4 * bits + 2));
        return;
    }
    memcpy(out, &d, sizeof d);
    out += sizeof d;
    const int32_t first[4] = { 0, bits, 2 * bits, 3 * bits };
    const int32x4_t shift = vld1q_s32(first);
    const int32x4_t next = vaddq_s32(shift, vdupq_n_s32(4 * bits));
    for (int g = 0; g < 4; ++g) {
        const uint32x4_t a = vshlq_u32(index4(bits, codec, t.v[2 * g]), shift);
        const uint32x4_t b = vshlq_u32(index4(bits, codec, t.v[2 * g + 1]), next);
        const uint32_t word = vaddvq_u32(vorrq_u32(a, b)); /* disjoint bits */
        memcpy(out, &word, (size_t) bits);
        out += bits;
    }
}

INLINE float search_scale(int bits, const tqi_codec * codec, const table * c, block y) {
    const float high = 1.0f / codec->levels[codec->n_levels - 1];
    const float low = 1.0f / codec->levels[0];
    float32x4_t top = y.v[0], end = y.v[0];
    for (int i = 1; i < 8; ++i) {
        top = vmaxq_f32(top, y.v[i]);
        end = vminq_f32(end, y.v[i]);
    }
    const float max = vmaxvq_f32(top), min = vminvq_f32(end);
    if (max < TQI_AMAX_MIN && -min < TQI_AMAX_MIN) {
        return 0.0f;
    }
    const float base[2] = { fmaxf(max * high, min * low), -fmaxf(-min * high, -max * low) };
    float best = -1.0f, d = 0.0f;
    for (int f = 0; f < codec->n_factors; ++f) {
        for (int s = 0; s < 2; ++s) {
            const float inverse = 1.0f / (base[s] * codec->factors[f]);
            block a, b;
            for (int i = 0; i < 8; ++i) {
                const float32x4_t v = level4(bits, c, index4(bits, codec, vmulq_n_f32(y.v[i], inverse)));
                a.v[i] = vmulq_f32(y.v[i], v);
                b.v[i] = vmulq_f32(v, v);
            }
            const float yv = sum32(a), vv = sum32(b);
            const float gain = yv * yv / vv;
            if (gain > best) {
                best = gain;
                d = yv / vv;
            }
        }
    }
    return d;
}

INLINE void encode_rows(int bits, const tqi_codec * codec, const float * x, int64_t n_blocks, uint8_t * blocks) {
    const table c = load_table(codec);
    for (int64_t i = 0; i < n_blocks; ++i, x += TQ_BLOCK, blocks += 4 * bits + 2) {
        block y = sanitize(load_block(x));
        float d;
        if (codec->mode == TQ_MODE_SEARCH) {
            y = transform_block(codec->signs, y);
            const uint16_t h = tqi_f32_to_f16(tqi_sanitize(search_scale(bits, codec, &c, y)));
            const float inverse = 1.0f / tqi_f16_to_f32(h);
            for (int j = 0; j < 8; ++j) {
                y.v[j] = vmulq_n_f32(y.v[j], inverse);
            }
            put_block(bits, codec, h, y, blocks);
            continue;
        }
        if (codec->mode == TQ_MODE_MAXNORM) {
            y = transform_block(codec->signs, y);
            float32x4_t top = vabsq_f32(y.v[0]);
            for (int j = 1; j < 8; ++j) {
                top = vmaxq_f32(top, vabsq_f32(y.v[j]));
            }
            d = vmaxvq_f32(top) / codec->outer;
        } else {
            block squares;
            for (int j = 0; j < 8; ++j) {
                squares.v[j] = vmulq_f32(y.v[j], y.v[j]);
            }
            d = sqrtf(sum32(squares));
        }
        d = d > TQI_NORM_MIN ? d : TQI_NORM_MIN;
        for (int j = 0; j < 8; ++j) {
            y.v[j] = vdivq_f32(y.v[j], vdupq_n_f32(d));
        }
        if (codec->mode == TQ_MODE_L2NORM) {
            y = transform_block(codec->signs, y);
        }
        put_block(bits, codec, tqi_f32_to_f16(d < TQI_F16_MAX ? d : TQI_F16_MAX), y, blocks);
    }
}

static void encode(const tqi_codec * codec, const float * x, int64_t n_blocks, uint8_t * blocks) {
    if (codec->trellis) {
        tqi_trellis_encode(codec, transform, tqi_trellis_search_neon, x, n_blocks, blocks);
        return;
    }
    if (codec->bits == 3) {
        encode_rows(3, codec, x, n_blocks, blocks);
    } else {
        encode_rows(4, codec, x, n_blocks, blocks);
    }
}

/* ---- Decode ---- */

/* Values 8g .. 8g + 7 of a block, without its scale. Reads inside the block only: the last three bytes of a 3-bit block
 * are read with the byte before them. */
INLINE void values8(int bits, const table * c, const uint8_t * qs, int g, float32x4_t * v) {
    const int back = bits == 3 && g == 3;
    const uint32x4_t word = vdupq_n_u32(tqi_load_u32(qs + bits * g - back) >> (8 * back));
    const int32_t first[4] = { 0, -bits, -2 * bits, -3 * bits };
    const int32x4_t shift = vld1q_s32(first);
    const uint32x4_t mask = vdupq_n_u32((1u << bits) - 1u);
    v[0] = level4(bits, c, vandq_u32(vshlq_u32(word, shift), mask));
    v[1] = level4(bits, c, vandq_u32(vshlq_u32(word, vsubq_s32(shift, vdupq_n_s32(4 * bits))), mask));
}

INLINE void unpack_rows(int bits, const tqi_codec * codec, const uint8_t * blocks, int64_t n_blocks, float * y) {
    const table c = load_table(codec);
    for (int64_t b = 0; b < n_blocks; ++b, y += TQ_BLOCK, blocks += 4 * bits + 2) {
        const float d = tqi_block_scale(blocks);
        for (int g = 0; g < 4; ++g) {
            float32x4_t v[2];
            values8(bits, &c, blocks + 2, g, v);
            vst1q_f32(y + 8 * g, vmulq_n_f32(v[0], d));
            vst1q_f32(y + 8 * g + 4, vmulq_n_f32(v[1], d));
        }
    }
}

static void unpack(const tqi_codec * codec, const uint8_t * blocks, int64_t n_blocks, float * y) {
    if (codec->trellis) {
        tqi_trellis_unpack_neon(codec, blocks, n_blocks, y);
        return;
    }
    if (codec->bits == 3) {
        unpack_rows(3, codec, blocks, n_blocks, y);
    } else {
        unpack_rows(4, codec, blocks, n_blocks, y);
    }
}

static void decode(const tqi_codec * codec, const uint8_t * blocks, int64_t n_blocks, float * x) {
    unpack(codec, blocks, n_blocks, x);
    inverse_transform(codec->signs, x, n_blocks);
}

INLINE float f16_to_f32(uint16_t h) {
    return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h))), 0);
}

static void widen(const uint16_t * x, int64_t n, float * y) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        uint16x4_t h;
        memcpy(&h, x + i, sizeof h);
        vst1q_f32(y + i, vcvt_f32_f16(vreinterpret_f16_u16(h)));
    }
    for (; i < n; ++i) {
        y[i] = f16_to_f32(tqi_load_u16(x + i));
    }
}

/* ---- Attention ---- */

INLINE void scores_rows(int bits, int n_q, const tqi_codec * codec, const uint8_t * k, size_t stride, int n_tok,
                        const float * q, int n_blocks, float * s, int ld) {
    const table c = load_table(codec);
    for (int t = 0; t < n_tok; ++t) {
        const uint8_t * in = k + (size_t) t * stride;
        tqi_prefetch(in + TQI_AHEAD * stride, (size_t) (n_blocks * (4 * bits + 2)));
        float32x4_t total[TQI_MAX_FUSED];
        for (int i = 0; i < n_q; ++i) {
            total[i] = vdupq_n_f32(0.0f);
        }
        for (int b = 0; b < n_blocks; ++b, in += 4 * bits + 2) {
            const float d = tqi_block_scale(in);
            float32x4_t v[8];
            for (int g = 0; g < 4; ++g) {
                values8(bits, &c, in + 2, g, v + 2 * g);
            }
            for (int i = 0; i < n_q; ++i) {
                const float * qi = q + (i * n_blocks + b) * TQ_BLOCK;
                float32x4_t p = vmulq_f32(v[0], vld1q_f32(qi));
                for (int j = 1; j < 8; ++j) {
                    p = vfmaq_f32(p, v[j], vld1q_f32(qi + 4 * j));
                }
                total[i] = vfmaq_n_f32(total[i], p, d);
            }
        }
        for (int i = 0; i < n_q; ++i) {
            s[i * ld + t] = vaddvq_f32(total[i]);
        }
    }
}

/* Eight values of a block column at a time keep their sums for n_q vectors in registers over all tokens. */
INLINE void accumulate_rows(int bits, int n_q, const tqi_codec * codec, const uint8_t * v, size_t stride, int n_tok,
                            const float * p, int ld, int n_blocks, float * o) {
    const table c = load_table(codec);
    for (int b = 0; b < n_blocks; ++b) {
        for (int g = 0; g < 4; ++g) {
            const uint8_t * in = v + b * (4 * bits + 2);
            float * ob = o + b * TQ_BLOCK + 8 * g;
            float32x4_t sum[TQI_MAX_FUSED][2];
            for (int i = 0; i < n_q; ++i) {
                sum[i][0] = vld1q_f32(ob + i * n_blocks * TQ_BLOCK);
                sum[i][1] = vld1q_f32(ob + i * n_blocks * TQ_BLOCK + 4);
            }
            for (int t = 0; t < n_tok; ++t, in += stride) {
                const float d = tqi_block_scale(in);
                float32x4_t x[2];
                if (g == 0) {
                    tqi_prefetch(in + TQI_AHEAD * stride, (size_t) (4 * bits + 2));
                }
                values8(bits, &c, in + 2, g, x);
                for (int i = 0; i < n_q; ++i) {
                    const float w = d * p[i * ld + t];
                    sum[i][0] = vfmaq_n_f32(sum[i][0], x[0], w);
                    sum[i][1] = vfmaq_n_f32(sum[i][1], x[1], w);
                }
            }
            for (int i = 0; i < n_q; ++i) {
                vst1q_f32(ob + i * n_blocks * TQ_BLOCK, sum[i][0]);
                vst1q_f32(ob + i * n_blocks * TQ_BLOCK + 4, sum[i][1]);
            }
        }
    }
}

static void scores(const tqi_codec * codec, const uint8_t * k, size_t stride, int n_tok, const float * q, int n_q,
                   int n_blocks, float * s, int ld) {
    if (codec->trellis) {
        tqi_trellis_scores_neon(codec, k, stride, n_tok, q, n_q, n_blocks, s, ld);
        return;
    }
    if (codec->bits == 3) {
        TQI_BY_N_Q(scores_rows, 3, n_q, codec, k, stride, n_tok, q, n_blocks, s, ld)
    } else {
        TQI_BY_N_Q(scores_rows, 4, n_q, codec, k, stride, n_tok, q, n_blocks, s, ld)
    }
}

static void accumulate(const tqi_codec * codec, const uint8_t * v, size_t stride, int n_tok, const float * p, int ld,
                       int n_q, int n_blocks, float * o) {
    if (codec->trellis) {
        tqi_trellis_accumulate_neon(codec, v, stride, n_tok, p, ld, n_q, n_blocks, o);
        return;
    }
    if (codec->bits == 3) {
        TQI_BY_N_Q(accumulate_rows, 3, n_q, codec, v, stride, n_tok, p, ld, n_blocks, o)
    } else {
        TQI_BY_N_Q(accumulate_rows, 4, n_q, codec, v, stride, n_tok, p, ld, n_blocks, o)
    }
}

/* exp for x <= 0: x = n ln 2 + r, |r| <= ln 2 / 2, degree-6 Taylor polynomial for e^r; 0 below -87.3. Relative error under
 * 2e-7 (ln 2 in two parts after Cody and Waite). */
INLINE float32x4_t exp4(float32x4_t x) {
    const uint32x4_t tiny = vcltq_f32(x, vdupq_n_f32(-87.3f));
    const float32x4_t n = vrndnq_f32(vmulq_n_f32(x, 1.44269504f));
    float32x4_t r = vfmsq_n_f32(x, n, 0.693359375f);
    r = vfmsq_n_f32(r, n, -2.12194440e-4f);
    float32x4_t e = vdupq_n_f32(1.0f / 720.0f);
    e = vfmaq_f32(vdupq_n_f32(1.0f / 120.0f), e, r);
    e = vfmaq_f32(vdupq_n_f32(1.0f / 24.0f), e, r);
    e = vfmaq_f32(vdupq_n_f32(1.0f / 6.0f), e, r);
    e = vfmaq_f32(vdupq_n_f32(0.5f), e, r);
    e = vfmaq_f32(vdupq_n_f32(1.0f), e, r);
    e = vfmaq_f32(vdupq_n_f32(1.0f), e, r);
    const int32x4_t power = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23);
    e = vmulq_f32(e, vreinterpretq_f32_s32(power));
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(e), tiny));
}

/* Rows shorter than a multiple of 4 end in a vector filled up with -infinity. */
INLINE float32x4_t load_scores(const float * s, int n) {
    if (n >= 4) {
        return vld1q_f32(s);
    }
    float last[4];
    for (int i = 0; i < 4; ++i) {
        last[i] = i < n ? s[i] : -INFINITY;
    }
    return vld1q_f32(last);
}

INLINE void store_scores(float * s, int n, float32x4_t e) {
    if (n >= 4) {
        vst1q_f32(s, e);
        return;
    }
    float last[4];
    vst1q_f32(last, e);
    memcpy(s, last, (size_t) n * sizeof(float));
}

static float softmax_row(float * s, int n, float * max, float * sum) {
    float32x4_t v = vdupq_n_f32(*max);
    for (int t = 0; t < n; t += 4) {
        v = vmaxq_f32(v, load_scores(s + t, n - t));
    }
    const float top = vmaxvq_f32(v);
    const float base = top == -INFINITY ? 0.0f : top; /* no key seen: zeros, but NaN stays NaN */
    const float factor = top == *max ? 1.0f : expf(*max - top);
    float32x4_t total = vdupq_n_f32(0.0f);
    for (int t = 0; t < n; t += 4) {
        const float32x4_t e = exp4(vsubq_f32(load_scores(s + t, n - t), vdupq_n_f32(base)));
        store_scores(s + t, n - t, e);
        total = vaddq_f32(total, e);
    }
    *max = top;
    *sum = *sum * factor + vaddvq_f32(total);
    return factor;
}

/* n_row rows of c at a time, four vectors of columns: at most 24 sums in registers. */
INLINE void gemm_rows(int n_row, const float * a, int a_row, int a_k, const float * b, int n_k, int n_col, int add,
                      float * c) {
    float32x4_t sum[6][4];
    for (int r = 0; r < n_row; ++r) {
        for (int j = 0; j < 4; ++j) {
            sum[r][j] = add ? vld1q_f32(c + r * n_col + 4 * j) : vdupq_n_f32(0.0f);
        }
    }
    for (int k = 0; k < n_k; ++k, a += a_k, b += n_col) {
        float32x4_t bk[4];
        for (int j = 0; j < 4; ++j) {
            bk[j] = vld1q_f32(b + 4 * j);
        }
        for (int r = 0; r < n_row; ++r) {
            for (int j = 0; j < 4; ++j) {
                sum[r][j] = vfmaq_n_f32(sum[r][j], bk[j], a[r * a_row]);
            }
        }
    }
    for (int r = 0; r < n_row; ++r) {
        for (int j = 0; j < 4; ++j) {
            vst1q_f32(c + r * n_col + 4 * j, sum[r][j]);
        }
    }
}

static void gemm(const float * a, int a_row, int a_k, const float * b, int n_row, int n_k, int n_col, int add,
                 float * c) {
    for (int j = 0; j < n_col; j += TQI_LANES) {
        int r = 0;
        for (; r + 6 <= n_row; r += 6) {
            gemm_rows(6, a + (size_t) r * (size_t) a_row, a_row, a_k, b + j, n_k, n_col, add,
                      c + (size_t) r * (size_t) n_col + j);
        }
        for (; r < n_row; ++r) {
            gemm_rows(1, a + (size_t) r * (size_t) a_row, a_row, a_k, b + j, n_k, n_col, add,
                      c + (size_t) r * (size_t) n_col + j);
        }
    }
}

static void softmax_columns(float * s, int n_row, int n_col, float * max, float * sum, float * factor) {
    for (int j = 0; j < n_col; j += 4) {
        const float32x4_t old = vld1q_f32(max + j);
        float32x4_t top = old;
        for (int t = 0; t < n_row; ++t) {
            top = vmaxq_f32(top, vld1q_f32(s + t * n_col + j));
        }
        /* a column that has seen no key yet: subtract 0 instead of -infinity, so that its exponentials are 0, not NaN */
        const uint32x4_t empty = vceqq_f32(top, vdupq_n_f32(-INFINITY));
        const float32x4_t base = vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(top), empty));
        const float32x4_t f = exp4(vsubq_f32(old, base));
        float32x4_t total = vmulq_f32(f, vld1q_f32(sum + j));
        for (int t = 0; t < n_row; ++t) {
            const float32x4_t e = exp4(vsubq_f32(vld1q_f32(s + t * n_col + j), base));
            vst1q_f32(s + t * n_col + j, e);
            total = vaddq_f32(total, e);
        }
        vst1q_f32(max + j, top);
        vst1q_f32(sum + j, total);
        vst1q_f32(factor + j, f);
    }
}

/* ---- Rows of a tail ---- */

#define VF float32x4_t
#define VF_LANES 4
#define vf_zero() vdupq_n_f32(0.0f)
#define vf_set1(x) vdupq_n_f32(x)
#define vf_load(p) vld1q_f32(p)
#define vf_store(p, a) vst1q_f32(p, a)
#define vf_load_f16(p) vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))
#define vf_store_f16(p, a) vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a)))
#define vf_clamp(a, limit) vminq_f32(vmaxq_f32(a, vdupq_n_f32(-(limit))), vdupq_n_f32(limit))
#define vf_fma(a, b, c) vfmaq_f32(c, a, b)
#define vf_sum(a) vaddvq_f32(a)
#include "rows_f16.h"

const tqi_kernels tqi_kernels_neon = {
    .name = "neon",
    .supported = supported,
    .encode = encode,
    .decode = decode,
    .unpack = unpack,
    .widen = widen,
    .narrow = narrow,
    .transform = transform,
    .inverse_transform = inverse_transform,
    .scores = scores,
    .accumulate = accumulate,
    .scores_f16 = scores_f16,
    .accumulate_f16 = accumulate_f16,
    .softmax_row = softmax_row,
    .gemm = gemm,
    .softmax_columns = softmax_columns,
};
