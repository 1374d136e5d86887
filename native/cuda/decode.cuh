/* decode.cuh: blocks back to values by teams of eight threads, to the bit what kernels_portable.c gives (without
 * contraction, see encode.cuh). */
#ifndef TQI_DECODE_CUH
#define TQI_DECODE_CUH

#include "encode.cuh"

/* y: values l, l + 8, ... of a block, in the transformed domain. */
TQI_HD void tqi_unpack_block(const tqi_tables * tables, int bits, int trellis, const uint8_t * block, int l,
                             float * y) {
    uint32_t words[4];
    const float d = tqi_f16_to_f32(tqi_finite_scale(*(const uint16_t *) (const void *) block));
    tqi_load_words(block, bits, words);
    TQI_UNROLL
    for (int m = 0; m < TQI_VALUES; ++m) {
        const int index = trellis ? tqi_unpack_level(words, l + TQI_TEAM * m) : tqi_unpack_index(bits, words, l, m);
        y[m] = d * tables->levels[index];
    }
}

TQI_D void tqi_decode_block(const tqi_codec & codec, const tqi_tables * tables, const uint8_t * block, int transformed,
                            int l, float * x) {
    tqi_unpack_block(tables, codec.bits, codec.trellis, block, l, x);
    if (!transformed) {
        tqi_inverse_transform(codec.signs == TQI_SIGNS_FIRST, x, l);
    }
}

#endif
