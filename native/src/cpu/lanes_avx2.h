/* lanes_avx2.h: the vocabulary of lanes.h and trellis_lanes.h in AVX2.
 *
 * vpmaddwd makes two products a dword, of 16-bit integers: the levels in even bytes, then those in odd bytes. They have
 * OFFSET added, so that neither needs its sign extended. */
#ifndef TQI_LANES_AVX2_H
#define TQI_LANES_AVX2_H

#include "vector_avx2.h"

#include <math.h>

#define N_LANES 2
#define MOST 4
#define OFFSET_BITS 7
#define LARGEST (127 * 256)
#define WIDE(n_blocks) ((void) (n_blocks), 2)

#define w_load(p) _mm256_loadu_si256((const __m256i *) (const void *) (p))
#define w_set1(x) _mm256_set1_epi32(x)
#define w_lane(p) _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) (const void *) (p)))
#define w_sub(a, b) _mm256_sub_epi32(a, b)
#define w_max(a, b) _mm256_max_epu32(a, b)
#define w_shl(a, n) _mm256_slli_epi32(a, n)
#define w_shr(a, n) _mm256_srli_epi32(a, n)
#define w_rol(a, n) _mm256_or_si256(_mm256_slli_epi32(a, n), _mm256_srli_epi32(a, 32 - (n)))
#define w_xor3(a, b, c) _mm256_xor_si256(_mm256_xor_si256(a, b), c)
#define w_select(mask, yes, no) _mm256_or_si256(_mm256_and_si256(mask, yes), _mm256_andnot_si256(mask, no))
#define w_shuffle(a, at) _mm256_shuffle_epi8(a, at)
#define w_swap1(a) _mm256_shuffle_epi32(a, 0xb1)
#define w_swap2(a) _mm256_shuffle_epi32(a, 0x4e)
#define w_low32(a, b) _mm256_unpacklo_epi32(a, b)
#define w_high32(a, b) _mm256_unpackhi_epi32(a, b)
#define w_low64(a, b) _mm256_unpacklo_epi64(a, b)
#define w_high64(a, b) _mm256_unpackhi_epi64(a, b)
#define w_round(v) _mm256_cvtps_epi32(v)
#define v_from(w) _mm256_cvtepi32_ps(w)
#define w_cast(v) _mm256_castps_si256(v)
#define v_cast(w) _mm256_castsi256_ps(w)

#include "lanes.h"

INLINE void v_store_first(float * to, int n, vec a) {
    float x[LANES];
    if (n >= LANES) {
        v_store(to, a);
        return;
    }
    v_store(x, a);
    memcpy(to, x, (size_t) n * sizeof *x);
}

/* The first n of four tokens' floats in the dwords of each lane. */
INLINE vec spread_tokens(int wide, const float * x, int n) {
    (void) wide;
    float y[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
    if (n >= 4) {
        return _mm256_broadcast_ps((const __m128 *) (const void *) x);
    }
    memcpy(y, x, (size_t) n * sizeof *y);
    return _mm256_broadcast_ps((const __m128 *) (const void *) y);
}

/* ---- Blocks ---- */

/* A 128-bit lane is a block of a row, and its four dwords are four tokens: what a block has as word w lies in words[w].
 */
typedef struct {
    words words[TQI_MAX_WORDS];
    vec scale; /* those that are not finite count as 0, as they do everywhere */
} token_blocks;

INLINE words two_lanes(const uint8_t * first, const uint8_t * second) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *) (const void *) first)),
                                   _mm_loadu_si128((const __m128i *) (const void *) second), 1);
}

/* Eight bytes, and the eight before an address, in both lanes. */
INLINE words two_ends(const uint8_t * first, const uint8_t * end) {
    const __m128i low = _mm_loadl_epi64((const __m128i *) (const void *) first);
    const __m128i high = _mm_loadl_epi64((const __m128i *) (const void *) (end - 8));
    return _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(low, high));
}

/* Two blocks of at most 14 bytes, as their words and then the scale. The second one's 16 bytes are those before its end,
 * and a block alone is loaded from both ends: nothing beyond the row is touched. */
