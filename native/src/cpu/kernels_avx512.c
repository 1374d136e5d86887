/* kernels_avx512.c: AVX-512 with BW, DQ, VL and VBMI (Ice Lake, Zen 4 and later). One block is two vectors of 16 values.
 *
 * Both formats decode alike: vpermb brings each lane its two bytes, a variable shift brings the index down, vpermps looks
 * it up in 16 levels (3 bits: the eight levels twice, so bit 3 need not be cleared). */
#include "kernels.h"

#include <cpuid.h>
#include <immintrin.h>
#include <math.h>

static int supported(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi");
}

#define INLINE static inline __attribute__((always_inline))

/* ---- Transform ---- */

typedef struct {
    __m512 v[2]; /* values 0..15, 16..31 */
} block;

INLINE block load_block(const float * x) {
    return (block) { { _mm512_loadu_ps(x), _mm512_loadu_ps(x + 16) } };
}

INLINE void store_block(float * x, block y) {
    _mm512_storeu_ps(x, y.v[0]);
    _mm512_storeu_ps(x + 16, y.v[1]);
}

/* One butterfly stage inside a vector: lanes of the mask get partner - self, the others self + partner. */
#define STAGE(x, partner, mask) _mm512_mask_sub_ps(_mm512_add_ps(x, partner), mask, partner, x)

INLINE block hadamard32(block y) {
    const __m512 norm = _mm512_set1_ps(TQI_RSQRT_BLOCK);
    for (int i = 0; i < 2; ++i) {
        __m512 x = y.v[i];
        x        = STAGE(x, _mm512_permute_ps(x, 0xb1), 0xaaaa);
        x        = STAGE(x, _mm512_permute_ps(x, 0x4e), 0xcccc);
        x        = STAGE(x, _mm512_shuffle_f32x4(x, x, 0xb1), 0xf0f0);
        y.v[i]   = STAGE(x, _mm512_shuffle_f32x4(x, x, 0x4e), 0xff00);
    }
    return (block) { {
        _mm512_mul_ps(_mm512_add_ps(y.v[0], y.v[1]), norm),
        _mm512_mul_ps(_mm512_sub_ps(y.v[0], y.v[1]), norm),
    } };
}

INLINE block apply_signs(block y) {
    const block s = load_block(tqi_signs);
    return (block) { { _mm512_mul_ps(y.v[0], s.v[0]), _mm512_mul_ps(y.v[1], s.v[1]) } };
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
    const __m512 h = _mm512_add_ps(p.v[0], p.v[1]);
    const __m256 q = _mm256_add_ps(_mm512_castps512_ps256(h), _mm512_extractf32x8_ps(h, 1));
    __m128       r = _mm_add_ps(_mm256_castps256_ps128(q), _mm256_extractf128_ps(q, 1));
    r              = _mm_add_ps(r, _mm_movehl_ps(r, r));
    r              = _mm_add_ss(r, _mm_movehdup_ps(r));
    return _mm_cvtss_f32(r);
}

/* A codebook in registers: each step of a binary search over its boundaries compares with one looked up by the index so
 * far, and its levels. */
typedef struct {
    __m512 levels;
    __m512 step[4]; /* the boundary that decides index bit 3 (4-bit codebooks only), 2, 1, 0 */
} table;

INLINE table load_table(const tqi_codec * codec) {
    float step[4][16];
    for (int bit = 0; bit < 4; ++bit) {
        for (int i = 0; i < 16; ++i) {
            /* lanes whose higher bits are set choose between the levels around that multiple of 2^bit */
            const int above  = (i & (codec->n_levels - 1)) >> (bit + 1) << (bit + 1);
            step[3 - bit][i] = above + (1 << bit) <= codec->n_levels - 1 ? codec->boundaries[above + (1 << bit) - 1] : INFINITY;
        }
    }
    float levels[16];
    for (int i = 0; i < 16; ++i) {
        levels[i] = codec->levels[i & (codec->n_levels - 1)];
    }
    return (table) {
        .levels = _mm512_loadu_ps(levels),
        .step = { _mm512_loadu_ps(step[0]), _mm512_loadu_ps(step[1]), _mm512_loadu_ps(step[2]), _mm512_loadu_ps(step[3]) },
    };
}

