/* trellis_avx512.c: the trellis types in AVX-512. Two blocks are searched at once.
 *
 * The sums of attention are taken over 8-bit integers: levels are integers in units of TQI_LEVEL_UNIT, and what they are
 * multiplied by, queries and weights, is rounded to integers of 15 bits, in two parts of 8 bits. vpdpbusd makes four
 * products a lane. */
#include "blocks_avx512.h"

#include "trellis_search.h"

/* ---- Decode ---- */

/* The levels' units for vpermb, which looks up by six bits, five in half a register: entry e % 4 + 4 * subset + 16 * (e
 * / 4). */
typedef __m512i decoder;

INLINE decoder load_decoder(int bits, const tqi_codec * codec) {
    (void) bits;
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    return _mm512_shuffle_epi8(_mm512_loadu_si512(codec->level_units), order);
}

typedef __m256i codes; /* a block's levels in units: byte k of word j is value 8 k + j */

INLINE __m256i word8(const uint8_t * at) {
    return _mm256_set1_epi32((int) tqi_load_u32(at));
}

#define OR_AND(a, b, c) _mm256_ternarylogic_epi32(a, b, c, 0xf8) /* a | (b & c) */

INLINE codes open_block(int bits, const decoder * c, const uint8_t * in) {
    /* four bits of t, those of values i - 3 to i, determine the subset of value i; here times 4 */
    const __m256i subsets =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 8, 4, 12, 8, 0, 12, 4, 8, 0, 12, 4, 0, 8, 4, 12));
    const __m256i turned = _mm256_rorv_epi32(word8(in + 2), _mm256_setr_epi32(29, 30, 31, 0, 1, 2, 3, 4));
    const __m256i subset = _mm256_shuffle_epi8(subsets, _mm256_and_si256(turned, _mm256_set1_epi8(15)));
    const __m256i units = _mm512_castsi512_si256(*c);
    if (bits == 2) {
        const __m256i low = _mm256_srlv_epi32(word8(in + 6), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
        return _mm256_permutexvar_epi8(OR_AND(subset, low, _mm256_set1_epi8(1)), units);
    }
    int64_t even_odd;
    memcpy(&even_odd, in + 6, sizeof even_odd);
    const __m256i pairs = _mm256_srlv_epi64(_mm256_set1_epi64x(even_odd), _mm256_setr_epi64x(0, 2, 4, 6));
    __m256i index = OR_AND(subset, pairs, _mm256_set1_epi8(3));
    if (bits >= 4) {
        const __m256i top = _mm256_rorv_epi32(word8(in + 14), _mm256_setr_epi32(28, 29, 30, 31, 0, 1, 2, 3));
        index = OR_AND(index, top, _mm256_set1_epi8(16));
    }
    if (bits == 5) {
        const __m256i highest = _mm256_rorv_epi32(word8(in + 18), _mm256_setr_epi32(27, 28, 29, 30, 31, 0, 1, 2));
        index = OR_AND(index, highest, _mm256_set1_epi8(32));
        return _mm512_castsi512_si256(_mm512_permutexvar_epi8(_mm512_castsi256_si512(index), *c));
    }
    return _mm256_permutexvar_epi8(index, units);
}

INLINE vec values(int bits, const decoder * c, codes units, int g) {
    (void) bits, (void) c;
    const words left = g == 0 ? _mm512_setr_epi32(24, 24, 24, 24, 24, 24, 24, 24, 16, 16, 16, 16, 16, 16, 16, 16)
                              : _mm512_setr_epi32(8, 8, 8, 8, 8, 8, 8, 8, 0, 0, 0, 0, 0, 0, 0, 0);
    const words twice = _mm512_broadcast_i64x4(units);
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_sllv_epi32(twice, left), 24));
}

#define LEVEL_UNIT TQI_LEVEL_UNIT
#include "unpack.h"

/* ---- Decode 16 blocks ---- */

/* The levels' units, by level, for vpermb, which looks up by six bits: those above the level's own do not matter. */
INLINE __m512i load_units(int bits, const tqi_codec * codec) {
    const __m512i units = _mm512_loadu_si512(codec->level_units);
    return bits == 2   ? _mm512_permutexvar_epi8(_mm512_set1_epi64(0x0706050403020100), units)
           : bits == 3 ? _mm512_broadcast_i32x4(_mm512_castsi512_si128(units))
           : bits == 4 ? _mm512_broadcast_i64x4(_mm512_castsi512_si256(units))
                       : units;
}

