/* quads_neon.h: blocks of four tokens in the registers of AArch64. */
#ifndef TQI_QUADS_NEON_H
#define TQI_QUADS_NEON_H

#include "vector_neon.h"

#include <math.h>

#define N_QUADS (TQI_AHEAD / 4) /* of a tile's tokens */
#define LARGEST (127 * 256)     /* magnitude of an integer */
#define TINY 1e-30f             /* magnitudes below it count as zero, so that reciprocals stay finite */

/* A block of four tokens. */
typedef struct {
    uint8x16_t part[4];
    uint8x16_t top, highest; /* pqt4 and pqt5: bit j of byte k is bit 4 (5) of value 8 k + j */
} quad;

/* The first rows of four tokens, or of n_tok and the last one again. */
INLINE void find_rows(const uint8_t * at, size_t stride, int n_tok, const uint8_t ** rows) {
    rows[0] = at;
    for (int j = 1; j < 4; ++j) {
        rows[j] = rows[j - 1] + (j < n_tok ? stride : 0);
    }
}

/* What a block has behind its scale, up to 16 bytes; nothing beyond it is touched. */
INLINE uint8x16_t load_codes(int bits, const uint8_t * block) {
    if (bits >= 4) {
        return vld1q_u8(block + 2);
    }
    const uint32x4_t x = vreinterpretq_u32_u8(vcombine_u8(vld1_u8(block + 2), vdup_n_u8(0)));
    return vreinterpretq_u8_u32(bits == 2 ? x : vsetq_lane_u32(tqi_load_u32(block + 10), x, 2));
}

/* Scales that are not finite count as 0, as they do everywhere. */
INLINE float32x4_t load_scales(const uint8_t * const * rows) {
    uint16x4_t d = vdup_n_u16(tqi_load_u16(rows[0]));
    d = vset_lane_u16(tqi_load_u16(rows[1]), d, 1);
    d = vset_lane_u16(tqi_load_u16(rows[2]), d, 2);
    d = vset_lane_u16(tqi_load_u16(rows[3]), d, 3);
    const float32x4_t x = vcvt_f32_f16(vreinterpret_f16_u16(d));
    return keep4(vcaltq_f32(x, vdupq_n_f32(INFINITY)), x);
}

/* Transposes n words of four tokens, n from 2 to 4. */
INLINE void transpose_words(int n, const uint8x16_t * x, uint8x16_t * y) {
    const uint32x4_t a = vreinterpretq_u32_u8(x[0]), b = vreinterpretq_u32_u8(x[1]);
    const uint32x4_t c = vreinterpretq_u32_u8(x[2]), d = vreinterpretq_u32_u8(x[3]);
    const uint32x4_t ac = vzip1q_u32(a, c), bd = vzip1q_u32(b, d);
    y[0] = vreinterpretq_u8_u32(vzip1q_u32(ac, bd));
    y[1] = vreinterpretq_u8_u32(vzip2q_u32(ac, bd));
    if (n > 2) {
        const uint32x4_t ac2 = vzip2q_u32(a, c), bd2 = vzip2q_u32(b, d);
        y[2] = vreinterpretq_u8_u32(vzip1q_u32(ac2, bd2));
        y[3] = vreinterpretq_u8_u32(vzip2q_u32(ac2, bd2));
    }
}

#endif