INLINE __m512i index16(int bits, const table * c, __m512 t) {
    __m512i index = _mm512_setzero_si512();
    for (int bit = bits - 1; bit >= 0; --bit) {
        const __mmask16 above =
            _mm512_cmp_ps_mask(t, _mm512_permutexvar_ps(index, c->step[3 - bit]), _CMP_GT_OQ);
        index = _mm512_mask_or_epi32(index, above, index, _mm512_set1_epi32(1 << bit));
    }
    return index;
}

INLINE block sanitize(block x) {
    const __m512 limit = _mm512_set1_ps(TQI_F16_MAX), minus = _mm512_set1_ps(-TQI_F16_MAX);
    for (int i = 0; i < 2; ++i) {
        const __m512 number = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v[i], x.v[i], _CMP_ORD_Q), x.v[i]);
        x.v[i]              = _mm512_max_ps(_mm512_min_ps(number, limit), minus);
    }
    return x;
}

/* Packs 16 indices: lanes 0..7 and 8..15 into a word each of 8 * bits bits. */
INLINE void pack16(int bits, __m512i index, uint8_t * out) {
    const __m512i shift =
        bits == 3 ? _mm512_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21, 0, 3, 6, 9, 12, 15, 18, 21)
                  : _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    __m512i word = _mm512_sllv_epi32(index, shift);
    word         = _mm512_or_si512(word, _mm512_shuffle_epi32(word, _MM_PERM_BADC));
    word         = _mm512_or_si512(word, _mm512_shuffle_epi32(word, _MM_PERM_CDAB));
    word         = _mm512_or_si512(word, _mm512_shuffle_i32x4(word, word, 0xb1));
    const uint32_t low  = (uint32_t) _mm_cvtsi128_si32(_mm512_castsi512_si128(word));
    const uint32_t high = (uint32_t) _mm_cvtsi128_si32(_mm512_extracti32x4_epi32(word, 2));
    memcpy(out, &low, (size_t) bits);
    memcpy(out + bits, &high, (size_t) bits);
}

INLINE void put_block(int bits, const table * c, uint16_t d, block t, uint8_t * out) {
    if ((d & 0x7fffu) == 0) {
        memset(out, 0, (size_t) (4 * bits + 2));
        return;
    }
    memcpy(out, &d, sizeof d);
    pack16(bits, index16(bits, c, t.v[0]), out + 2);
    pack16(bits, index16(bits, c, t.v[1]), out + 2 + 2 * bits);
}

INLINE float search_scale(int bits, const tqi_codec * codec, const table * c, block y) {
    const float high = 1.0f / codec->levels[codec->n_levels - 1];
    const float low  = 1.0f / codec->levels[0];
    const float max  = _mm512_reduce_max_ps(_mm512_max_ps(y.v[0], y.v[1]));
    const float min  = _mm512_reduce_min_ps(_mm512_min_ps(y.v[0], y.v[1]));
    if (max < TQI_AMAX_MIN && -min < TQI_AMAX_MIN) {
        return 0.0f;
    }
    const float base[2] = { fmaxf(max * high, min * low), -fmaxf(-min * high, -max * low) };
    float       best = -1.0f, d = 0.0f;
    for (int f = 0; f < codec->n_factors; ++f) {
        for (int s = 0; s < 2; ++s) {
            const __m512 inverse = _mm512_set1_ps(1.0f / (base[s] * codec->factors[f]));
            block        a, b;
            for (int i = 0; i < 2; ++i) {
                const __m512 v = _mm512_permutexvar_ps(index16(bits, c, _mm512_mul_ps(y.v[i], inverse)), c->levels);
                a.v[i]         = _mm512_mul_ps(y.v[i], v);
                b.v[i]         = _mm512_mul_ps(v, v);
            }
            const float yv = sum32(a), vv = sum32(b);
            const float gain = yv * yv / vv;
            if (gain > best) {
                best = gain;
                d    = yv / vv;
            }
        }
    }
    return d;
}

