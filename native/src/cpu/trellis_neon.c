/* trellis_neon.c: the trellis types in AArch64 Advanced SIMD. */
#include "transform.h"
#include "trellis.h"

#include <arm_neon.h>

#define INLINE static inline __attribute__((always_inline))

/* ---- Encode ---- */

#define LANES 8
typedef struct {
    float32x4_t v[2];
} lanes;
typedef struct {
    uint32x4_t v[2];
} words;
typedef words truth;

#define PAIR(type, f, ...) ((type) { { f(0, __VA_ARGS__), f(1, __VA_ARGS__) } })
#define LOAD4(i, x) vld1q_f32((x) + 4 * (i))
#define ADD4(i, a, b) vaddq_f32((a).v[i], (b).v[i])
#define SUB4(i, a, b) vsubq_f32((a).v[i], (b).v[i])
#define MUL4(i, a, b) vmulq_f32((a).v[i], (b).v[i])
#define MIN4(i, a, b) vminq_f32((a).v[i], (b).v[i])
#define MAX4(i, a, b) vmaxq_f32((a).v[i], (b).v[i])
#define LESS4(i, a, b) vcltq_f32((a).v[i], (b).v[i])
#define EQUAL4(i, a, b) vceqq_f32((a).v[i], (b).v[i])
#define SELECT4(i, w, yes, no) vbslq_f32((w).v[i], (yes).v[i], (no).v[i])
#define COUNT4(i, n, w) vsubq_u32((n).v[i], (w).v[i]) /* a true comparison is -1 */
#define WORDS4(i, a, b) vaddq_u32((a).v[i], (b).v[i])

#define lanes_set1(x) ((lanes) { { vdupq_n_f32(x), vdupq_n_f32(x) } })
#define lanes_load(x) PAIR(lanes, LOAD4, x)
#define lanes_add(a, b) PAIR(lanes, ADD4, a, b)
#define lanes_sub(a, b) PAIR(lanes, SUB4, a, b)
#define lanes_mul(a, b) PAIR(lanes, MUL4, a, b)
#define lanes_min(a, b) PAIR(lanes, MIN4, a, b)
#define lanes_max(a, b) PAIR(lanes, MAX4, a, b)
#define lanes_per_block(x, stride) lanes_set1(*(x)) /* one block */
#define words_zero() ((words) { { vdupq_n_u32(0), vdupq_n_u32(0) } })
#define words_add(a, b) PAIR(words, WORDS4, a, b)
#define truth_less(a, b) PAIR(truth, LESS4, a, b)
#define truth_equal(a, b) PAIR(truth, EQUAL4, a, b)
#define truth_select(which, yes, no) PAIR(lanes, SELECT4, which, yes, no)

INLINE void lanes_store(float * x, lanes a) {
    vst1q_f32(x, a.v[0]);
    vst1q_f32(x + 4, a.v[1]);
}

INLINE lanes lanes_lookup(const float * table, words index) {
    const uint8x16x2_t bytes = vld1q_u8_x2((const uint8_t *) (const void *) table);
    lanes found;
    for (int i = 0; i < 2; ++i) { /* index -> the positions of its four bytes */
        const uint32x4_t at = vmlaq_n_u32(vdupq_n_u32(0x03020100u), index.v[i], 0x04040404u);
        found.v[i] = vreinterpretq_f32_u8(vqtbl2q_u8(bytes, vreinterpretq_u8_u32(at)));
    }
    return found;
}

INLINE void words_store(int32_t * x, words a) {
    vst1q_s32(x, vreinterpretq_s32_u32(a.v[0]));
    vst1q_s32(x + 4, vreinterpretq_s32_u32(a.v[1]));
}

INLINE words words_bits(uint32_t w) {
    static const int32_t right[8] = { 0, -1, -2, -3, -4, -5, -6, -7 };
    words bits;
    for (int i = 0; i < 2; ++i) {
        bits.v[i] = vandq_u32(vshlq_u32(vdupq_n_u32(w), vld1q_s32(right + 4 * i)), vdupq_n_u32(1));
    }
    return bits;
}

INLINE words words_count(words n, lanes a, lanes b) {
    const truth less = truth_less(a, b);
    return PAIR(words, COUNT4, n, less);
}

INLINE int truth_lane(const truth * which, int j) {
    return (int) (tqi_load_u32((const uint8_t *) which + 4 * j) & 1u);
}

#include "trellis_search.h"

