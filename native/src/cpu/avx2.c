/* avx2.c: AVX2 + FMA + F16C. One block is four vectors of eight values.
 *
 * encode and decode follow the portable order of operations exactly (no FMA there); the attention steps use FMA. */
#include "features_x86.h"
#include "kernels.h"
#include "trellis.h"

#include <immintrin.h>
#include <math.h>

static int supported(void) {
    return tqi_has_avx2_fma_f16c();
}

#define INLINE static inline __attribute__((always_inline))

/* ---- Transform ---- */

typedef struct {
    __m256 v[4]; /* values 8i .. 8i + 7 */
} block;

INLINE block load_block(const float * x) {
    return (block) { { _mm256_loadu_ps(x), _mm256_loadu_ps(x + 8), _mm256_loadu_ps(x + 16), _mm256_loadu_ps(x + 24) } };
}

INLINE void store_block(float * x, block y) {
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(x + 8 * i, y.v[i]);
    }
}

/* One butterfly stage inside a vector: lanes whose partner lies below get partner - self, the others self + partner. */
#define STAGE(x, partner, minus) _mm256_add_ps(partner, _mm256_xor_ps(x, minus))

INLINE block hadamard32(block y) {
    const __m256 minus1 = _mm256_setr_ps(0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f, 0.0f, -0.0f);
    const __m256 minus2 = _mm256_setr_ps(0.0f, 0.0f, -0.0f, -0.0f, 0.0f, 0.0f, -0.0f, -0.0f);
    const __m256 minus4 = _mm256_setr_ps(0.0f, 0.0f, 0.0f, 0.0f, -0.0f, -0.0f, -0.0f, -0.0f);
    const __m256 norm = _mm256_set1_ps(TQI_RSQRT_BLOCK);
    for (int i = 0; i < 4; ++i) {
        __m256 x = y.v[i];
        x = STAGE(x, _mm256_permute_ps(x, 0xb1), minus1);
        x = STAGE(x, _mm256_permute_ps(x, 0x4e), minus2);
        y.v[i] = STAGE(x, _mm256_permute2f128_ps(x, x, 1), minus4);
    }
    const __m256 a = _mm256_add_ps(y.v[0], y.v[1]), b = _mm256_sub_ps(y.v[0], y.v[1]);
    const __m256 c = _mm256_add_ps(y.v[2], y.v[3]), d = _mm256_sub_ps(y.v[2], y.v[3]);
    return (block) { {
        _mm256_mul_ps(_mm256_add_ps(a, c), norm),
        _mm256_mul_ps(_mm256_add_ps(b, d), norm),
        _mm256_mul_ps(_mm256_sub_ps(a, c), norm),
        _mm256_mul_ps(_mm256_sub_ps(b, d), norm),
    } };
}

