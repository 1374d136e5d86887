/* blocks_avx512.h: 16 blocks in vectors, for the attention steps in integers of avx512.c and trellis_avx512.c.
 *
 * A 128-bit lane is a block of a row, and its four dwords are four tokens: what a block has as dword w lies in
 * words[w]. So a step decodes 16 blocks alike, and a token's sum over a block needs no sum over lanes. Of a row with
 * two blocks or one, a vector holds four more tokens instead of two more blocks:
 *
 *   wide 4   lane b: block b, tokens 0 .. 3
 *   wide 2   lane b: block b, tokens 0 .. 3; lane 2 + b: block b, tokens 4 .. 7 */
#ifndef TQI_BLOCKS_AVX512_H
#define TQI_BLOCKS_AVX512_H

#define WIDE(n_blocks) ((n_blocks) > 2 ? 4 : 2)

typedef struct {
    __m512i words[TQI_MAX_WORDS];
    __m512 scale; /* f32; those that are not finite count as 0, as they do everywhere */
} blocks16;

/* Up to 64 bytes of a row are loaded at once. If its four blocks have more, the last ones come from a second load, which
 * begins SECOND bytes later. */
#define SECOND(bits) ((bits) == 5 ? 24 : (bits) == 4 ? 8 : 0)

/* Bytes of a block that begins at byte `at`, as four dwords of a lane: its words, or three bytes each for pqo3, and the
 * scale where there is room for it. */
#define SCALE(at) at, at + 1
#define FOUR(at) at, at + 1, at + 2, at + 3
#define PQO3_BYTES(at)                                                                                                 \
    at + 2, at + 3, at + 4, at, at + 5, at + 6, at + 7, at + 1, at + 8, at + 9, at + 10, at, at + 11, at + 12,         \
        at + 13, at
#define TWO_WORDS(at) FOUR(at + 2), FOUR(at + 6), SCALE(at), 0, 0, 0, 0, 0, 0
#define THREE_WORDS(at) FOUR(at + 2), FOUR(at + 6), FOUR(at + 10), SCALE(at), 0, 0
#define FOUR_WORDS(at) FOUR(at + 2), FOUR(at + 6), FOUR(at + 10), FOUR(at + 14)
#define FIFTH_WORD(at) FOUR(at + 18), SCALE(at), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0

/* Where vpermb finds the lanes' bytes. from: the first lane of the second load, or of the second row. */
typedef struct {
    uint8_t at[64];
    int from;
} lanes_at;

typedef enum { PQO3, TWO, THREE, FOUR_BY_18, FOUR_BY_22, FIFTH } block_part;

/* By part, and wide 4 or 2. */
static const lanes_at lanes[6][2] = {
    { { { PQO3_BYTES(0), PQO3_BYTES(14), PQO3_BYTES(28), PQO3_BYTES(42) }, 4 },
      { { PQO3_BYTES(0), PQO3_BYTES(14), PQO3_BYTES(0), PQO3_BYTES(14) }, 2 } },
    { { { TWO_WORDS(0), TWO_WORDS(10), TWO_WORDS(20), TWO_WORDS(30) }, 4 },
      { { TWO_WORDS(0), TWO_WORDS(10), TWO_WORDS(0), TWO_WORDS(10) }, 2 } },
    { { { THREE_WORDS(0), THREE_WORDS(14), THREE_WORDS(28), THREE_WORDS(42) }, 4 },
      { { THREE_WORDS(0), THREE_WORDS(14), THREE_WORDS(0), THREE_WORDS(14) }, 2 } },
    { { { FOUR_WORDS(0), FOUR_WORDS(18), FOUR_WORDS(36), FOUR_WORDS(54 - SECOND(4)) }, 3 },
      { { FOUR_WORDS(0), FOUR_WORDS(18), FOUR_WORDS(0), FOUR_WORDS(18) }, 2 } },
    { { { FOUR_WORDS(0), FOUR_WORDS(22), FOUR_WORDS(44), FOUR_WORDS(66 - SECOND(5)) }, 3 },
      { { FOUR_WORDS(0), FOUR_WORDS(22), FOUR_WORDS(0), FOUR_WORDS(22) }, 2 } },
    { { { FIFTH_WORD(0), FIFTH_WORD(22), FIFTH_WORD(44 - SECOND(5)), FIFTH_WORD(66 - SECOND(5)) }, 2 },
      { { FIFTH_WORD(0), FIFTH_WORD(22), FIFTH_WORD(0), FIFTH_WORD(22) }, 2 } },
};

INLINE __m512i load_bytes(const uint8_t * at, int n) {
    return _mm512_maskz_loadu_epi8(n >= 64 ? ~0ull : n <= 0 ? 0 : (1ull << n) - 1, at);
}

/* A part of a row's blocks, from its two loads, or of two rows' blocks. */
INLINE __m512i part_of(block_part part, int wide, __m512i first, __m512i second) {
    const lanes_at * to = &lanes[part][wide == 2];
    const __m512i at = _mm512_loadu_si512(to->at), x = _mm512_permutexvar_epi8(at, first);
    return to->from == 4 ? x : _mm512_mask_permutexvar_epi8(x, ~0ull << 16 * to->from, at, second);
}