#define SELECT(mask, yes, no) _mm512_ternarylogic_epi32(mask, yes, no, 0xca) /* by bits */

/* The levels of 16 blocks: nibble[j % 4] has in byte k the lower four bits of value 8 k + j, in its lower half if j < 4.
 */
typedef struct {
    __m512i nibble[4];
    __m512i top, highest; /* pqt4 and pqt5: bit j of byte k is bit 4 (5) of value 8 k + j */
} levels16;

INLINE levels16 find_levels(int bits, const blocks16 * x) {
    const __m512i even_bits = _mm512_set1_epi32(0x55555555), even_pairs = _mm512_set1_epi32(0x33333333);
    const __m512i t = x->words[0], t1 = _mm512_rol_epi32(t, 1), low = _mm512_rol_epi32(t, 2);
    const __m512i high = _mm512_ternarylogic_epi32(t, t1, _mm512_rol_epi32(t, 3), 0x96);
    /* the subsets of even values at their bits i and i + 1, those of odd values at i - 1 and i: as e is stored */
    const __m512i even = SELECT(even_bits, low, _mm512_rol_epi32(high, 1));
    const __m512i odd = SELECT(even_bits, t1, high);
    levels16 y;
    __m512i e[4];
    if (bits == 2) {
        for (int j = 0; j < 4; ++j) {
            e[j] = j == 2 ? x->words[1] : _mm512_rol_epi32(x->words[1], (2 - j) & 31);
        }
    } else {
        e[0] = _mm512_rol_epi32(x->words[1], 2);
        e[1] = _mm512_rol_epi32(x->words[2], 2);
        e[2] = x->words[1];
        e[3] = x->words[2];
    }
    y.nibble[0] = SELECT(even_pairs, even, e[0]);
    y.nibble[1] = SELECT(even_pairs, odd, e[1]);
    y.nibble[2] = SELECT(even_pairs, _mm512_ror_epi32(even, 2), e[2]);
    y.nibble[3] = SELECT(even_pairs, _mm512_ror_epi32(odd, 2), e[3]);
    y.top = bits >= 4 ? x->words[3] : t;
    y.highest = bits == 5 ? x->words[4] : t;
    return y;
}

/* Levels j of all bytes' values, for vpermb. */
INLINE __m512i level_index(int bits, __m512i nibble, __m512i top, __m512i highest, int j) {
    __m512i index = j < 4 ? nibble : _mm512_srli_epi32(nibble, 4);
    if (bits >= 4) {
        index = SELECT(_mm512_set1_epi8(0x0f), index, _mm512_rol_epi32(top, (4 - j) & 31));
    }
    if (bits == 5) {
        index = SELECT(_mm512_set1_epi8(0x1f), index, _mm512_rol_epi32(highest, (5 - j) & 31));
    }
    return index;
}

/* ---- Attention ---- */

/* vpdpbusd takes its first factor for unsigned: levels have OFFSET added, which is taken from the sums. The second
 * factor is a number of 16 bits as 256 high + low: low is its lower byte, taken for signed, and high the upper byte of
 * the number plus 128. */
#define OFFSET 128
#define LARGEST (127 * 256)
_Static_assert((int64_t) TQ_BLOCK * 255 * LARGEST <= INT32_MAX, "a sum over a block must not overflow");
_Static_assert((int64_t) TQI_AHEAD * 255 * LARGEST <= INT32_MAX, "a sum over a tile must not overflow");

INLINE __m512i load_offset_units(int bits, const tqi_codec * codec) {
    return _mm512_xor_si512(load_units(bits, codec), _mm512_set1_epi8((char) OFFSET));
}

INLINE __m512i above_low(__m512i x) {
    return _mm512_add_epi32(x, _mm512_set1_epi32(128));
}

INLINE __m512i join(__m512i high, __m512i low) {
    return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
}

/* A part of a query vector, up to four blocks: lane b is block b's (wide 2: lane 2 + b, too), byte k of its dwords in
 * high[j] and low[j] the integer of value 8 k + j. */