INLINE uint16_t f32_to_f16(float x) {
    return (uint16_t) _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
}

INLINE void encode_search(int bits, const tqi_codec * codec, const float * x, int64_t n_blocks, uint8_t * blocks) {
    const table c = load_table(codec);
    for (int64_t b = 0; b < n_blocks; ++b, x += TQ_BLOCK, blocks += 4 * bits + 2) {
        block          y       = transform_block(TQI_SIGNS_FIRST, sanitize(load_block(x)));
        const uint16_t d       = f32_to_f16(tqi_sanitize(search_scale(bits, codec, &c, y)));
        const __m512   inverse = _mm512_set1_ps(1.0f / _cvtsh_ss(d));
        y.v[0]                 = _mm512_mul_ps(y.v[0], inverse);
        y.v[1]                 = _mm512_mul_ps(y.v[1], inverse);
        put_block(bits, &c, d, y, blocks);
    }
}

INLINE block divide(block y, float d) {
    return (block) { { _mm512_div_ps(y.v[0], _mm512_set1_ps(d)), _mm512_div_ps(y.v[1], _mm512_set1_ps(d)) } };
}

INLINE void encode_norm(int bits, const tqi_codec * codec, const float * x, int64_t n_blocks, uint8_t * blocks) {
    const table c = load_table(codec);
    for (int64_t b = 0; b < n_blocks; ++b, x += TQ_BLOCK, blocks += 4 * bits + 2) {
        block y = sanitize(load_block(x));
        float d;
        if (codec->mode == TQ_MODE_MAXNORM) {
            y = transform_block(TQI_SIGNS_LAST, y);
            d = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(y.v[0]), _mm512_abs_ps(y.v[1]))) / codec->outer;
            d = d > TQI_NORM_MIN ? d : TQI_NORM_MIN;
            y = divide(y, d);
        } else {
            d = sqrtf(sum32((block) { { _mm512_mul_ps(y.v[0], y.v[0]), _mm512_mul_ps(y.v[1], y.v[1]) } }));
            d = d > TQI_NORM_MIN ? d : TQI_NORM_MIN;
            y = transform_block(TQI_SIGNS_LAST, divide(y, d));
        }
        put_block(bits, &c, f32_to_f16(d < TQI_F16_MAX ? d : TQI_F16_MAX), y, blocks);
    }
}

static void encode(const tqi_codec * codec, const float * x, int64_t n_blocks, uint8_t * blocks) {
    if (codec->mode != TQ_MODE_SEARCH) {
        if (codec->bits == 3) {
            encode_norm(3, codec, x, n_blocks, blocks);
        } else {
            encode_norm(4, codec, x, n_blocks, blocks);
        }
    } else if (codec->bits == 3) {
        encode_search(3, codec, x, n_blocks, blocks);
    } else {
        encode_search(4, codec, x, n_blocks, blocks);
    }
}

/* ---- Decode ---- */

/* What a lane needs of a block, bytes 0 and 1 being the scale: where its two bytes are, how far to shift them. */
typedef struct {
    __m512  levels;
    __m512i bytes[2];
    __m512i shift;
} decoder;

/* The bytes of one block and nothing beyond it: two overlapping loads, of bytes 0..7 and 6..13 or 0..15 and 2..17. A masked
 * load would do, but costs more than both (2.0 instead of 1.7 ns per block of attention for two query heads on Zen 5). */
INLINE __m512i load_bytes(int bits, const uint8_t * in) {
    if (bits == 3) {
        const __m128i low = _mm_loadl_epi64((const __m128i *) (const void *) in);
        return _mm512_castsi128_si512(_mm_unpacklo_epi64(low, _mm_loadl_epi64((const __m128i *) (const void *) (in + 6))));
    }
    const __m128i low = _mm_loadu_si128((const __m128i *) (const void *) in);
    return _mm512_castsi256_si512(
        _mm256_inserti128_si256(_mm256_castsi128_si256(low), _mm_loadu_si128((const __m128i *) (const void *) (in + 2)), 1));
}

