/* trellis_avx512.c: the trellis types in AVX-512. Two blocks are searched at once. */
#include "lanes_avx512.h"

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
#include "trellis_lanes.h"
#include "unpack.h"

/* ---- Tiles ---- */

typedef struct {
    decoder units;
    float step;
} words_table;

INLINE words_table load_words(int bits, const tqi_codec * codec, int level_max) {
    (void) level_max;
    return (words_table) { load_decoder(bits, codec), TQI_LEVEL_UNIT };
}

INLINE __m512i unpack_words(int bits, const words_table * c, const uint8_t * from) {
    return _mm512_cvtepi8_epi16(open_block(bits, &c->units, from));
}

#define VALUE_AT(p) (8 * ((p) % 4) + (p) / 4)
#define K_LEVEL_MAX 128
#define Q_MAX LARGEST
#define V_LEVEL_MAX 128
#define WEIGHT_MAX LARGEST
#define BY_BITS TQI_BY_TRELLIS_BITS
#include "steps.h"
#include "tiles_avx512.h"

const tqi_steps tqi_trellis_avx512 = { encode, unpack, load_query, scores, accumulate, &tiles };
