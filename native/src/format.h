/* format.h: the block layouts and the scalar steps that every kernel shares.
 *
 * One block holds TQ_BLOCK = 32 consecutive values of one head: an f16 scale, then what tells each value's codebook
 * level. */
#ifndef TQI_FORMAT_H
#define TQI_FORMAT_H

#include "tqgguf.h"

#include <assert.h>
#include <stdint.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#    error "the block formats are little-endian and this code assumes a little-endian machine"
#endif

/* How this header's functions are declared. The CUDA sources define it so that the GPU has them, too (cuda/internal.h). */
#if !defined(TQI_INLINE)
#    define TQI_INLINE static inline
#endif

typedef struct {
    uint16_t d;     /* f16 scale; negative mirrors the codebook */
    uint8_t qs[12]; /* index j of group g (8 values) at bits 3j..3j+2 of the 24-bit word at qs + 3g */
} tqi_block_pqo3;

typedef struct {
    uint16_t d;
    uint8_t qs[16]; /* value 2i in the low, 2i+1 in the high nibble of byte i */
} tqi_block_pqo4;

/* A trellis block: value i's level is 4 e[i] + its subset, which follows from t (trellis.h). All words are such that a
 * shift of each by j brings values j, 8 + j, 16 + j and 24 + j into the same bits of its four bytes: vector code reads
 * a block as eight words of four bytes, and shifts each by its own j. */
typedef struct {
    uint16_t d;
    uint8_t t[4];   /* a 32-bit word */
    uint8_t low[4]; /* the only bit of e[i] at bit i of a 32-bit word */
} tqi_block_pqt2;

typedef struct {
    uint16_t d;
    uint8_t t[4];
    uint8_t even[4]; /* bits 0 and 1 of e[i] for even i, at bits i and i + 1 of a 32-bit word */
    uint8_t odd[4];  /* the same for odd i, at bits i - 1 and i */
} tqi_block_pqt3;

typedef struct {
    uint16_t d;
    uint8_t t[4];
    uint8_t even[4];
    uint8_t odd[4];
    uint8_t top[4]; /* bit 2 of e[i] at bit i of a 32-bit word */
} tqi_block_pqt4;

typedef struct {
    uint16_t d;
    uint8_t t[4];
    uint8_t even[4];
    uint8_t odd[4];
    uint8_t top[4];
    uint8_t highest[4]; /* bit 3 of e[i] at bit i of a 32-bit word */
} tqi_block_pqt5;

#define TQI_MAX_WORDS 5 /* of a trellis block, after its scale */

/* Bytes of a block of a type with so many bits per value. */
#define TQI_BLOCK_BYTES(bits) ((size_t) (TQ_BLOCK / 8 * (bits)) + sizeof(uint16_t))

#define TQI_PQO3_BYTES TQI_BLOCK_BYTES(3)
#define TQI_PQO4_BYTES TQI_BLOCK_BYTES(4)
#define TQI_PQT2_BYTES TQI_BLOCK_BYTES(2)
#define TQI_PQT3_BYTES TQI_BLOCK_BYTES(3)
#define TQI_PQT4_BYTES TQI_BLOCK_BYTES(4)
#define TQI_PQT5_BYTES TQI_BLOCK_BYTES(5)

static_assert(sizeof(tqi_block_pqo3) == TQI_PQO3_BYTES, "block_pqo3 must have no padding");
static_assert(sizeof(tqi_block_pqo4) == TQI_PQO4_BYTES, "block_pqo4 must have no padding");
static_assert(sizeof(tqi_block_pqt2) == TQI_PQT2_BYTES, "block_pqt2 must have no padding");
static_assert(sizeof(tqi_block_pqt3) == TQI_PQT3_BYTES, "block_pqt3 must have no padding");
static_assert(sizeof(tqi_block_pqt4) == TQI_PQT4_BYTES, "block_pqt4 must have no padding");
static_assert(sizeof(tqi_block_pqt5) == TQI_PQT5_BYTES, "block_pqt5 must have no padding");