/* Where load_bytes puts byte i of a block. */
INLINE int loaded_at(int bits, int i) {
    return bits == 3 ? (i < 8 ? i : i + 2) : i < 16 ? i : i + 14;
}

INLINE decoder load_decoder(int bits, const tqi_codec * codec) {
    decoder c;
    uint8_t bytes[2][64] = { { 0 } };
    int32_t shift[16];
    float   levels[16];
    for (int i = 0; i < 16; ++i) {
        for (int half = 0; half < 2; ++half) {
            const int at           = 2 + bits * (16 * half + i) / 8;
            bytes[half][4 * i]     = (uint8_t) loaded_at(bits, at);
            bytes[half][4 * i + 1] = (uint8_t) loaded_at(bits, at + 1 < 4 * bits + 2 ? at + 1 : at);
        }
        shift[i]  = bits * i % 8;
        levels[i] = codec->levels[i & (codec->n_levels - 1)];
    }
    c.levels   = _mm512_loadu_ps(levels);
    c.bytes[0] = _mm512_loadu_si512(bytes[0]);
    c.bytes[1] = _mm512_loadu_si512(bytes[1]);
    c.shift    = _mm512_loadu_si512(shift);
    return c;
}

INLINE __m512 values16(const decoder * c, __m512i bytes, int half) {
    const __m512i word = _mm512_permutexvar_epi8(c->bytes[half], bytes);
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(word, c->shift), c->levels);
}

INLINE void unpack_rows(int bits, const tqi_codec * codec, const uint8_t * blocks, int64_t n_blocks, float * y) {
    const decoder c = load_decoder(bits, codec);
    for (int64_t b = 0; b < n_blocks; ++b, y += TQ_BLOCK, blocks += 4 * bits + 2) {
        const __m512i bytes = load_bytes(bits, blocks);
        const __m512  d     = _mm512_set1_ps(tqi_block_scale(blocks));
        _mm512_storeu_ps(y, _mm512_mul_ps(d, values16(&c, bytes, 0)));
        _mm512_storeu_ps(y + 16, _mm512_mul_ps(d, values16(&c, bytes, 1)));
    }
}

static void unpack(const tqi_codec * codec, const uint8_t * blocks, int64_t n_blocks, float * y) {
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

static void widen(const uint16_t * x, int64_t n, float * y) {
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 mask = (__mmask16) (n - i >= 16 ? 0xffffu : (1u << (n - i)) - 1u);
        _mm512_mask_storeu_ps(y + i, mask, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, x + i)));
    }
}

/* ---- Attention ---- */

/* Attention reads scales with the CPU's conversion: a hostile scale (infinity, NaN) stays what it is here. */
INLINE __m512 scale16(__m512i bytes) {
    return _mm512_broadcastss_ps(_mm_cvtph_ps(_mm512_castsi512_si128(bytes)));
}

/* Four vectors' sums. */
INLINE __m128 sum4(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512  ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512  cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d lo = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d hi = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512  s  = _mm512_add_ps(_mm512_castpd_ps(lo), _mm512_castpd_ps(hi));
    const __m256  h  = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
    return _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
}

/* total[i] = the lane-wise products of one token's key with query vector i; every block is decoded once. */
INLINE void products(int bits, int n_q, const decoder * c, const uint8_t * in, const float * q, int n_blocks, __m512 * total) {
    for (int i = 0; i < n_q; ++i) {
        total[i] = _mm512_setzero_ps();
    }
    for (int b = 0; b < n_blocks; ++b, in += 4 * bits + 2, q += TQ_BLOCK) {
        const __m512i bytes = load_bytes(bits, in);
        const __m512  d     = scale16(bytes);
        const __m512  v0    = values16(c, bytes, 0);
        const __m512  v1    = values16(c, bytes, 1);
        for (int i = 0; i < n_q; ++i) {
            const float * qi = q + i * n_blocks * TQ_BLOCK;
            const __m512  p  = _mm512_fmadd_ps(v1, _mm512_loadu_ps(qi + 16), _mm512_mul_ps(v0, _mm512_loadu_ps(qi)));
            total[i]         = _mm512_fmadd_ps(d, p, total[i]);
        }
    }
}