void tqi_trellis_search_neon(const tqi_codec * codec, const float * y, int64_t n_blocks, uint8_t * blocks) {
    const subset_tables c = load_subsets(codec);
    for (int64_t b = 0; b < n_blocks; ++b, y += TQ_BLOCK, blocks += codec->block_bytes) {
        if (codec->bits == 3) {
            encode_blocks(4, codec, &c, y, 1, blocks);
        } else {
            encode_blocks(8, codec, &c, y, 1, blocks);
        }
    }
}

/* ---- Decode ---- */

/* The levels' units for tbl, which looks up in 16 bytes or 32: entry e % 4 + 4 * subset + 16 * (e / 4). */
INLINE uint8x16x2_t load_units(const tqi_codec * codec) {
    static const uint8_t order[16] = { 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15 };
    uint8x16x2_t c = vld1q_u8_x2((const uint8_t *) codec->level_units);
    c.val[0] = vqtbl1q_u8(c.val[0], vld1q_u8(order));
    c.val[1] = vqtbl1q_u8(c.val[1], vld1q_u8(order));
    return c;
}

typedef struct {
    int32x4_t v[2]; /* byte k of word j is value 8 k + j */
} unit_words;

/* A block's levels in units. */
INLINE unit_words units32(int bits, uint8x16x2_t units, const uint8_t * block) {
    /* four bits of t, those of values i - 3 to i, determine the subset of value i; here times 4 */
    static const uint8_t subsets[16] = { 0, 8, 4, 12, 8, 0, 12, 4, 8, 0, 12, 4, 0, 8, 4, 12 };
    static const int32_t turn[8] = { 3, 2, 1, 0, -1, -2, -3, -4 }; /* left, and the rest of the word right */
    static const int32_t rest[8] = { -29, -30, -31, 32, 31, 30, 29, 28 };
    static const int64_t pairs[4] = { 0, -2, -4, -6 };
    static const int32_t top_turn[8] = { 4, 3, 2, 1, 0, -1, -2, -3 };
    static const int32_t top_rest[8] = { -28, -29, -30, -31, 32, 31, 30, 29 };
    const uint32x4_t t = vdupq_n_u32(tqi_load_u32(block + 2));
    uint64_t even_odd;
    unit_words found;
    memcpy(&even_odd, block + 6, sizeof even_odd);
    for (int i = 0; i < 2; ++i) {
        const uint32x4_t turned =
            vorrq_u32(vshlq_u32(t, vld1q_s32(turn + 4 * i)), vshlq_u32(t, vld1q_s32(rest + 4 * i)));
        const uint8x16_t four = vandq_u8(vreinterpretq_u8_u32(turned), vdupq_n_u8(15));
        const uint64x2_t low = vshlq_u64(vdupq_n_u64(even_odd), vld1q_s64(pairs + 2 * i));
        const uint8x16_t subset = vqtbl1q_u8(vld1q_u8(subsets), four);
        uint8x16_t index = vorrq_u8(subset, vandq_u8(vreinterpretq_u8_u64(low), vdupq_n_u8(3)));
        if (bits == 4) {
            const uint32x4_t top = vdupq_n_u32(tqi_load_u32(block + 14));
            const uint32x4_t by4 =
                vorrq_u32(vshlq_u32(top, vld1q_s32(top_turn + 4 * i)), vshlq_u32(top, vld1q_s32(top_rest + 4 * i)));
            index = vorrq_u8(index, vandq_u8(vreinterpretq_u8_u32(by4), vdupq_n_u8(16)));
        }
        found.v[i] = vreinterpretq_s32_u8(bits == 3 ? vqtbl1q_u8(units.val[0], index) : vqtbl2q_u8(units, index));
    }
    return found;
}

/* Values 8 k + 4 h .. 8 k + 4 h + 3 in units. */
INLINE float32x4_t values4(unit_words units, int k, int h) {
    const int32x4_t x = vshlq_s32(units.v[h], vdupq_n_s32(24 - 8 * k));
    return vcvtq_f32_s32(vshrq_n_s32(x, 24));
}

/* The scale as all decoders use it, for levels in units. */
INLINE float unit_scale(const uint8_t * block) {
    const uint16_t h = tqi_load_u16(block);
    return (h & 0x7c00u) == 0x7c00u
               ? 0.0f
               : TQI_LEVEL_UNIT * vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h))), 0);
}

INLINE void unpack_rows(int bits, const tqi_codec * codec, const uint8_t * blocks, int64_t n_blocks, float * y) {
    const uint8x16x2_t c = load_units(codec);
    for (int64_t b = 0; b < n_blocks; ++b, y += TQ_BLOCK, blocks += 4 * bits + 2) {
        const float d = unit_scale(blocks);
        const unit_words units = units32(bits, c, blocks);
        for (int j = 0; j < 8; ++j) {
            vst1q_f32(y + 4 * j, vmulq_n_f32(values4(units, j / 2, j % 2), d));
        }
    }
}