#define TQI_F16_MAX 65504.0f
#define TQI_RSQRT_BLOCK 0.17677669529663687f /* 1 / sqrt(32) */
#define TQI_AMAX_MIN 5.9604645e-8f           /* 2^-24, the smallest f16: blocks below it are zero blocks */
#define TQI_NORM_MIN 1e-10f                  /* turboquant-rs clamps its scales from below by this */

TQI_INLINE uint32_t tqi_float_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

TQI_INLINE float tqi_bits_float(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

TQI_INLINE uint16_t tqi_load_u16(const void * p) {
    uint16_t u;
    memcpy(&u, p, sizeof u);
    return u;
}

TQI_INLINE uint32_t tqi_load_u32(const void * p) {
    uint32_t u;
    memcpy(&u, p, sizeof u);
    return u;
}

/* f16 -> f32, exact. Subnormals are scaled by a multiplication, so no branch depends on their leading zeros. */
TQI_INLINE float tqi_f16_to_f32(uint16_t h) {
    const uint32_t sign = (uint32_t) (h & 0x8000u) << 16;
    const uint32_t exp = (h >> 10) & 0x1fu;
    const uint32_t man = h & 0x3ffu;
    if (exp == 0) {
        return tqi_bits_float(sign | tqi_float_bits((float) man * 5.9604644775390625e-8f));
    }
    return tqi_bits_float(sign | (exp == 31 ? 0x7f800000u : (exp + 112) << 23) | man << 13);
}

/* f32 -> f16, round to nearest even; the same result as F16C and NEON conversion for finite values. */
TQI_INLINE uint16_t tqi_f32_to_f16(float f) {
    const uint32_t u = tqi_float_bits(f);
    const uint32_t sign = (u >> 16) & 0x8000u;
    const uint32_t abs = u & 0x7fffffffu;
    if (abs >= 0x47800000u) { /* 65536 and above, infinity, NaN */
        return (uint16_t) (sign | (abs > 0x7f800000u ? 0x7e00u : 0x7c00u));
    }
    if (abs < 0x38800000u) { /* below 2^-14: subnormal; adding 0.5 leaves the rounded integer in the low bits */
        const float magic = tqi_bits_float(abs) + 0.5f;
        return (uint16_t) (sign | (tqi_float_bits(magic) - 0x3f000000u));
    }
    const uint32_t odd = (abs >> 13) & 1u;
    return (uint16_t) (sign | ((abs - 0x38000000u + 0xfffu + odd) >> 13));
}

/* e of value i, from a trellis block's words. */
TQI_INLINE uint32_t tqi_trellis_e(int bits, const uint32_t * words, int i) {
    uint32_t e = bits == 2 ? words[1] >> i & 1u : words[1 + i % 2] >> (i & ~1) & 3u;
    for (int k = 3; k < TQI_MAX_WORDS && k < bits; ++k) {
        e |= (words[k] >> i & 1u) << (k - 1);
    }
    return e;
}

/* Puts it there; its bits were zeros. */
TQI_INLINE void tqi_trellis_put_e(int bits, uint32_t e, int i, uint32_t * words) {
    if (bits == 2) {
        words[1] |= e << i;
    } else {
        words[1 + i % 2] |= (e & 3u) << (i & ~1);
    }
    for (int k = 3; k < TQI_MAX_WORDS && k < bits; ++k) {
        words[k] |= (e >> (k - 1) & 1u) << i;
    }
}

/* NaN -> 0, magnitudes above the largest f16 -> the largest f16. */
TQI_INLINE float tqi_sanitize(float x) {
    if (!(x == x)) {
        return 0.0f;
    }
    return x > TQI_F16_MAX ? TQI_F16_MAX : x < -TQI_F16_MAX ? -TQI_F16_MAX : x;
}

/* The scale of a block as decoders use it: not finite -> 0. */
TQI_INLINE float tqi_block_scale(const uint8_t * block) {
    const uint16_t h = tqi_load_u16(block);
    return (h & 0x7c00u) == 0x7c00u ? 0.0f : tqi_f16_to_f32(h);
}

#endif