typedef struct {
    __m512i high[8], low[8];
    __m512i minus; /* OFFSET times the sum of the integers, taken from 0 */
    __m512 unit;   /* what the integer 1 times a level's unit stands for; NaN if a value is not finite */
} query4;
_Static_assert(sizeof(query4) == sizeof(float) * TQI_QUERY_FLOATS(4), "a query of four blocks has its room");

/* Both parts of a block's integers: dword j is byte 0 .. 3 of values j, 8 + j, 16 + j, 24 + j. */
INLINE void split_query(const block * x, float inverse, __m256i * high, __m256i * low) {
    const __m256i order = _mm256_setr_epi8(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27, 4, 12, 20, 28, 5,
                                           13, 21, 29, 6, 14, 22, 30, 7, 15, 23, 31);
    __m128i h[2], l[2];
    for (int i = 0; i < 2; ++i) {
        const __m512i integer = _mm512_cvtps_epi32(_mm512_mul_ps(x->v[i], _mm512_set1_ps(inverse)));
        h[i] = _mm512_cvtepi32_epi8(_mm512_srai_epi32(above_low(integer), 8));
        l[i] = _mm512_cvtepi32_epi8(integer);
    }
    *high = _mm256_permutexvar_epi8(order, _mm256_set_m128i(h[1], h[0]));
    *low = _mm256_permutexvar_epi8(order, _mm256_set_m128i(l[1], l[0]));
}