INLINE void scores_rows(int bits, int n_q, const tqi_codec * codec, const uint8_t * k, size_t stride, int n_tok, const float * q,
                        int n_blocks, float * s, int ld) {
    const decoder c = load_decoder(bits, codec);
    __m512        total[4][TQI_MAX_FUSED];
    for (int t = 0; t < n_tok; t += 4) {
        const int n = n_tok - t < 4 ? n_tok - t : 4;
        for (int j = 0; j < 4; ++j) { /* past the end: the last row again, not stored */
            products(bits, n_q, &c, k + (size_t) (t + (j < n ? j : n - 1)) * stride, q, n_blocks, total[j]);
        }
        for (int i = 0; i < n_q; ++i) {
            _mm_mask_storeu_ps(s + i * ld + t, (__mmask8) ((1u << n) - 1u),
                               sum4(total[0][i], total[1][i], total[2][i], total[3][i]));
        }
    }
}

/* n_col block columns at a time keep their sums for n_q vectors in registers over all tokens. */
INLINE void accumulate_columns(int bits, int n_q, int n_col, const decoder * c, const uint8_t * v, size_t stride, int n_tok,
                               const float * p, int ld, int dim, float * o) {
    __m512 sum[TQI_MAX_FUSED][4][2];
    for (int i = 0; i < n_q; ++i) {
        for (int b = 0; b < n_col; ++b) {
            sum[i][b][0] = _mm512_loadu_ps(o + i * dim + b * TQ_BLOCK);
            sum[i][b][1] = _mm512_loadu_ps(o + i * dim + b * TQ_BLOCK + 16);
        }
    }
    for (int t = 0; t < n_tok; ++t, v += stride) {
        for (int b = 0; b < n_col; ++b) {
            const __m512i bytes = load_bytes(bits, v + b * (4 * bits + 2));
            const __m512  d     = scale16(bytes);
            const __m512  v0    = values16(c, bytes, 0);
            const __m512  v1    = values16(c, bytes, 1);
            for (int i = 0; i < n_q; ++i) {
                const __m512 w = _mm512_mul_ps(d, _mm512_set1_ps(p[i * ld + t]));
                sum[i][b][0]   = _mm512_fmadd_ps(w, v0, sum[i][b][0]);
                sum[i][b][1]   = _mm512_fmadd_ps(w, v1, sum[i][b][1]);
            }
        }
    }
    for (int i = 0; i < n_q; ++i) {
        for (int b = 0; b < n_col; ++b) {
            _mm512_storeu_ps(o + i * dim + b * TQ_BLOCK, sum[i][b][0]);
            _mm512_storeu_ps(o + i * dim + b * TQ_BLOCK + 16, sum[i][b][1]);
        }
    }
}

INLINE void accumulate_rows(int bits, int n_q, const tqi_codec * codec, const uint8_t * v, size_t stride, int n_tok,
                            const float * p, int ld, int n_blocks, float * o) {
    const decoder c     = load_decoder(bits, codec);
    const int     n_col = n_q <= 2 ? 4 : n_q <= 4 ? 2 : 1;
    int           b     = 0;
    for (; b + n_col <= n_blocks; b += n_col) {
        accumulate_columns(bits, n_q, n_col, &c, v + b * (4 * bits + 2), stride, n_tok, p, ld, n_blocks * TQ_BLOCK,
                           o + b * TQ_BLOCK);
    }
    for (; b < n_blocks; ++b) {
        accumulate_columns(bits, n_q, 1, &c, v + b * (4 * bits + 2), stride, n_tok, p, ld, n_blocks * TQ_BLOCK, o + b * TQ_BLOCK);
    }
}

/* Calls f(bits, n_q, ...) with both as constants. */
#define BY_N_Q(f, bits, n_q, ...)                                                                                         \
    switch (n_q) {                                                                                                        \
        case 1: f(bits, 1, __VA_ARGS__); break;                                                                           \
        case 2: f(bits, 2, __VA_ARGS__); break;                                                                           \
        case 3: f(bits, 3, __VA_ARGS__); break;                                                                           \
        case 4: f(bits, 4, __VA_ARGS__); break;                                                                           \
        case 5: f(bits, 5, __VA_ARGS__); break;                                                                           \
        case 6: f(bits, 6, __VA_ARGS__); break;                                                                           \
        case 7: f(bits, 7, __VA_ARGS__); break;                                                                           \
        default: f(bits, 8, __VA_ARGS__); break;                                                                          \
    }

