/* trellis_avx2.c: the trellis types in AVX2. */
#include "lanes_avx2.h"

#include "trellis_search.h"

/* The levels' units for pshufb, which looks up by four bits: entry e % 4 + 4 * subset, in a table for each e / 4. */
typedef struct {
    __m256i units[4];
} decoder;

#define N_TABLES(bits) ((bits) < 4 ? 1 : 1 << ((bits) - 3))

INLINE decoder load_decoder(int bits, const tqi_codec * codec) {
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    decoder c;
    for (int i = 0; i < N_TABLES(bits); ++i) {
        const __m128i units = _mm_loadu_si128((const __m128i *) (const void *) (codec->level_units + 16 * i));
        c.units[i] = _mm256_broadcastsi128_si256(_mm_shuffle_epi8(units, order));
    }
    return c;
}

typedef __m256i codes; /* a block's levels in units: byte k of word j is value 8 k + j */

INLINE __m256i word8(const uint8_t * at) {
    return _mm256_set1_epi32((int) tqi_load_u32(at));
}

/* The word at that address, of which bit i belongs to value i, with that bit as the highest of the value's byte. */
INLINE __m256i word_high(const uint8_t * at) {
    return _mm256_sllv_epi32(word8(at), _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0));
}

INLINE codes open_block(int bits, const decoder * c, const uint8_t * in) {
    /* four bits of t, those of values i - 3 to i, determine the subset of value i; here times 4 */
    const __m256i subsets =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 8, 4, 12, 8, 0, 12, 4, 8, 0, 12, 4, 0, 8, 4, 12));
    const __m256i right = _mm256_setr_epi32(29, 30, 31, 0, 1, 2, 3, 4),
                  left = _mm256_setr_epi32(3, 2, 1, 32, 31, 30, 29, 28);
    const __m256i t = word8(in + 2);
    const __m256i turned = _mm256_or_si256(_mm256_srlv_epi32(t, right), _mm256_sllv_epi32(t, left));
    const __m256i subset = _mm256_shuffle_epi8(subsets, _mm256_and_si256(turned, _mm256_set1_epi8(15)));
    if (bits == 2) {
        const __m256i low = _mm256_srlv_epi32(word8(in + 6), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
        const __m256i index = _mm256_or_si256(subset, _mm256_and_si256(low, _mm256_set1_epi8(1)));
        return _mm256_shuffle_epi8(c->units[0], index);
    }
    int64_t even_odd;
    memcpy(&even_odd, in + 6, sizeof even_odd);
    const __m256i pairs = _mm256_srlv_epi64(_mm256_set1_epi64x(even_odd), _mm256_setr_epi64x(0, 2, 4, 6));
    const __m256i index = _mm256_or_si256(subset, _mm256_and_si256(pairs, _mm256_set1_epi8(3)));
    const __m256i units = _mm256_shuffle_epi8(c->units[0], index);
    if (bits == 3) {
        return units;
    }
    const __m256i top = word_high(in + 14);
    const __m256i lower = _mm256_blendv_epi8(units, _mm256_shuffle_epi8(c->units[1], index), top);
    if (bits == 4) {
        return lower;
    }
    const __m256i upper =
        _mm256_blendv_epi8(_mm256_shuffle_epi8(c->units[2], index), _mm256_shuffle_epi8(c->units[3], index), top);
    return _mm256_blendv_epi8(lower, upper, word_high(in + 18));
}

INLINE vec values(int bits, const decoder * c, codes units, int g) {
    (void) bits, (void) c;
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(g == 3 ? units : _mm256_slli_epi32(units, 24 - 8 * g), 24));
}

#define LEVEL_UNIT TQI_LEVEL_UNIT
#include "trellis_lanes.h"
#include "unpack.h"
#define BY_BITS TQI_BY_TRELLIS_BITS
#include "steps.h"

const tqi_steps tqi_trellis_avx2 = { encode, unpack, load_query, scores, accumulate, NULL };