static void load_query(const tqi_codec * codec, const float * q, int n_blocks, float * query) {
    (void) codec;
    const int wide = WIDE(n_blocks);
    const __m512i ones = _mm512_set1_epi8((char) OFFSET);
    for (int b0 = 0; b0 < n_blocks; b0 += wide, query += TQI_QUERY_FLOATS(4)) {
        __m256i high[4], low[4];
        float unit[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
        query4 y;
        for (int b = 0; b < 4; ++b) {
            high[b] = low[b] = _mm256_setzero_si256();
        }
        for (int b = 0; b < wide && b0 + b < n_blocks; ++b) {
            const block x = load_block(q + (b0 + b) * TQ_BLOCK);
            const float largest = _mm512_reduce_max_ps(_mm512_max_ps(v_abs(x.v[0]), v_abs(x.v[1])));
            const int bad = _mm512_fpclass_ps_mask(x.v[0], 0x99) | _mm512_fpclass_ps_mask(x.v[1], 0x99);
            unit[b] = bad ? NAN : largest < TINY ? 0.0f : TQI_LEVEL_UNIT * largest / (float) LARGEST;
            split_query(&x, bad || largest < TINY ? 0.0f : (float) LARGEST / largest, &high[b], &low[b]);
        }
        __m512i sum_h = _mm512_setzero_si512(), sum_l = sum_h;
        for (int j = 0; j < 8; ++j) {
            y.high[j] = spread_dwords(wide, high, j);
            y.low[j] = spread_dwords(wide, low, j);
            sum_h = _mm512_dpbusd_epi32(sum_h, ones, y.high[j]);
            sum_l = _mm512_dpbusd_epi32(sum_l, ones, y.low[j]);
        }
        y.minus = _mm512_sub_epi32(_mm512_setzero_si512(), join(sum_h, sum_l));
        y.unit = spread_floats(wide, unit);
        memcpy(query, &y, sizeof y);
    }
}

INLINE void scores_wide(int bits, int n_q, int wide, const tqi_codec * codec, const uint8_t * k, size_t stride,
                        int n_tok, const float * query, int n_blocks, float * s, int ld) {
    const __m512i units = load_offset_units(bits, codec);
    const size_t n_floats = TQI_QUERY_FLOATS(n_blocks);
    for (int t = 0; t < n_tok; t += 16) {
        __m512 total[TQI_MAX_FUSED][4];
        for (int j = t; j < n_tok && j < t + 16; ++j) {
            tqi_prefetch(k + (size_t) (TQI_AHEAD + j) * stride, (size_t) n_blocks * TQI_BLOCK_BYTES(bits));
        }
        for (int c = 0; c < wide; ++c) {
            const int t1 = t + c * N_TOKENS(wide);
            const uint8_t * at = k + (size_t) (t1 < n_tok ? t1 : n_tok - 1) * stride;
            __m512 part[TQI_MAX_FUSED];
            for (int i = 0; i < n_q; ++i) {
                part[i] = _mm512_setzero_ps();
            }
            for (int b = 0; b < n_blocks; b += wide) {
                const query4 * q4 = (const query4 *) (const void *) (query + (size_t) (b / wide) * TQI_QUERY_FLOATS(4));
                const int n = n_blocks - b < wide ? n_blocks - b : wide;
                const blocks16 x =
                    load_blocks(1, bits, wide, at + (size_t) b * TQI_BLOCK_BYTES(bits), stride, n_tok - t1, n);
                const levels16 y = find_levels(bits, &x);
                __m512i high[TQI_MAX_FUSED], low[TQI_MAX_FUSED];
                for (int i = 0; i < n_q; ++i) {
                    high[i] = _mm512_setzero_si512();
                    low[i] = _mm512_loadu_si512((const float *) &q4->minus + (size_t) i * n_floats);
                }
                UNROLL
                for (int j = 0; j < 8; ++j) {
                    const __m512i index = level_index(bits, y.nibble[j % 4], y.top, y.highest, j);
                    const __m512i levels = _mm512_permutexvar_epi8(index, units);
                    for (int i = 0; i < n_q; ++i) {
                        high[i] = _mm512_dpbusd_epi32(
                            high[i], levels, _mm512_loadu_si512((const float *) &q4->high[j] + (size_t) i * n_floats));
                        low[i] = _mm512_dpbusd_epi32(
                            low[i], levels, _mm512_loadu_si512((const float *) &q4->low[j] + (size_t) i * n_floats));
                    }
                }
                for (int i = 0; i < n_q; ++i) {
                    const __m512 unit = _mm512_loadu_ps((const float *) &q4->unit + (size_t) i * n_floats);
                    part[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(join(high[i], low[i])), _mm512_mul_ps(x.scale, unit),
                                              part[i]);
                }
            }
            for (int i = 0; i < n_q; ++i) {
                total[i][c] = part[i];
            }
        }
        const __mmask16 stored = (__mmask16) (n_tok - t < 16 ? (1u << (n_tok - t)) - 1u : 0xffffu);
        for (int i = 0; i < n_q; ++i) {
            _mm512_mask_storeu_ps(s + i * ld + t, stored, sum_blocks(wide, total[i]));
        }
    }
}

INLINE void scores_rows(int bits, int n_q, const tqi_codec * codec, const uint8_t * k, size_t stride, int n_tok,
                        const float * query, int n_blocks, float * s, int ld) {
    if (WIDE(n_blocks) == 2) {
        scores_wide(bits, n_q, 2, codec, k, stride, n_tok, query, n_blocks, s, ld);
    } else {
        scores_wide(bits, n_q, 4, codec, k, stride, n_tok, query, n_blocks, s, ld);
    }
}

#define MAX_VECTORS (TQI_AHEAD / 4) /* of a tile's tokens */

/* What accumulate keeps of a tile while it goes through its blocks by fours: byte k of dword m is token k of the four
 * tokens of the lane. */
typedef struct {
    __m512i nibble[MAX_VECTORS][4], top[MAX_VECTORS], highest[MAX_VECTORS];
    __m512 weights[MAX_VECTORS * TQI_MAX_FUSED];   /* (n_vec, n_q) */
    __m512i parts[MAX_VECTORS * TQI_MAX_FUSED][2]; /* the weights as integers: low, high */
    __m512i minus[TQI_MAX_FUSED];                  /* as in query4, of the lane */
    __m512 unit[TQI_MAX_FUSED];
} tile4;

/* Decodes n <= wide blocks of a tile, and multiplies their scales by the weights p; what lies beyond the tile weighs
 * nothing. */
INLINE void open_tile(int bits, int n_q, int wide, const uint8_t * v, size_t stride, int n_tok, const float * p, int ld,
                      int n, tile4 * x) {
    /* byte k of dword m: byte m of dword k */
    const __m512i turned = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m512i tokens = wide == 4 ? _mm512_broadcast_i32x4(_mm_setr_epi32(0, 1, 2, 3))
                                     : _mm512_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7);
    for (int c = 0; c * N_TOKENS(wide) < n_tok; ++c) {
        const int t = c * N_TOKENS(wide), n_here = n_tok - t < N_TOKENS(wide) ? n_tok - t : N_TOKENS(wide);
        const blocks16 b = load_blocks(1, bits, wide, v + (size_t) t * stride, stride, n_here, n);
        const levels16 y = find_levels(bits, &b);
        for (int j = 0; j < 4; ++j) {
            x->nibble[c][j] = _mm512_shuffle_epi8(y.nibble[j], turned);
        }
        if (bits >= 4) {
            x->top[c] = _mm512_shuffle_epi8(y.top, turned);
        }
        if (bits == 5) {
            x->highest[c] = _mm512_shuffle_epi8(y.highest, turned);
        }
        for (int i = 0; i < n_q; ++i) {
            const __m512 w = _mm512_maskz_loadu_ps((__mmask16) ((1u << n_here) - 1u), p + i * ld + t);
            x->weights[c * n_q + i] = _mm512_mul_ps(b.scale, _mm512_permutexvar_ps(tokens, w));
        }
    }
}

