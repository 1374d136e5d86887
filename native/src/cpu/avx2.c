/* avx2.c: the PQO types, and what does not depend on the type, in AVX2, FMA and F16C.
 *
 * encode and decode follow the portable order of operations exactly (no FMA there but that of
 * v_hadamard); the attention steps use FMA. */
#include "vector_avx2.h"

#include "features_x86.h"

static int supported(void) {
    return tqi_has_avx2_fma_f16c();
}

/* ---- Codebooks ---- */

typedef struct {
    vec low, high; /* levels 0..7, 8..15 */
} decoder;

INLINE decoder load_decoder(int bits, const tqi_codec * codec) {
    const vec low = v_load(codec->levels);
    return (decoder) { low, bits == 3 ? low : v_load(codec->levels + 8) };
}

/* vpermps reads only the low three bits of each lane, so bits above an index's own may be set. */
INLINE vec levels_at(int bits, const decoder * c, words index) {
    const vec low = _mm256_permutevar8x32_ps(c->low, index);
    if (bits == 3) {
        return low;
    }
    const vec high = _mm256_permutevar8x32_ps(c->high, index);
    return v_select(_mm256_castsi256_ps(_mm256_slli_epi32(index, 28)), high, low);
}

/* A codebook for encoding. The boundaries are those that each step of a binary search compares with, by the index so
 * far. */
typedef struct {
    decoder levels;
    vec middle, second, third, last;
} table;

INLINE table load_table(int bits, const tqi_codec * codec) {
    const float * b = codec->boundaries;
    table c = { .levels = load_decoder(bits, codec) };
    if (bits == 3) {
        /* index 4 or 0 by b[3]; then b[index + 1] is b[1] or b[5]; then b[index] */
        c.middle = v_set1(b[3]);
        c.second = _mm256_setr_ps(b[1], b[1], b[1], b[1], b[5], b[5], b[5], b[5]);
        c.last = _mm256_setr_ps(b[0], b[0], b[2], b[2], b[4], b[4], b[6], b[6]);
    } else {
        /* the same over pairs of levels (index / 2), then one more step inside the pair: b[2 * pair] */
        c.middle = v_set1(b[7]);
        c.second = _mm256_setr_ps(b[3], b[3], b[3], b[3], b[11], b[11], b[11], b[11]);
        c.third = _mm256_setr_ps(b[1], b[1], b[5], b[5], b[9], b[9], b[13], b[13]);
        c.last = _mm256_setr_ps(b[0], b[2], b[4], b[6], b[8], b[10], b[12], b[14]);
    }
    return c;
}

/* Adds step to the indices where t is above the boundary. */
INLINE words climb(words index, vec t, vec boundary, int step) {
    const words above = _mm256_castps_si256(v_less(boundary, t));
    return _mm256_or_si256(index, _mm256_and_si256(above, _mm256_set1_epi32(step)));
}

INLINE words index_of(int bits, const table * c, vec t) {
    words index = climb(w_zero(), t, c->middle, 4);
    index = climb(index, t, _mm256_permutevar8x32_ps(c->second, index), 2);
    if (bits == 3) {
        return climb(index, t, _mm256_permutevar8x32_ps(c->last, index), 1);
    }
    index = climb(index, t, _mm256_permutevar8x32_ps(c->third, index), 1);
    return w_count(w_add(index, index), v_less(_mm256_permutevar8x32_ps(c->last, index), t));
}

/* ---- Blocks ---- */

INLINE void pack(int bits, words index, uint8_t * out) {
    const words shift =
        bits == 3 ? _mm256_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21) : _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const words shifted = _mm256_sllv_epi32(index, shift);
    __m128i half = _mm_or_si128(_mm256_castsi256_si128(shifted), _mm256_extracti128_si256(shifted, 1));
    half = _mm_or_si128(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_or_si128(half, _mm_shuffle_epi32(half, 0xb1));
    const uint32_t word = (uint32_t) _mm_cvtsi128_si32(half);
    memcpy(out, &word, (size_t) bits);
}

#include "scale_search.h"

#define LEVEL_UNIT 1.0f
#define DECODE_AHEAD 0
typedef const uint8_t * codes;

INLINE codes open_block(int bits, const decoder * c, const uint8_t * in) {
    (void) bits, (void) c;
    return in + sizeof(uint16_t);
}

/* Reads inside the block only: the last three bytes of a 3-bit block are read with the byte before them. */
INLINE vec values(int bits, const decoder * c, codes from, int g) {
    const int back = bits == 3 && g == 3;
    const words word = _mm256_set1_epi32((int) tqi_load_u32(from + bits * g - back));
    const words shift = bits == 4 ? _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28)
                        : back    ? _mm256_setr_epi32(8, 11, 14, 17, 20, 23, 26, 29)
                                  : _mm256_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21);
    return levels_at(bits, c, _mm256_srlv_epi32(word, shift));
}

#include "fused.h"
#include "gemm.h"
#include "rows_f16.h"
#include "softmax.h"
#define BY_BITS TQI_BY_BITS
#include "steps.h"

TQI_KERNELS(avx2, &tqi_trellis_avx2);
