/* neon.c: the PQO types, and what does not depend on the type, in AArch64 Advanced SIMD. Codebooks are looked up as
 * bytes with tbl.
 *
 * encode and decode follow the portable order of operations exactly (no FMA there); the attention steps use FMA. */
#include "vector_neon.h"

#include "features_arm.h"

static int supported(void) {
    return 1; /* part of the AArch64 base */
}

/* ---- Codebooks ---- */

typedef struct {
    uint8x16x4_t levels; /* the bytes of up to 16 floats */
} decoder;

INLINE decoder load_decoder(int bits, const tqi_codec * codec) {
    (void) bits;
    return (decoder) { vld1q_u8_x4((const uint8_t *) (const void *) codec->levels) };
}

INLINE float32x4_t levels4(int bits, const decoder * c, uint32x4_t index) {
    if (bits == 3) {
        const uint8x16x2_t low = { { c->levels.val[0], c->levels.val[1] } };
        return vreinterpretq_f32_u8(vqtbl2q_u8(low, bytes_at(index)));
    }
    return vreinterpretq_f32_u8(vqtbl4q_u8(c->levels, bytes_at(index)));
}

INLINE vec levels_at(int bits, const decoder * c, words index) {
    return (vec) { { levels4(bits, c, index.v[0]), levels4(bits, c, index.v[1]) } };
}

/* A codebook for encoding. */
typedef struct {
    decoder levels;
    const float * boundaries;
} table;

INLINE table load_table(int bits, const tqi_codec * codec) {
    return (table) { load_decoder(bits, codec), codec->boundaries };
}

INLINE words index_of(int bits, const table * c, vec t) {
    words index = w_zero();
    UNROLL
    for (int j = 0; j < (1 << bits) - 1; ++j) {
        index = w_count(index, v_less(v_set1(c->boundaries[j]), t));
    }
    return index;
}

/* ---- Blocks ---- */

INLINE void pack(int bits, words index, uint8_t * out) {
    const int32_t left[8] = { 0, bits, 2 * bits, 3 * bits, 4 * bits, 5 * bits, 6 * bits, 7 * bits };
    const words shifted = w_shift(index, left);
    const uint32_t word = vaddvq_u32(vorrq_u32(shifted.v[0], shifted.v[1])); /* disjoint bits */
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
    const words word = w_set1(tqi_load_u32(from + bits * g - back) >> (8 * back));
    const int32_t left[8] = { 0, -bits, -2 * bits, -3 * bits, -4 * bits, -5 * bits, -6 * bits, -7 * bits };
    return levels_at(bits, c, w_and(w_shift(word, left), w_set1((1u << bits) - 1u)));
}

#include "fused.h"
#include "gemm.h"
#include "rows_f16.h"
#include "softmax.h"
#define BY_BITS TQI_BY_BITS
#include "steps.h"

TQI_KERNELS(neon, NULL, &tqi_trellis_neon);

/* ---- Kernels that differ in attention alone ---- */

void tqi_pqo_encode_neon(const tqi_codec * codec, const float * x, int64_t n_blocks, uint8_t * blocks) {
    encode(codec, x, n_blocks, blocks);
}

void tqi_pqo_unpack_neon(const tqi_codec * codec, const uint8_t * blocks, int64_t n_blocks, float * y) {
    unpack(codec, blocks, n_blocks, y);
}

TQI_KERNELS_OF(dotprod, tqi_has_dotprod, &tqi_pqo_dotprod, &tqi_trellis_dotprod);
TQI_KERNELS_OF(i8mm, tqi_has_i8mm, &tqi_pqo_i8mm, &tqi_trellis_i8mm);