INLINE __m512i lane_max(__m512i x) {
    x = _mm512_max_epu32(x, _mm512_shuffle_epi32(x, _MM_PERM_CDAB));
    return _mm512_max_epu32(x, _mm512_shuffle_epi32(x, _MM_PERM_BADC));
}

INLINE __m512i lane_sum(__m512i x) {
    x = _mm512_add_epi32(x, _mm512_shuffle_epi32(x, _MM_PERM_CDAB));
    return _mm512_add_epi32(x, _mm512_shuffle_epi32(x, _MM_PERM_BADC));
}

/* The weights of query vector i as integers. Magnitudes are compared as integers, among which those that are not finite
 * are the largest. */
INLINE void split_weights(int n_q, int i, int n_vec, tile4 * x) {
    const __m512i low_bytes = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12));
    const __m512i high_bytes = _mm512_add_epi8(low_bytes, _mm512_set1_epi8(1));
    __m512i top = _mm512_setzero_si512(), sum = top;
    for (int c = 0; c < n_vec; ++c) {
        top = _mm512_max_epu32(top, _mm512_castps_si512(_mm512_abs_ps(x->weights[c * n_q + i])));
    }
    const __m512 largest = _mm512_castsi512_ps(lane_max(top));
    const __mmask16 some = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(TINY), _CMP_GE_OQ);
    const __m512 inverse = _mm512_maskz_div_ps(some, _mm512_set1_ps((float) LARGEST), largest);
    for (int c = 0; c < n_vec; ++c) {
        const __m512i integer = _mm512_cvtps_epi32(_mm512_mul_ps(x->weights[c * n_q + i], inverse));
        sum = _mm512_add_epi32(sum, integer);
        x->parts[c * n_q + i][0] = _mm512_shuffle_epi8(integer, low_bytes);
        x->parts[c * n_q + i][1] = _mm512_shuffle_epi8(above_low(integer), high_bytes);
    }
    x->minus[i] = _mm512_mullo_epi32(lane_sum(sum), _mm512_set1_epi32(-OFFSET));
    x->unit[i] = _mm512_fpclass_ps_mask(largest, 0x99)
                     ? _mm512_set1_ps(NAN)
                     : _mm512_maskz_mul_ps(some, largest, _mm512_set1_ps(TQI_LEVEL_UNIT / (float) LARGEST));
}

/* Adds sums to n blocks of o: dword m of lane b of y[j] belongs to value 8 m + j of block b. */
INLINE void add_blocks(int wide, const __m512 * y, int n, float * o) {
    __m512 row[4][2];
    for (int h = 0; h < 2; ++h) {
        const __m512 * x = y + 4 * h;
        const __m512 lo01 = _mm512_unpacklo_ps(x[0], x[1]), lo23 = _mm512_unpacklo_ps(x[2], x[3]);
        const __m512 hi01 = _mm512_unpackhi_ps(x[0], x[1]), hi23 = _mm512_unpackhi_ps(x[2], x[3]);
        row[0][h] = _mm512_shuffle_ps(lo01, lo23, 0x44);
        row[1][h] = _mm512_shuffle_ps(lo01, lo23, 0xee);
        row[2][h] = _mm512_shuffle_ps(hi01, hi23, 0x44);
        row[3][h] = _mm512_shuffle_ps(hi01, hi23, 0xee);
    }
    add_rows(wide, row, n, o);
}