INLINE block apply_signs(block y) {
    const block s = load_block(tqi_signs);
    for (int i = 0; i < 4; ++i) {
        y.v[i] = _mm256_mul_ps(y.v[i], s.v[i]);
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

/* ---- Encode ---- */

/* tqi_sum32's halving tree. */
INLINE float sum32(block p) {
    const __m256 q = _mm256_add_ps(_mm256_add_ps(p.v[0], p.v[2]), _mm256_add_ps(p.v[1], p.v[3]));
    __m128 r = _mm_add_ps(_mm256_castps256_ps128(q), _mm256_extractf128_ps(q, 1));
    r = _mm_add_ps(r, _mm_movehl_ps(r, r));
    r = _mm_add_ss(r, _mm_movehdup_ps(r));
    return _mm_cvtss_f32(r);
}

INLINE float max8(__m256 q) {
    __m128 r = _mm_max_ps(_mm256_castps256_ps128(q), _mm256_extractf128_ps(q, 1));
    r = _mm_max_ps(r, _mm_movehl_ps(r, r));
    r = _mm_max_ss(r, _mm_movehdup_ps(r));
    return _mm_cvtss_f32(r);
}

INLINE float sum8(__m256 q) {
    __m128 r = _mm_add_ps(_mm256_castps256_ps128(q), _mm256_extractf128_ps(q, 1));
    r = _mm_add_ps(r, _mm_movehl_ps(r, r));
    r = _mm_add_ss(r, _mm_movehdup_ps(r));
    return _mm_cvtss_f32(r);
}

/* A codebook in registers: a binary search over its boundaries and the lookup of its levels. */
typedef struct {
    __m256 low, high; /* levels 0..7, 8..15 */
    __m256 middle, second, third,
        last; /* the boundaries that each step of the search compares with, by the index so far */
} table;

INLINE __m256 pick8(const float * x, int begin, int step) {
    return _mm256_setr_ps(x[begin], x[begin + step], x[begin + 2 * step], x[begin + 3 * step], x[begin + 4 * step],
                          x[begin + 5 * step], x[begin + 6 * step], x[begin + 7 * step]);
}

INLINE table load_table(const tqi_codec * codec) {
    const float * b = codec->boundaries;
    table t = { .low = _mm256_loadu_ps(codec->levels) };
    if (codec->bits == 3) {
        /* index 4 or 0 by b[3]; then b[index + 1] is b[1] or b[5]; then b[index] */
        t.middle = _mm256_set1_ps(b[3]);
        t.second = _mm256_setr_ps(b[1], b[1], b[1], b[1], b[5], b[5], b[5], b[5]);
        t.last = _mm256_setr_ps(b[0], b[0], b[2], b[2], b[4], b[4], b[6], b[6]);
    } else {
        /* the same over pairs of levels (index / 2), then one more step inside the pair: b[2 * pair] */
        t.high = _mm256_loadu_ps(codec->levels + 8);
        t.middle = _mm256_set1_ps(b[7]);
        t.second = _mm256_setr_ps(b[3], b[3], b[3], b[3], b[11], b[11], b[11], b[11]);
        t.third = _mm256_setr_ps(b[1], b[1], b[5], b[5], b[9], b[9], b[13], b[13]);
        t.last = pick8(b, 0, 2);
    }
    return t;
}

/* Adds step to index where t is above the boundary: a true comparison is -1, masked to the step. */
#define CLIMB(index, t, boundary, step)                                                                                \
    _mm256_or_si256(index, _mm256_and_si256(_mm256_castps_si256(_mm256_cmp_ps(t, boundary, _CMP_GT_OQ)), step))

INLINE __m256i index8(int bits, const table * c, __m256 t) {
    const __m256i one = _mm256_set1_epi32(1), two = _mm256_set1_epi32(2), four = _mm256_set1_epi32(4);
    __m256i index = CLIMB(_mm256_setzero_si256(), t, c->middle, four);
    index = CLIMB(index, t, _mm256_permutevar8x32_ps(c->second, index), two);
    if (bits == 3) {
        return CLIMB(index, t, _mm256_permutevar8x32_ps(c->last, index), one);
    }
    index = CLIMB(index, t, _mm256_permutevar8x32_ps(c->third, index), one);
    const __m256i last = _mm256_castps_si256(_mm256_cmp_ps(t, _mm256_permutevar8x32_ps(c->last, index), _CMP_GT_OQ));
    return _mm256_sub_epi32(_mm256_add_epi32(index, index), last);
}

INLINE __m256 level8(int bits, const table * c, __m256i index) {
    const __m256 low = _mm256_permutevar8x32_ps(c->low, index);
    if (bits == 3) {
        return low;
    }
    const __m256 high = _mm256_permutevar8x32_ps(c->high, index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}

/* Packs eight indices into the low 8 * bits bits of a word. */
INLINE uint32_t pack8(int bits, __m256i index) {
    const __m256i shift =
        bits == 3 ? _mm256_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21) : _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i word = _mm256_sllv_epi32(index, shift);
    __m128i half = _mm_or_si128(_mm256_castsi256_si128(word), _mm256_extracti128_si256(word, 1));
    half = _mm_or_si128(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_or_si128(half, _mm_shuffle_epi32(half, 0xb1));
    return (uint32_t) _mm_cvtsi128_si32(half);
}

INLINE block sanitize(block x) {
    const __m256 limit = _mm256_set1_ps(TQI_F16_MAX);
    for (int i = 0; i < 4; ++i) {
        const __m256 number = _mm256_and_ps(x.v[i], _mm256_cmp_ps(x.v[i], x.v[i], _CMP_ORD_Q));
        x.v[i] = _mm256_max_ps(_mm256_min_ps(number, limit), _mm256_sub_ps(_mm256_setzero_ps(), limit));
    }
    return x;
}

INLINE void put_block(int bits, const table * c, uint16_t d, block t, uint8_t * out) {
    if ((d & 0x7fffu) == 0) {
        memset(out, 0, bits == 3 ? TQI_PQO3_BYTES : TQI_PQO4_BYTES);
        return;
    }
    memcpy(out, &d, sizeof d);
    out += sizeof d;
    for (int i = 0; i < 4; ++i) {
        const uint32_t word = pack8(bits, index8(bits, c, t.v[i]));
        memcpy(out, &word, (size_t) bits);
        out += bits;
    }
}

INLINE float search_scale(int bits, const tqi_codec * codec, const table * c, block y) {
    const float high = 1.0f / codec->levels[codec->n_levels - 1];
    const float low = 1.0f / codec->levels[0];
    const __m256 top = _mm256_max_ps(_mm256_max_ps(y.v[0], y.v[1]), _mm256_max_ps(y.v[2], y.v[3]));
    const __m256 end = _mm256_min_ps(_mm256_min_ps(y.v[0], y.v[1]), _mm256_min_ps(y.v[2], y.v[3]));
    const float max = max8(top);
    const float min = -max8(_mm256_sub_ps(_mm256_setzero_ps(), end));
    if (max < TQI_AMAX_MIN && -min < TQI_AMAX_MIN) {
        return 0.0f;
    }
    const float base[2] = { fmaxf(max * high, min * low), -fmaxf(-min * high, -max * low) };
    float best = -1.0f, d = 0.0f;
    for (int f = 0; f < codec->n_factors; ++f) {
        for (int s = 0; s < 2; ++s) {
            const __m256 inverse = _mm256_set1_ps(1.0f / (base[s] * codec->factors[f]));
            block a, b;
            for (int i = 0; i < 4; ++i) {
                const __m256 v = level8(bits, c, index8(bits, c, _mm256_mul_ps(y.v[i], inverse)));
                a.v[i] = _mm256_mul_ps(y.v[i], v);
                b.v[i] = _mm256_mul_ps(v, v);
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

INLINE uint16_t f32_to_f16(float x) {
    return (uint16_t) _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
}

INLINE void encode_search(int bits, const tqi_codec * codec, const table * c, const float * x, int64_t n_blocks,
                          uint8_t * blocks) {
    for (int64_t b = 0; b < n_blocks; ++b, x += TQ_BLOCK, blocks += codec->block_bytes) {
        block y = transform_block(TQI_SIGNS_FIRST, sanitize(load_block(x)));
        const uint16_t d = f32_to_f16(tqi_sanitize(search_scale(bits, codec, c, y)));
        const __m256 inverse = _mm256_set1_ps(1.0f / _cvtsh_ss(d));
        for (int i = 0; i < 4; ++i) {
            y.v[i] = _mm256_mul_ps(y.v[i], inverse);
        }
        put_block(bits, c, d, y, blocks);
    }
}

INLINE float amax(block y) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    for (int i = 0; i < 4; ++i) {
        y.v[i] = _mm256_andnot_ps(sign, y.v[i]);
    }
    return max8(_mm256_max_ps(_mm256_max_ps(y.v[0], y.v[1]), _mm256_max_ps(y.v[2], y.v[3])));
}

INLINE block divide(block y, float d) {
    for (int i = 0; i < 4; ++i) {
        y.v[i] = _mm256_div_ps(y.v[i], _mm256_set1_ps(d));
    }
    return y;
}

INLINE void encode_norm(int bits, const tqi_codec * codec, const table * c, const float * x, int64_t n_blocks,
                        uint8_t * blocks) {
    for (int64_t b = 0; b < n_blocks; ++b, x += TQ_BLOCK, blocks += codec->block_bytes) {
        block y = sanitize(load_block(x));
        float d;
        if (codec->mode == TQ_MODE_MAXNORM) {
            y = transform_block(TQI_SIGNS_LAST, y);
            d = amax(y) / codec->outer;
            d = d > TQI_NORM_MIN ? d : TQI_NORM_MIN;
            y = divide(y, d);
        } else {
            block squares;
            for (int i = 0; i < 4; ++i) {
                squares.v[i] = _mm256_mul_ps(y.v[i], y.v[i]);
            }
            d = sqrtf(sum32(squares));
            d = d > TQI_NORM_MIN ? d : TQI_NORM_MIN;
            y = transform_block(TQI_SIGNS_LAST, divide(y, d));
        }
        put_block(bits, c, f32_to_f16(d < TQI_F16_MAX ? d : TQI_F16_MAX), y, blocks);
    }
}

static void encode(const tqi_codec * codec, const float * x, int64_t n_blocks, uint8_t * blocks) {
    if (codec->trellis) {
        tqi_trellis_encode(codec, transform, tqi_trellis_search_avx2, x, n_blocks, blocks);
        return;
    }
    const table c = load_table(codec);
    if (codec->mode != TQ_MODE_SEARCH) {
        if (codec->bits == 3) {
            encode_norm(3, codec, &c, x, n_blocks, blocks);
        } else {
            encode_norm(4, codec, &c, x, n_blocks, blocks);
        }
    } else if (codec->bits == 3) {
        encode_search(3, codec, &c, x, n_blocks, blocks);
    } else {
        encode_search(4, codec, &c, x, n_blocks, blocks);
    }
}

/* ---- Decode ---- */

/* The eight indices of group g, in the low bits of eight lanes; higher bits are not cleared. Reads inside the block only:
 * the last three bytes of a 3-bit block are read with the byte before them. */
INLINE __m256i indices8(int bits, const uint8_t * qs, int g) {
    if (bits == 4) {
        return _mm256_srlv_epi32(_mm256_set1_epi32((int) tqi_load_u32(qs + 4 * g)),
                                 _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    }
    if (g < 3) {
        return _mm256_srlv_epi32(_mm256_set1_epi32((int) tqi_load_u32(qs + 3 * g)),
                                 _mm256_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21));
    }
    return _mm256_srlv_epi32(_mm256_set1_epi32((int) tqi_load_u32(qs + 8)),
                             _mm256_setr_epi32(8, 11, 14, 17, 20, 23, 26, 29));
}

typedef struct {
    __m256 low, high;
} levels;

INLINE levels load_levels(const tqi_codec * codec) {
    return (levels) { _mm256_loadu_ps(codec->levels), _mm256_loadu_ps(codec->levels + 8) };
}

/* vpermps reads only the low three bits of each lane, so the indices need no mask. */
INLINE __m256 values8(int bits, levels c, const uint8_t * qs, int g) {
    const __m256i index = indices8(bits, qs, g);
    const __m256 low = _mm256_permutevar8x32_ps(c.low, index);
    if (bits == 3) {
        return low;
    }
    return _mm256_blendv_ps(low, _mm256_permutevar8x32_ps(c.high, index),
                            _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}

INLINE block unpack_block(int bits, levels c, const uint8_t * in) {
    const __m256 d = _mm256_set1_ps(tqi_block_scale(in));
    block y;
    for (int g = 0; g < 4; ++g) {
        y.v[g] = _mm256_mul_ps(d, values8(bits, c, in + sizeof(uint16_t), g));
    }
    return y;
}

static void unpack(const tqi_codec * codec, const uint8_t * blocks, int64_t n_blocks, float * y) {
    if (codec->trellis) {
        tqi_trellis_unpack_avx2(codec, blocks, n_blocks, y);
        return;
    }
    const levels c = load_levels(codec);
    if (codec->bits == 3) {
        for (int64_t b = 0; b < n_blocks; ++b, y += TQ_BLOCK, blocks += TQI_PQO3_BYTES) {
            store_block(y, unpack_block(3, c, blocks));
        }
    } else {
        for (int64_t b = 0; b < n_blocks; ++b, y += TQ_BLOCK, blocks += TQI_PQO4_BYTES) {
            store_block(y, unpack_block(4, c, blocks));
        }
    }
}

static void decode(const tqi_codec * codec, const uint8_t * blocks, int64_t n_blocks, float * x) {
    unpack(codec, blocks, n_blocks, x);
    inverse_transform(codec->signs, x, n_blocks);
}

static void widen(const uint16_t * x, int64_t n, float * y) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (const void *) (x + i))));
    }
    for (; i < n; ++i) {
        y[i] = _cvtsh_ss(tqi_load_u16(x + i));
    }
}

/* ---- Attention ---- */

INLINE __m256 scale8(const uint8_t * in) {
    const uint16_t h = tqi_load_u16(in);
    return _mm256_set1_ps(_cvtsh_ss((h & 0x7c00u) == 0x7c00u ? 0 : h));
}

/* One token's scores against n_q query vectors; every block is decoded once. */
#define SCORES(BITS, N_Q)                                                                                              \
    static void scores_##BITS##_##N_Q(levels c, const uint8_t * k, size_t stride, int n_tok, const float * q,          \
                                      int n_blocks, float * s, int ld) {                                               \
        for (int t = 0; t < n_tok; ++t) {                                                                              \
            const uint8_t * in = k + (size_t) t * stride;                                                              \
            tqi_prefetch(in + TQI_AHEAD * stride, (size_t) (n_blocks * ((BITS) * 4 + 2)));                             \
            const float * qb = q;                                                                                      \
            __m256 total[N_Q];                                                                                         \
            for (int i = 0; i < N_Q; ++i) {                                                                            \
                total[i] = _mm256_setzero_ps();                                                                        \
            }                                                                                                          \
            for (int b = 0; b < n_blocks; ++b, in += (BITS) * 4 + 2, qb += TQ_BLOCK) {                                 \
                const __m256 d = scale8(in);                                                                           \
                __m256 v[4];                                                                                           \
                for (int g = 0; g < 4; ++g) {                                                                          \
                    v[g] = values8(BITS, c, in + 2, g);                                                                \
                }                                                                                                      \
                for (int i = 0; i < N_Q; ++i) {                                                                        \
                    const float * qi = qb + i * n_blocks * TQ_BLOCK;                                                   \
                    __m256 p = _mm256_mul_ps(v[0], _mm256_loadu_ps(qi));                                               \
                    p = _mm256_fmadd_ps(v[1], _mm256_loadu_ps(qi + 8), p);                                             \
                    p = _mm256_fmadd_ps(v[2], _mm256_loadu_ps(qi + 16), p);                                            \
                    p = _mm256_fmadd_ps(v[3], _mm256_loadu_ps(qi + 24), p);                                            \
                    total[i] = _mm256_fmadd_ps(d, p, total[i]);                                                        \
                }                                                                                                      \
            }                                                                                                          \
            for (int i = 0; i < N_Q; ++i) {                                                                            \
                s[i * ld + t] = sum8(total[i]);                                                                        \
            }                                                                                                          \
        }                                                                                                              \
    }

/* GROUPS of eight values at a time keep N_Q * GROUPS sums in registers over all tokens. */
#define ACCUMULATE(BITS, N_Q, GROUPS)                                                                                  \
    static void accumulate_##BITS##_##N_Q(levels c, const uint8_t * v, size_t stride, int n_tok, const float * p,      \
                                          int ld, int n_blocks, float * o) {                                           \
        for (int b = 0; b < n_blocks; ++b) {                                                                           \
            for (int g = 0; g < 4; g += GROUPS) {                                                                      \
                const uint8_t * in = v + b * ((BITS) * 4 + 2);                                                         \
                float * ob = o + b * TQ_BLOCK + 8 * g;                                                                 \
                __m256 sum[N_Q][GROUPS];                                                                               \
                for (int i = 0; i < N_Q; ++i) {                                                                        \
                    for (int h = 0; h < GROUPS; ++h) {                                                                 \
                        sum[i][h] = _mm256_loadu_ps(ob + i * n_blocks * TQ_BLOCK + 8 * h);                             \
                    }                                                                                                  \
                }                                                                                                      \
                for (int t = 0; t < n_tok; ++t, in += stride) {                                                        \
                    const __m256 d = scale8(in);                                                                       \
                    if (g == 0) {                                                                                      \
                        tqi_prefetch(in + TQI_AHEAD * stride, (BITS) * 4 + 2);                                         \
                    }                                                                                                  \
                    __m256 x[GROUPS];                                                                                  \
                    for (int h = 0; h < GROUPS; ++h) {                                                                 \
                        x[h] = values8(BITS, c, in + 2, g + h);                                                        \
                    }                                                                                                  \
                    for (int i = 0; i < N_Q; ++i) {                                                                    \
                        const __m256 w = _mm256_mul_ps(d, _mm256_broadcast_ss(p + i * ld + t));                        \
                        for (int h = 0; h < GROUPS; ++h) {                                                             \
                            sum[i][h] = _mm256_fmadd_ps(w, x[h], sum[i][h]);                                           \
                        }                                                                                              \
                    }                                                                                                  \
                }                                                                                                      \
                for (int i = 0; i < N_Q; ++i) {                                                                        \
                    for (int h = 0; h < GROUPS; ++h) {                                                                 \
                        _mm256_storeu_ps(ob + i * n_blocks * TQ_BLOCK + 8 * h, sum[i][h]);                             \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

#define EACH_N_Q(BITS)                                                                                                 \
    SCORES(BITS, 1)                                                                                                    \
    SCORES(BITS, 2) SCORES(BITS, 3) SCORES(BITS, 4) SCORES(BITS, 5) SCORES(BITS, 6) SCORES(BITS, 7) SCORES(BITS, 8)    \
        ACCUMULATE(BITS, 1, 4) ACCUMULATE(BITS, 2, 4) ACCUMULATE(BITS, 3, 2) ACCUMULATE(BITS, 4, 2)                    \
            ACCUMULATE(BITS, 5, 2) ACCUMULATE(BITS, 6, 1) ACCUMULATE(BITS, 7, 1) ACCUMULATE(BITS, 8, 1)

EACH_N_Q(3)
EACH_N_Q(4)

#define ROW_OF(name, BITS)                                                                                             \
    { name##_##BITS##_1, name##_##BITS##_2, name##_##BITS##_3, name##_##BITS##_4,                                      \
      name##_##BITS##_5, name##_##BITS##_6, name##_##BITS##_7, name##_##BITS##_8 }

static void scores(const tqi_codec * codec, const uint8_t * k, size_t stride, int n_tok, const float * q, int n_q,
                   int n_blocks, float * s, int ld) {
    if (codec->trellis) {
        tqi_trellis_scores_avx2(codec, k, stride, n_tok, q, n_q, n_blocks, s, ld);
        return;
    }
    static void (*const f[2][TQI_MAX_FUSED])(levels, const uint8_t *, size_t, int, const float *, int, float *,
                                             int) = { ROW_OF(scores, 3), ROW_OF(scores, 4) };
    f[codec->bits - 3][n_q - 1](load_levels(codec), k, stride, n_tok, q, n_blocks, s, ld);
}

static void accumulate(const tqi_codec * codec, const uint8_t * v, size_t stride, int n_tok, const float * p, int ld,
                       int n_q, int n_blocks, float * o) {
    if (codec->trellis) {
        tqi_trellis_accumulate_avx2(codec, v, stride, n_tok, p, ld, n_q, n_blocks, o);
        return;
    }
    static void (*const f[2][TQI_MAX_FUSED])(levels, const uint8_t *, size_t, int, const float *, int, int,
                                             float *) = { ROW_OF(accumulate, 3), ROW_OF(accumulate, 4) };
    f[codec->bits - 3][n_q - 1](load_levels(codec), v, stride, n_tok, p, ld, n_blocks, o);
}

/* exp for x <= 0: x = n ln 2 + r, |r| <= ln 2 / 2, degree-6 Taylor polynomial for e^r; 0 below -87.3. Relative error under
 * 2e-7 (ln 2 in two parts after Cody and Waite). */
INLINE __m256 exp8(__m256 x) {
    const __m256 tiny = _mm256_cmp_ps(x, _mm256_set1_ps(-87.3f), _CMP_LT_OQ);
    const __m256 n =
        _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 e = _mm256_set1_ps(1.0f / 720.0f);
    e = _mm256_fmadd_ps(e, r, _mm256_set1_ps(1.0f / 120.0f));
    e = _mm256_fmadd_ps(e, r, _mm256_set1_ps(1.0f / 24.0f));
    e = _mm256_fmadd_ps(e, r, _mm256_set1_ps(1.0f / 6.0f));
    e = _mm256_fmadd_ps(e, r, _mm256_set1_ps(0.5f));
    e = _mm256_fmadd_ps(e, r, _mm256_set1_ps(1.0f));
    e = _mm256_fmadd_ps(e, r, _mm256_set1_ps(1.0f));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_andnot_ps(tiny, _mm256_mul_ps(e, _mm256_castsi256_ps(power)));
}

/* Rows shorter than a multiple of 8 end in a vector filled up with -infinity. */
INLINE __m256 load_scores(const float * s, int n) {
    if (n >= 8) {
        return _mm256_loadu_ps(s);
    }
    float last[8];
    for (int i = 0; i < 8; ++i) {
        last[i] = i < n ? s[i] : -INFINITY;
    }
    return _mm256_loadu_ps(last);
}

INLINE void store_scores(float * s, int n, __m256 e) {
    if (n >= 8) {
        _mm256_storeu_ps(s, e);
        return;
    }
    float last[8];
    _mm256_storeu_ps(last, e);
    memcpy(s, last, (size_t) n * sizeof(float));
}

static float softmax_row(float * s, int n, float * max, float * sum) {
    __m256 v = _mm256_set1_ps(*max);
    for (int t = 0; t < n; t += 8) {
        v = _mm256_max_ps(v, load_scores(s + t, n - t));
    }
    const float top = max8(v);
    const float base = top == -INFINITY ? 0.0f : top; /* no key seen: zeros, but NaN stays NaN */
    const float factor = top == *max ? 1.0f : expf(*max - top);
    __m256 total = _mm256_setzero_ps();
    for (int t = 0; t < n; t += 8) {
        const __m256 e = exp8(_mm256_sub_ps(load_scores(s + t, n - t), _mm256_set1_ps(base)));
        store_scores(s + t, n - t, e);
        total = _mm256_add_ps(total, e);
    }
    *max = top;
    *sum = *sum * factor + sum8(total);
    return factor;
}

/* Rows of c at a time, two vectors of columns: 12 sums in registers. */
#define GEMM_ROWS(ROWS)                                                                                                \
    static void gemm_##ROWS(const float * a, int a_row, int a_k, const float * b, int n_k, int n_col, int add,         \
                            float * c) {                                                                               \
        __m256 sum[ROWS][2];                                                                                           \
        for (int r = 0; r < ROWS; ++r) {                                                                               \
            sum[r][0] = add ? _mm256_loadu_ps(c + r * n_col) : _mm256_setzero_ps();                                    \
            sum[r][1] = add ? _mm256_loadu_ps(c + r * n_col + 8) : _mm256_setzero_ps();                                \
        }                                                                                                              \
        for (int k = 0; k < n_k; ++k, a += a_k, b += n_col) {                                                          \
            const __m256 b0 = _mm256_loadu_ps(b), b1 = _mm256_loadu_ps(b + 8);                                         \
            for (int r = 0; r < ROWS; ++r) {                                                                           \
                const __m256 w = _mm256_broadcast_ss(a + r * a_row);                                                   \
                sum[r][0] = _mm256_fmadd_ps(w, b0, sum[r][0]);                                                         \
                sum[r][1] = _mm256_fmadd_ps(w, b1, sum[r][1]);                                                         \
            }                                                                                                          \
        }                                                                                                              \
        for (int r = 0; r < ROWS; ++r) {                                                                               \
            _mm256_storeu_ps(c + r * n_col, sum[r][0]);                                                                \
            _mm256_storeu_ps(c + r * n_col + 8, sum[r][1]);                                                            \
        }                                                                                                              \
    }

GEMM_ROWS(6)
GEMM_ROWS(1)

static void gemm(const float * a, int a_row, int a_k, const float * b, int n_row, int n_k, int n_col, int add,
                 float * c) {
    for (int j = 0; j < n_col; j += TQI_LANES) {
        int r = 0;
        for (; r + 6 <= n_row; r += 6) {
            gemm_6(a + (size_t) r * (size_t) a_row, a_row, a_k, b + j, n_k, n_col, add,
                   c + (size_t) r * (size_t) n_col + j);
        }
        for (; r < n_row; ++r) {
            gemm_1(a + (size_t) r * (size_t) a_row, a_row, a_k, b + j, n_k, n_col, add,
                   c + (size_t) r * (size_t) n_col + j);
        }
    }
}

static void softmax_columns(float * s, int n_row, int n_col, float * max, float * sum, float * factor) {
    const __m256 nothing = _mm256_set1_ps(-INFINITY);
    for (int j = 0; j < n_col; j += 8) {
        const __m256 old = _mm256_loadu_ps(max + j);
        __m256 top = old;
        for (int t = 0; t < n_row; ++t) {
            top = _mm256_max_ps(_mm256_loadu_ps(s + t * n_col + j), top);
        }
        /* a column that has seen no key yet: subtract 0 instead of -infinity, so that its exponentials are 0, not NaN */
        const __m256 empty = _mm256_cmp_ps(top, nothing, _CMP_EQ_OQ);
        const __m256 base = _mm256_andnot_ps(empty, top);
        const __m256 f = exp8(_mm256_sub_ps(old, base));
        __m256 total = _mm256_mul_ps(f, _mm256_loadu_ps(sum + j));
        for (int t = 0; t < n_row; ++t) {
            const __m256 e = exp8(_mm256_sub_ps(_mm256_loadu_ps(s + t * n_col + j), base));
            _mm256_storeu_ps(s + t * n_col + j, e);
            total = _mm256_add_ps(total, e);
        }
        _mm256_storeu_ps(max + j, top);
        _mm256_storeu_ps(sum + j, total);
        _mm256_storeu_ps(factor + j, f);
    }
}

/* ---- Rows of a tail ---- */

#define VF __m256
#define VF_LANES 8
#define vf_zero() _mm256_setzero_ps()
#define vf_set1(x) _mm256_set1_ps(x)
#define vf_load(p) _mm256_loadu_ps(p)
#define vf_store(p, a) _mm256_storeu_ps(p, a)
#define vf_load_f16(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (const void *) (p)))
#define vf_store_f16(p, a) _mm_storeu_si128((__m128i *) (void *) (p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT))
#define vf_clamp(a, limit) _mm256_min_ps(_mm256_max_ps(a, _mm256_set1_ps(-(limit))), _mm256_set1_ps(limit))
#define vf_fma(a, b, c) _mm256_fmadd_ps(a, b, c)
#define vf_sum(a) sum8(a)
#include "rows_f16.h"

const tqi_kernels tqi_kernels_avx2 = {
    .name = "avx2",
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