/* 16 scales of f16 bits. */
INLINE __m512 widen_scales(__m256i d) {
    const __m512 x = _mm512_cvtph_ps(d);
    return _mm512_maskz_mov_ps(_mm512_knot(_mm512_fpclass_ps_mask(x, 0x99)), x);
}

/* Puts the scales of blocks that are 18 bytes apart where token j's are, into 16 words. */
INLINE __m512i put_scales(int wide, __m512i d, int j, __m512i first, __m512i second) {
    const __m512i at =
        _mm512_castsi256_si512(wide == 4 ? _mm256_setr_epi16(0, 0, 0, 0, 9, 9, 9, 9, 18, 18, 18, 18, 27, 27, 27, 27)
                                         : _mm256_setr_epi16(0, 0, 0, 0, 9, 9, 9, 9, 0, 0, 0, 0, 9, 9, 9, 9));
    d = _mm512_mask_permutexvar_epi16(d, (wide == 4 ? 0x1111u : 0x0011u) << j, at, first);
    return wide == 4 ? d : _mm512_mask_permutexvar_epi16(d, 0x1100u << j, at, second);
}

/* The first n blocks from `at` on, n <= wide, of N_TOKENS(wide) tokens, or of n_tok and the last one again. Nothing
 * beyond them is touched. */
INLINE blocks16 load_blocks16(int trellis, int bits, int wide, const uint8_t * at, size_t stride, int n_tok, int n) {
    const int n_bytes = n * (int) TQI_BLOCK_BYTES(bits);
    const uint8_t * rows[8];
    __m512i four[4], fifth[4], d = _mm512_setzero_si512();
    blocks16 y;
    rows[0] = at;
    for (int j = 1; j < N_TOKENS(wide); ++j) {
        rows[j] = rows[j - 1] + (j < n_tok ? stride : 0);
    }
    for (int j = 0; j < 4; ++j) {
        const __m512i first = load_bytes(rows[j], n_bytes);
        const __m512i second = wide == 2          ? load_bytes(rows[4 + j], n_bytes)
                               : SECOND(bits) > 0 ? load_bytes(rows[j] + SECOND(bits), n_bytes - SECOND(bits))
                                                  : first;
        const block_part part = !trellis && bits == 3 ? PQO3
                                : bits == 2           ? TWO
                                : bits == 3           ? THREE
                                : bits == 4           ? FOUR_BY_18
                                                      : FOUR_BY_22;
        four[j] = part_of(part, wide, first, second);
        if (bits == 4) {
            d = put_scales(wide, d, j, first, second);
        } else if (bits == 5) {
            fifth[j] = part_of(FIFTH, wide, first, second);
        }
    }
    transpose(four, y.words);
    if (bits == 4) {
        y.scale = widen_scales(_mm512_castsi512_si256(d));
        return y;
    }
    if (!trellis) {
        d = _mm512_or_si512(_mm512_srli_epi32(y.words[0], 24),
                            _mm512_and_si512(_mm512_srli_epi32(y.words[1], 16), _mm512_set1_epi32(0xff00)));
    } else if (bits == 5) {
        const __m512i low = _mm512_unpacklo_epi32(fifth[0], fifth[1]), high = _mm512_unpacklo_epi32(fifth[2], fifth[3]);
        y.words[4] = _mm512_unpacklo_epi64(low, high);
        d = _mm512_unpackhi_epi64(low, high);
    } else {
        d = y.words[bits];
    }
    y.scale = widen_scales(_mm512_cvtepi32_epi16(d));
    return y;
}

/* Sums over the blocks of a vector, for 16 tokens in order; x: (wide). */
INLINE __m512 sum_blocks(int wide, const __m512 * x) {
    if (wide == 2) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(x[0], x[1], 0x88), _mm512_shuffle_f32x4(x[0], x[1], 0xdd));
    }
    const __m512 x01 = _mm512_add_ps(_mm512_shuffle_f32x4(x[0], x[1], 0x44), _mm512_shuffle_f32x4(x[0], x[1], 0xee));
    const __m512 x23 = _mm512_add_ps(_mm512_shuffle_f32x4(x[2], x[3], 0x44), _mm512_shuffle_f32x4(x[2], x[3], 0xee));
    return _mm512_add_ps(_mm512_shuffle_f32x4(x01, x23, 0x88), _mm512_shuffle_f32x4(x01, x23, 0xdd));
}

/* Lane b is a value of block b (wide 2: lane 2 + b, too): dword j of the blocks' eight, or a float of each. */
INLINE __m512i spread_dwords(int wide, const __m256i * x, int j) {
    const int b2 = wide == 4 ? 16 : 0;
    return _mm512_permutex2var_epi32(_mm512_inserti64x4(_mm512_castsi256_si512(x[0]), x[1], 1),
                                     _mm512_setr_epi32(j, j, j, j, 8 + j, 8 + j, 8 + j, 8 + j, b2 + j, b2 + j, b2 + j,
                                                       b2 + j, b2 + 8 + j, b2 + 8 + j, b2 + 8 + j, b2 + 8 + j),
                                     _mm512_inserti64x4(_mm512_castsi256_si512(x[2]), x[3], 1));
}

INLINE __m512 spread_floats(int wide, const float * x) {
    return _mm512_permutexvar_ps(wide == 4 ? _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3)
                                           : _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1),
                                 _mm512_castps128_ps512(_mm_loadu_ps(x)));
}

#endif