void tqi_trellis_unpack_neon(const tqi_codec * codec, const uint8_t * blocks, int64_t n_blocks, float * y) {
    if (codec->bits == 3) {
        unpack_rows(3, codec, blocks, n_blocks, y);
    } else {
        unpack_rows(4, codec, blocks, n_blocks, y);
    }
}

/* ---- Attention ---- */

INLINE void scores_rows(int bits, int n_q, const tqi_codec * codec, const uint8_t * k, size_t stride, int n_tok,
                        const float * q, int n_blocks, float * s, int ld) {
    const uint8x16x2_t c = load_units(codec);
    for (int t = 0; t < n_tok; ++t) {
        const uint8_t * in = k + (size_t) t * stride;
        float32x4_t total[TQI_MAX_FUSED];
        tqi_prefetch(in + TQI_AHEAD * stride, (size_t) (n_blocks * (4 * bits + 2)));
        for (int i = 0; i < n_q; ++i) {
            total[i] = vdupq_n_f32(0.0f);
        }
        for (int b = 0; b < n_blocks; ++b, in += 4 * bits + 2) {
            const float d = unit_scale(in);
            const unit_words units = units32(bits, c, in);
            float32x4_t v[8];
            for (int j = 0; j < 8; ++j) {
                v[j] = values4(units, j / 2, j % 2);
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

/* A block column of all tokens is decoded once; then eight values at a time keep their sums for n_q vectors in registers. */
INLINE void accumulate_rows(int bits, int n_q, const tqi_codec * codec, const uint8_t * v, size_t stride, int n_tok,
                            const float * p, int ld, int n_blocks, float * o) {
    const uint8x16x2_t c = load_units(codec);
    for (int b = 0; b < n_blocks; ++b) {
        unit_words units[TQI_AHEAD];
        float d[TQI_AHEAD];
        for (int t = 0; t < n_tok; ++t) {
            const uint8_t * in = v + (size_t) t * stride + b * (4 * bits + 2);
            tqi_prefetch(in + TQI_AHEAD * stride, (size_t) (4 * bits + 2));
            units[t] = units32(bits, c, in);
            d[t] = unit_scale(in);
        }
        for (int g = 0; g < 4; ++g) {
            float * ob = o + b * TQ_BLOCK + 8 * g;
            float32x4_t sum[TQI_MAX_FUSED][2];
            for (int i = 0; i < n_q; ++i) {
                sum[i][0] = vld1q_f32(ob + i * n_blocks * TQ_BLOCK);
                sum[i][1] = vld1q_f32(ob + i * n_blocks * TQ_BLOCK + 4);
            }
            for (int t = 0; t < n_tok; ++t) {
                const float32x4_t x0 = values4(units[t], g, 0), x1 = values4(units[t], g, 1);
                for (int i = 0; i < n_q; ++i) {
                    const float w = d[t] * p[i * ld + t];
                    sum[i][0] = vfmaq_n_f32(sum[i][0], x0, w);
                    sum[i][1] = vfmaq_n_f32(sum[i][1], x1, w);
                }
            }
            for (int i = 0; i < n_q; ++i) {
                vst1q_f32(ob + i * n_blocks * TQ_BLOCK, sum[i][0]);
                vst1q_f32(ob + i * n_blocks * TQ_BLOCK + 4, sum[i][1]);
            }
        }
    }
}

void tqi_trellis_scores_neon(const tqi_codec * codec, const uint8_t * k, size_t stride, int n_tok, const float * q,
                             int n_q, int n_blocks, float * s, int ld) {
    if (codec->bits == 3) {
        TQI_BY_N_Q(scores_rows, 3, n_q, codec, k, stride, n_tok, q, n_blocks, s, ld)
    } else {
        TQI_BY_N_Q(scores_rows, 4, n_q, codec, k, stride, n_tok, q, n_blocks, s, ld)
    }
}

void tqi_trellis_accumulate_neon(const tqi_codec * codec, const uint8_t * v, size_t stride, int n_tok, const float * p,
                                 int ld, int n_q, int n_blocks, float * o) {
    if (codec->bits == 3) {
        TQI_BY_N_Q(accumulate_rows, 3, n_q, codec, v, stride, n_tok, p, ld, n_blocks, o)
    } else {
        TQI_BY_N_Q(accumulate_rows, 4, n_q, codec, v, stride, n_tok, p, ld, n_blocks, o)
    }
}
