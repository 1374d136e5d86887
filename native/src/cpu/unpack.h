/* unpack.h: a row's values, over the vocabulary of vector.h.
 *
 * The including file defines
 *   decoder                      a codebook in registers; load_decoder(bits, codec)
 *   codes                        a block's codes; open_block(bits, &c, block)
 *   values(bits, &c, codes, g)   values LANES * g and on, in units of LEVEL_UNIT and without the block's scale */
#include "block.h"

INLINE float scale_of(const uint8_t * in) {
    return LEVEL_UNIT * block_scale(in);
}

INLINE void unpack_rows(int bits, const tqi_codec * codec, const uint8_t * blocks, int64_t n_blocks, float * y) {
    const decoder c = load_decoder(bits, codec);
    for (int64_t b = 0; b < n_blocks; ++b, y += TQ_BLOCK, blocks += TQI_BLOCK_BYTES(bits)) {
        const vec d = v_set1(scale_of(blocks));
        const codes x = open_block(bits, &c, blocks);
        UNROLL
        for (int g = 0; g < N_VEC; ++g) {
            v_store(y + LANES * g, v_mul(d, values(bits, &c, x, g)));
        }
    }
}
