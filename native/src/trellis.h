/* trellis.h: trellis-coded quantisation (Marcellin and Fischer, IEEE Trans. Commun. 38(1), 1990), the types pqt2 to
 * pqt5.
 *
 * The 2^(k+1) levels of a k-bit type are dealt out to four subsets, level j to subset j % 4. Which subset a value is
 * quantised in follows from a 32-bit word t that all 32 values share; which of the subset's levels, from k - 1 bits e
 * of its own. Value i's subset depends on bits i, i - 1, i - 2 and i - 3 of t, modulo 32: t is a path through a trellis
 * of eight states, and a closed one, since value 0 follows on value 31. Rotating the word is therefore the whole
 * decoder, and every word is a valid path.
 *
 * A state is three bits of t, (t[i], t[i - 1], t[i - 2]) in falling significance. */
#ifndef TQI_TRELLIS_H
#define TQI_TRELLIS_H

#include "kernels.h"

#include <math.h>

#define TQI_STATES 8
#define TQI_SUBSETS 4
#define TQI_CANDIDATES 8 /* scales per block that the encoder tries: four factors, both signs */
#define TQI_MAX_WORDS 5  /* of a block, after its scale */
#define TQI_FAR 1e30f    /* what the paths cost that begin in another state than the one wanted */

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

/* The scales to try on a block whose values reach from min to max: multiples of the smallest one that clips nothing,
 * positive and negative in turn. Returns 0 if the block counts as zero; the scales are valid numbers even so. */
static inline int tqi_trellis_candidates(const tqi_codec * codec, float max, float min, float * scale) {
    const float high = 1.0f / codec->levels[codec->n_levels - 1];
    const float low = 1.0f / codec->levels[0];
    const int some = max >= TQI_AMAX_MIN || -min >= TQI_AMAX_MIN;
    const float base = some ? fmaxf(max * high, min * low) : 1.0f,
                mirrored = some ? fmaxf(-min * high, -max * low) : 1.0f;
    for (int c = 0; c < TQI_CANDIDATES; c += 2) {
        scale[c] = base * codec->factors[c / 2];
        scale[c + 1] = -(mirrored * codec->factors[c / 2]);
    }
    return some;
}

/* Writes a block of scale d (f16 bits), path t and e: (TQ_BLOCK); a zero scale makes a zero block. */
static inline void tqi_trellis_put(int bits, uint16_t d, uint32_t t, const int32_t * e, uint8_t * to) {
    if ((d & 0x7fffu) == 0) {
        memset(to, 0, TQI_BLOCK_BYTES(bits));
        return;
    }
    uint32_t parts[TQI_MAX_WORDS] = { t };
    for (int i = 0; i < TQ_BLOCK; ++i) {
        tqi_trellis_put_e(bits, (uint32_t) e[i], i, parts);
    }
    memcpy(to, &d, sizeof d);
    memcpy(to + sizeof d, parts, (size_t) (4 * bits));
}

void tqi_trellis_encode_portable(const tqi_codec * codec, const float * x, int64_t n_blocks, uint8_t * blocks);
void tqi_trellis_unpack_portable(const tqi_codec * codec, const uint8_t * blocks, int64_t n_blocks, float * y);

#endif
