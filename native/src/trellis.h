/* trellis.h: trellis-coded quantisation (Marcellin and Fischer, IEEE Trans. Commun. 38(1), 1990), the types pqt3 and pqt4.
 *
 * The 2^(k+1) levels of a k-bit type are dealt out to four subsets, level j to subset j % 4. Which subset a value is
 * quantised in follows from a 32-bit word t that all 32 values share; which of the subset's levels, from k - 1 bits e of its
 * own. Value i's subset depends on bits i, i - 1, i - 2 and i - 3 of t, modulo 32: t is a path through a trellis of eight
 * states, and a closed one, since value 0 follows on value 31. Rotating the word is therefore the whole decoder, and every
 * word is a valid path.
 *
 * A state is three bits of t, (t[i], t[i - 1], t[i - 2]) in falling significance. */
#ifndef TQI_TRELLIS_H
#define TQI_TRELLIS_H

#include "kernels.h"

#define TQI_STATES     8
#define TQI_SUBSETS    4
#define TQI_CANDIDATES 8 /* scales per block that the encoder tries: four factors, both signs */
#define TQI_CUT        16 /* values on either side of the cut that decide the state there: see closed_path in trellis_portable.c */
#define TQI_FAR        1e30f /* what the paths cost that begin in another state than the one wanted */

static inline uint32_t tqi_rotate(uint32_t t, int n) {
    return t << n | t >> (32 - n);
}

/* The two bits of every value's subset number. */
static inline uint32_t tqi_subset_low(uint32_t t) {
    return tqi_rotate(t, 2);
}

static inline uint32_t tqi_subset_high(uint32_t t) {
    return t ^ tqi_rotate(t, 1) ^ tqi_rotate(t, 3);
}

/* What an instruction set implements for these types. y is transformed; blocks need not be aligned. */
#define TQI_TRELLIS_FUNCTIONS(isa)                                                                                        \
    void tqi_trellis_encode_##isa(const tqi_codec * codec, const float * y, int64_t n_blocks, uint8_t * blocks);          \
    void tqi_trellis_unpack_##isa(const tqi_codec * codec, const uint8_t * blocks, int64_t n_blocks, float * y);

TQI_TRELLIS_FUNCTIONS(portable)

#endif