/* Query vectors i0 .. i0 + n_q - 1, at most four: as many sums as there are registers for. */
INLINE void accumulate_tile(int bits, int n_all, int n_q, int wide, __m512i units, const tile4 * x, int i0, int n_vec,
                            int n, int n_blocks, float * o) {
    __m512 sum[4][8];
    UNROLL
    for (int r = 0; r < 4; ++r) {
        __m512i high[4][2], low[4][2];
        for (int i = 0; i < n_q; ++i) {
            high[i][0] = high[i][1] = _mm512_setzero_si512();
            low[i][0] = low[i][1] = x->minus[i0 + i];
        }
        for (int c = 0; c < n_vec; ++c) {
            const __m512i(*parts)[2] = x->parts + c * n_all + i0;
            UNROLL
            for (int h = 0; h < 2; ++h) {
                const __m512i index = level_index(bits, x->nibble[c][r], x->top[c], x->highest[c], r + 4 * h);
                const __m512i levels = _mm512_permutexvar_epi8(index, units);
                for (int i = 0; i < n_q; ++i) {
                    high[i][h] = _mm512_dpbusd_epi32(high[i][h], levels, parts[i][1]);
                    low[i][h] = _mm512_dpbusd_epi32(low[i][h], levels, parts[i][0]);
                }
            }
        }
        for (int i = 0; i < n_q; ++i) {
            for (int h = 0; h < 2; ++h) {
                sum[i][r + 4 * h] = _mm512_cvtepi32_ps(join(high[i][h], low[i][h]));
            }
        }
    }
    for (int i = 0; i < n_q; ++i) {
        for (int j = 0; j < 8; ++j) {
            sum[i][j] = _mm512_mul_ps(sum[i][j], x->unit[i0 + i]);
        }
        add_blocks(wide, sum[i], n, o + (i0 + i) * n_blocks * TQ_BLOCK);
    }
}

INLINE void accumulate_wide(int bits, int n_q, int wide, const tqi_codec * codec, const uint8_t * v, size_t stride,
                            int n_tok, const float * p, int ld, int n_blocks, float * o) {
    const __m512i units = load_offset_units(bits, codec);
    const int n_vec = (n_tok + N_TOKENS(wide) - 1) / N_TOKENS(wide);
    tile4 x;
    for (int t = 0; t < n_tok; ++t) {
        tqi_prefetch(v + (size_t) (TQI_AHEAD + t) * stride, (size_t) n_blocks * TQI_BLOCK_BYTES(bits));
    }
    for (int b = 0; b < n_blocks; b += wide) {
        const int n = n_blocks - b < wide ? n_blocks - b : wide;
        open_tile(bits, n_q, wide, v + (size_t) b * TQI_BLOCK_BYTES(bits), stride, n_tok, p, ld, n, &x);
        for (int i = 0; i < n_q; ++i) {
            split_weights(n_q, i, n_vec, &x);
        }
        accumulate_tile(bits, n_q, n_q < 4 ? n_q : 4, wide, units, &x, 0, n_vec, n, n_blocks, o + b * TQ_BLOCK);
        if (n_q > 4) {
            accumulate_tile(bits, n_q, n_q - 4, wide, units, &x, 4, n_vec, n, n_blocks, o + b * TQ_BLOCK);
        }
    }
}

INLINE void accumulate_rows(int bits, int n_q, const tqi_codec * codec, const uint8_t * v, size_t stride, int n_tok,
                            const float * p, int ld, int n_blocks, float * o) {
    if (WIDE(n_blocks) == 2) {
        accumulate_wide(bits, n_q, 2, codec, v, stride, n_tok, p, ld, n_blocks, o);
    } else {
        accumulate_wide(bits, n_q, 4, codec, v, stride, n_tok, p, ld, n_blocks, o);
    }
}

#define BY_BITS TQI_BY_TRELLIS_BITS
#include "steps.h"

const tqi_steps tqi_trellis_avx512 = { encode, unpack, load_query, scores, accumulate };
