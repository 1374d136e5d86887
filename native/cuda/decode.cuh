/* decode.cuh: blocks back to values by teams of eight threads, to the bit what portable.c gives (without contraction,
 * see encode.cuh). */
#ifndef TQ_DECODE_CUH
#define TQ_DECODE_CUH

#include "encode.cuh"

/* y: values l, l + 8, ... of a block, in the transformed domain. */
TQ_HD void tq_unpack_block(const tq_tables * tables, int bits, int trellis, const uint8_t * block, int l, float * y) {
    uint32_t words[4];
    const float d = tq_f16_to_f32(tq_finite_scale(*(const uint16_t *) (const void *) block));
    tq_load_words(block, bits, words);
    TQ_UNROLL
    for (int m = 0; m < TQ_VALUES; ++m) {
        const int index = trellis ? tq_unpack_level(words, l + TQ_TEAM * m) : tq_unpack_index(bits, words, l, m);
        y[m] = d * tables->levels[index];
    }
}

TQ_D void tq_decode_block(const tqi_codec & codec, const tq_tables * tables, const uint8_t * block, int transformed,
                          int l, float * x) {
    tq_unpack_block(tables, codec.bits, codec.trellis, block, l, x);
    if (!transformed) {
        tq_inverse_transform(codec.signs == TQI_SIGNS_FIRST, x, l);
    }
}

#endif