INLINE words load_short(int bits, const uint8_t * row, int n) {
    const int size = (int) TQI_BLOCK_BYTES(bits);
    if (n == 1) {
        const words bytes = bits == 2 ? _mm256_setr_epi8(2, 3, 4, 5, 6, 7, 14, 15, 0, 1, -1, -1, -1, -1, -1, -1, -1, -1,
                                                         -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1)
                                      : _mm256_setr_epi8(2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15, 0, 1, -1, -1, -1, -1,
                                                         -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
        return w_shuffle(two_ends(row, row + size), bytes);
    }
    const words bytes = bits == 2 ? _mm256_setr_epi8(2, 3, 4, 5, 6, 7, 8, 9, 0, 1, -1, -1, -1, -1, -1, -1, 8, 9, 10, 11,
                                                     12, 13, 14, 15, 6, 7, -1, -1, -1, -1, -1, -1)
                                  : _mm256_setr_epi8(2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 0, 1, -1, -1, 4, 5, 6, 7,
                                                     8, 9, 10, 11, 12, 13, 14, 15, 2, 3, -1, -1);
    return w_shuffle(two_lanes(row, row + 2 * size - 16), bytes);
}

/* The first dword of four tokens' lanes, or the last one. */
INLINE words first_dwords(const words * x) {
    return w_low64(w_low32(x[0], x[1]), w_low32(x[2], x[3]));
}

INLINE words last_dwords(const words * x) {
    return w_high64(w_high32(x[0], x[1]), w_high32(x[2], x[3]));
}

/* The first n blocks from `at` on, 1 or 2, of four tokens, or of n_tok and the last one again. */
INLINE token_blocks load_blocks(int bits, int wide, const uint8_t * at, size_t stride, int n_tok, int n) {
    (void) wide;
    const uint8_t * rows[4] = { at, at, at, at };
    token_blocks y;
    words x[4], begin[4], end[4];
    for (int j = 1; j < 4; ++j) {
        rows[j] = rows[j - 1] + (j < n_tok ? stride : 0);
    }
    const size_t next = n > 1 ? TQI_BLOCK_BYTES(bits) : 0;
    for (int j = 0; j < 4; ++j) {
        x[j] = bits < 4 ? load_short(bits, rows[j], n) : two_lanes(rows[j] + 2, rows[j] + 2 + next);
        begin[j] = bits < 4 ? x[j] : two_lanes(rows[j], rows[j] + next);
        end[j] = bits < 5 ? x[j] : two_lanes(rows[j] + 6, rows[j] + 6 + next);
    }
    transpose(x, y.words);
    if (bits == 5) {
        y.words[4] = last_dwords(end);
    }
    const words d = bits < 4 ? y.words[bits] : _mm256_and_si256(first_dwords(begin), w_set1(0xffff));
    const words pairs = _mm256_permute4x64_epi64(_mm256_packus_epi32(d, d), 0x08);
    const vec scale = _mm256_cvtph_ps(_mm256_castsi256_si128(pairs));
    y.scale = v_keep(v_less(v_abs(scale), v_set1(INFINITY)), scale);
    if (n == 1) {
        y.scale = _mm256_zextps128_ps256(_mm256_castps256_ps128(y.scale));
    }
    return y;
}

/* Sums over the blocks of a vector, for LANES tokens in order. */
INLINE vec sum_blocks(int wide, const vec * x) {
    (void) wide;
    return v_add(_mm256_permute2f128_ps(x[0], x[1], 0x20), _mm256_permute2f128_ps(x[0], x[1], 0x31));
}

/* Adds sums to n blocks of o: lane b of rows[m][h] is values 8 m + 4 h to 8 m + 4 h + 3 of block b. */
INLINE void add_rows(int wide, vec (*rows)[2], int n, float * o) {
    (void) wide;
    for (int m = 0; m < 4; ++m) {
        v_store(o + 8 * m, v_add(v_load(o + 8 * m), _mm256_permute2f128_ps(rows[m][0], rows[m][1], 0x20)));
        if (n > 1) {
            float * to = o + TQ_BLOCK + 8 * m;
            v_store(to, v_add(v_load(to), _mm256_permute2f128_ps(rows[m][0], rows[m][1], 0x31)));
        }
    }
}

/* ---- Levels and products ---- */

/* Tables of 16 levels in units for vpshufb, OFFSET added. */
typedef struct {
    words units[4];
} level_table;

INLINE int64_t first_eight(const tqi_codec * codec) {
    int64_t units;
    memcpy(&units, codec->level_units, sizeof units);
    return units;
}

INLINE level_table load_level_table(int bits, const tqi_codec * codec) {
    level_table c;
    for (int i = 0; i < (bits < 4 ? 1 : 1 << (bits - 3)); ++i) {
        const words units = bits == 2 ? _mm256_set1_epi64x(first_eight(codec)) : w_lane(codec->level_units + 16 * i);
        c.units[i] = _mm256_xor_si256(units, _mm256_set1_epi8((char) (1 << OFFSET_BITS)));
    }
    return c;
}

/* By bit j of the bytes of which: yes where it is set. */
INLINE words blend(words which, int j, words yes, words no) {
    return _mm256_blendv_epi8(no, yes, w_shl(which, 7 - j));
}

INLINE words units_of(int bits, const level_table * c, words nibble, words top, words highest, int j) {
    const words index = _mm256_and_si256(j < 4 ? nibble : w_shr(nibble, 4), _mm256_set1_epi8(0x0f));
    const words first = w_shuffle(c->units[0], index);
    if (bits < 4) {
        return first;
    }
    const words lower = blend(top, j, w_shuffle(c->units[1], index), first);
    if (bits == 4) {
        return lower;
    }
    const words upper = blend(top, j, w_shuffle(c->units[3], index), w_shuffle(c->units[2], index));
    return blend(highest, j, upper, lower);
}

typedef words sums;

INLINE sums sums_of(words a) {
    return a;
}

INLINE void add_products(sums * s, words units, const words * parts) {
    const words even = _mm256_and_si256(units, _mm256_set1_epi16(0xff)), odd = _mm256_srli_epi16(units, 8);
    *s = w_add(w_add(*s, _mm256_madd_epi16(even, parts[0])), _mm256_madd_epi16(odd, parts[1]));
}

INLINE words join(sums s) {
    return s;
}

INLINE void split(words integers, words * parts) {
    static const uint8_t even[16] = { 0, 1, 8, 9, 0, 1, 8, 9, 0, 1, 8, 9, 0, 1, 8, 9 };
    static const uint8_t odd[16] = { 4, 5, 12, 13, 4, 5, 12, 13, 4, 5, 12, 13, 4, 5, 12, 13 };
    parts[0] = w_shuffle(integers, w_lane(even));
    parts[1] = w_shuffle(integers, w_lane(odd));
}

#endif