static void scores(const tqi_codec * codec, const uint8_t * k, size_t stride, int n_tok, const float * q, int n_q, int n_blocks,
                   float * s, int ld) {
    if (codec->bits == 3) {
        BY_N_Q(scores_rows, 3, n_q, codec, k, stride, n_tok, q, n_blocks, s, ld)
    } else {
        BY_N_Q(scores_rows, 4, n_q, codec, k, stride, n_tok, q, n_blocks, s, ld)
    }
}

static void accumulate(const tqi_codec * codec, const uint8_t * v, size_t stride, int n_tok, const float * p, int ld, int n_q,
                       int n_blocks, float * o) {
    if (codec->bits == 3) {
        BY_N_Q(accumulate_rows, 3, n_q, codec, v, stride, n_tok, p, ld, n_blocks, o)
    } else {
        BY_N_Q(accumulate_rows, 4, n_q, codec, v, stride, n_tok, p, ld, n_blocks, o)
    }
}

/* exp for x <= 0: x = n ln 2 + r, |r| <= ln 2 / 2, degree-6 Taylor polynomial for e^r; 0 below -87.3. Relative error under
 * 2e-7 (ln 2 in two parts after Cody and Waite). */
INLINE __m512 exp16(__m512 x) {
    const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.3f), _CMP_NLT_UQ);
    const __m512    n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512          r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r                 = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 e          = _mm512_set1_ps(1.0f / 720.0f);
    e                 = _mm512_fmadd_ps(e, r, _mm512_set1_ps(1.0f / 120.0f));
    e                 = _mm512_fmadd_ps(e, r, _mm512_set1_ps(1.0f / 24.0f));
    e                 = _mm512_fmadd_ps(e, r, _mm512_set1_ps(1.0f / 6.0f));
    e                 = _mm512_fmadd_ps(e, r, _mm512_set1_ps(0.5f));
    e                 = _mm512_fmadd_ps(e, r, _mm512_set1_ps(1.0f));
    e                 = _mm512_fmadd_ps(e, r, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(normal, e, n);
}

static float softmax_row(float * s, int n, float * max, float * sum) {
    const __m512 nothing = _mm512_set1_ps(-INFINITY);
    __m512       v       = _mm512_set1_ps(*max);
    for (int t = 0; t < n; t += 16) {
        const __mmask16 mask = (__mmask16) (n - t >= 16 ? 0xffffu : (1u << (n - t)) - 1u);
        v                    = _mm512_max_ps(v, _mm512_mask_loadu_ps(nothing, mask, s + t));
    }
    const float top = _mm512_reduce_max_ps(v);
    if (top == -INFINITY) {
        memset(s, 0, (size_t) n * sizeof(float));
        return 1.0f;
    }
    const float factor = top == *max ? 1.0f : expf(*max - top);
    __m512      total  = _mm512_setzero_ps();
    for (int t = 0; t < n; t += 16) {
        const __mmask16 mask = (__mmask16) (n - t >= 16 ? 0xffffu : (1u << (n - t)) - 1u);
        const __m512    e    = exp16(_mm512_sub_ps(_mm512_mask_loadu_ps(nothing, mask, s + t), _mm512_set1_ps(top)));
        _mm512_mask_storeu_ps(s + t, mask, e);
        total = _mm512_add_ps(total, e);
    }
    *max = top;
    *sum = *sum * factor + _mm512_reduce_add_ps(total);
    return factor;
}

