/* encoder.h: what targets encode and trellis check of an encoder, on floats of any kind: NaN, infinities,
 * subnormals. */
#ifndef TQ_FUZZ_ENCODER_H
#define TQ_FUZZ_ENCODER_H

#include "fuzz.h"

#define MAX_BLOCKS 8
#define MAX_BYTES (MAX_BLOCKS * 22)

static inline float sanitized(float x) {
    return x != x ? 0.0f : x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x;
}

/* Floats from an input's bytes, as they are or as small numbers times a power of two; returns how many, whole
 * blocks. */
static inline size_t take_values(bytes * in, float * x) {
    const int plain = take_below(in, 2), exponent = (int) take(in) - 160;
    const size_t width = plain ? 4 : 1;
    size_t n = in->left / (width * TQ_BLOCK);
    n = (n < MAX_BLOCKS ? n : MAX_BLOCKS) * TQ_BLOCK;
    for (size_t i = 0; i < n; ++i) {
        x[i] = plain ? take_float(in) : ldexpf((float) (int8_t) take(in), exponent);
    }
    return n;
}

static inline void check_encoder(int type, int mode, const float * x, size_t n) {
    static uint8_t want[MAX_BYTES], got[MAX_BYTES];
    static float clean[MAX_BLOCKS * TQ_BLOCK], y[MAX_BLOCKS * TQ_BLOCK];
    const size_t block_bytes = tq_row_bytes(type, TQ_BLOCK), n_bytes = n / TQ_BLOCK * block_bytes;
    uint8_t * first = want + MAX_BYTES - n_bytes;
    for (size_t i = 0; i < n; ++i) {
        clean[i] = sanitized(x[i]);
    }
    for (int k = 0; k < n_kernels; ++k) {
        uint8_t * blocks = (k == 0 ? want : got) + MAX_BYTES - n_bytes;
        use_kernel(k);
        memset(blocks, 0xa5, n_bytes);
        REQUIRE(tq_encode(type, mode, x, (int64_t) n, blocks) == TQ_OK, "%s", tq_last_error());
        REQUIRE(k == 0 || memcmp(blocks, first, n_bytes) == 0, "other bytes than portable's");
    }
    /* what is not finite counts as what it says in tqgguf.h, and no block depends on its neighbours */
    for (size_t b = 0; b < n / TQ_BLOCK; ++b) {
        REQUIRE(tq_encode(type, mode, clean + b * TQ_BLOCK, TQ_BLOCK, got) == TQ_OK, "%s", tq_last_error());
        REQUIRE(memcmp(got, first + b * block_bytes, block_bytes) == 0, "block %d of sanitized values alone is another",
                (int) b);
    }
    REQUIRE(tq_decode(type, mode, first, (int64_t) n, y) == TQ_OK, "%s", tq_last_error());
    for (size_t b = 0; b < n / TQ_BLOCK; ++b) {
        const uint8_t * block = first + b * block_bytes;
        double error = 0.0, size = 0.0;
        REQUIRE((load_u16(block) & 0x7c00) != 0x7c00, "a scale that is not finite");
        for (size_t i = 0; (load_u16(block) & 0x7fff) == 0 && i < block_bytes; ++i) {
            REQUIRE(block[i] == 0, "scale 0 and byte %d is %d", (int) i, block[i]);
        }
        for (size_t i = b * TQ_BLOCK; i < (b + 1) * TQ_BLOCK; ++i) {
            REQUIRE(isfinite(y[i]), "decoded %g", (double) y[i]);
            error += ((double) y[i] - (double) clean[i]) * ((double) y[i] - (double) clean[i]);
            size += (double) clean[i] * (double) clean[i];
        }
        /* worse than storing nothing: possible only by the rounding of a scale that is next to nothing */
        REQUIRE(error <= 1.001 * size + 1e-11, "squared error %g of %g", error, size);
    }
}

#endif