/* n_row rows of c at a time, n_vec vectors of columns: at most 24 sums in registers. */
INLINE void gemm_rows(int n_row, int n_vec, const float * a, int a_row, int a_k, const float * b, int n_k, int n_col, int add,
                      float * c) {
    __m512 sum[12][2];
    for (int r = 0; r < n_row; ++r) {
        for (int j = 0; j < n_vec; ++j) {
            sum[r][j] = add ? _mm512_loadu_ps(c + r * n_col + 16 * j) : _mm512_setzero_ps();
        }
    }
    for (int k = 0; k < n_k; ++k, a += a_k, b += n_col) {
        __m512 bk[2];
        for (int j = 0; j < n_vec; ++j) {
            bk[j] = _mm512_loadu_ps(b + 16 * j);
        }
        for (int r = 0; r < n_row; ++r) {
            const __m512 w = _mm512_set1_ps(a[r * a_row]);
            for (int j = 0; j < n_vec; ++j) {
                sum[r][j] = _mm512_fmadd_ps(w, bk[j], sum[r][j]);
            }
        }
    }
    for (int r = 0; r < n_row; ++r) {
        for (int j = 0; j < n_vec; ++j) {
            _mm512_storeu_ps(c + r * n_col + 16 * j, sum[r][j]);
        }
    }
}

INLINE void gemm_columns(int n_vec, const float * a, int a_row, int a_k, const float * b, int n_row, int n_k, int n_col, int add,
                         float * c) {
    int r = 0;
    for (; r + 12 <= n_row; r += 12) {
        gemm_rows(12, n_vec, a + (size_t) r * (size_t) a_row, a_row, a_k, b, n_k, n_col, add, c + (size_t) r * (size_t) n_col);
    }
    for (; r + 4 <= n_row; r += 4) {
        gemm_rows(4, n_vec, a + (size_t) r * (size_t) a_row, a_row, a_k, b, n_k, n_col, add, c + (size_t) r * (size_t) n_col);
    }
    for (; r < n_row; ++r) {
        gemm_rows(1, n_vec, a + (size_t) r * (size_t) a_row, a_row, a_k, b, n_k, n_col, add, c + (size_t) r * (size_t) n_col);
    }
}

static void gemm(const float * a, int a_row, int a_k, const float * b, int n_row, int n_k, int n_col, int add, float * c) {
    int j = 0;
    for (; j + 32 <= n_col; j += 32) {
        gemm_columns(2, a, a_row, a_k, b + j, n_row, n_k, n_col, add, c + j);
    }
    if (j < n_col) {
        gemm_columns(1, a, a_row, a_k, b + j, n_row, n_k, n_col, add, c + j);
    }
}

static void softmax_columns(float * s, int n_row, int n_col, float * max, float * sum, float * factor) {
    for (int j = 0; j < n_col; j += 16) {
        const __m512 old = _mm512_loadu_ps(max + j);
        __m512       top = old;
        for (int t = 0; t < n_row; ++t) {
            top = _mm512_max_ps(_mm512_loadu_ps(s + t * n_col + j), top);
        }
        /* a column that has seen no key yet: subtract 0 instead of -infinity, so that its exponentials are 0, not NaN */
        const __mmask16 seen = _mm512_cmp_ps_mask(top, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
        const __m512    base = _mm512_maskz_mov_ps(seen, top);
        const __m512    f    = exp16(_mm512_sub_ps(old, base));
        __m512          total = _mm512_mul_ps(f, _mm512_loadu_ps(sum + j));
        for (int t = 0; t < n_row; ++t) {
            const __m512 e = exp16(_mm512_sub_ps(_mm512_loadu_ps(s + t * n_col + j), base));
            _mm512_storeu_ps(s + t * n_col + j, e);
            total = _mm512_add_ps(total, e);
        }
        _mm512_storeu_ps(max + j, top);
        _mm512_storeu_ps(sum + j, total);
        _mm512_storeu_ps(factor + j, f);
    }
}

const tqi_kernels tqi_kernels_avx512 = {
    .name              = "avx512",
    .supported         = supported,
    .encode            = encode,
    .decode            = decode,
    .unpack            = unpack,
    .widen             = widen,
    .transform         = transform,
    .inverse_transform = inverse_transform,
    .scores            = scores,
    .accumulate        = accumulate,
    .softmax_row       = softmax_row,
    .gemm              = gemm,
    .softmax_columns   = softmax_columns,
};
