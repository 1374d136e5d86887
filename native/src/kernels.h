/* kernels.h: what one instruction set implements. portable.c is the truth; the others must give the same bytes
 * from encode and the same values from decode, and agree within rounding in the attention steps. */
#ifndef TQI_KERNELS_H
#define TQI_KERNELS_H

#include "codebook.h"

#include <stddef.h>

#define TQI_MAX_FUSED 8 /* query vectors that scores and accumulate take at once */
#define TQI_AHEAD 64    /* rows; the next tile's, see attention.c */
#define TQI_LINE 64     /* bytes of a cache line */
#define TQI_LANES 16    /* gemm's n_col and softmax_columns' n_col are multiples of this */
#define TQI_QUERY_FLOATS(n_blocks) ((size_t) ((n_blocks) + 3) / 4 * 288) /* room for a query vector, see load_query */

/* Attention's steps for tiles of at most TQI_AHEAD rows and many query vectors, which are the columns of q: (dim, n_col)
 * and o: (dim, n_col); n_col is a multiple of TQI_LANES. */
typedef struct {
    /* queries <- q, as scores takes it: (n_blocks * TQI_TILE_QUERY, n_col) */
    void (*load_queries)(const tqi_codec * codec, const float * q, int n_blocks, int n_col, float * queries);
    /* s[t, j] = <k[t], q[j]>; s: (n_tok, n_col), with room for TQI_AHEAD rows */
    void (*scores)(const tqi_codec * codec, const uint8_t * k, size_t stride, int n_tok, const float * queries,
                   int n_blocks, int n_col, float * s);
    /* o[, j] = factor[j] o[, j] + sum_t p[t, j] v[t]; p: (n_tok, n_col) */
    void (*accumulate)(const tqi_codec * codec, const uint8_t * v, size_t stride, int n_tok, const float * p,
                       const float * factor, int n_blocks, int n_col, float * o);
} tqi_tiles;

#define TQI_TILE_QUERY (TQ_BLOCK / 2 + 1) /* floats of a column and block */

/* What differs between the PQO types and the trellis types. */
typedef struct {
    /* blocks <- n_blocks blocks of x, in the codec's mode */
    void (*encode)(const tqi_codec * codec, const float * x, int64_t n_blocks, uint8_t * blocks);
    /* y <- scale * codebook value: a decode that stays in the transformed domain */
    void (*unpack)(const tqi_codec * codec, const uint8_t * blocks, int64_t n_blocks, float * y);

    /* query <- q: (dim), transformed, as scores takes it: what can be done once for all keys; (TQI_QUERY_FLOATS) */
    void (*load_query)(const tqi_codec * codec, const float * q, int n_blocks, float * query);
    /* scores and accumulate prefetch the rows TQI_AHEAD further on. With keys in memory rather than in a cache this
     * decides their speed. The prefetches come in bursts: spread over the loop they would keep too few cache misses
     * under way.
     *
     * s[i, t] = <k[t], q[i]> for i < n_q <= TQI_MAX_FUSED; k: n_tok <= TQI_AHEAD rows, stride bytes apart; query: (n_q,
     * TQI_QUERY_FLOATS), from load_query; s: (n_q, ld) */
    void (*scores)(const tqi_codec * codec, const uint8_t * k, size_t stride, int n_tok, const float * query, int n_q,
                   int n_blocks, float * s, int ld);
    /* o[i] += sum_t p[i, t] v[t]; p: (n_q, ld), o: (n_q, dim), transformed */
    void (*accumulate)(const tqi_codec * codec, const uint8_t * v, size_t stride, int n_tok, const float * p, int ld,
                       int n_q, int n_blocks, float * o);
    const tqi_tiles * tiles; /* NULL: tiles are decoded to f32 and multiplied by gemm */
} tqi_steps;

typedef struct {
    const char * name;
    int (*supported)(void);
    const tqi_steps * pqo;
    const tqi_steps * trellis;

    /* y <- x: (n), f16 bits to f32 */
    void (*widen)(const uint16_t * x, int64_t n, float * y);
    /* y <- x: (n), f32 to f16 bits, nearest even, magnitudes above the largest f16 to the largest; n: whole blocks, no
     * NaN */
    void (*narrow)(const float * x, int64_t n, uint16_t * y);
    /* In place, over n_blocks blocks. */
    void (*transform)(tqi_sign_order order, float * y, int64_t n_blocks);
    /* scores and accumulate for rows of f16 bits: (n_tok, dim) by stride */
    void (*scores_f16)(const uint8_t * k, size_t stride, int n_tok, const float * q, int n_q, int dim, float * s,
                       int ld);
    void (*accumulate_f16)(const uint8_t * v, size_t stride, int n_tok, const float * p, int ld, int n_q, int dim,
                           float * o);
    /* Online softmax over a row of n scores: updates max and sum, s becomes exp(s - max); returns what earlier results
     * must be multiplied by. A row that has seen no key yet (max -infinity) gives zeros. s has room for n rounded up to
     * a multiple of TQI_LANES; what stands there is overwritten. */
    float (*softmax_row)(float * s, int n, float * max, float * sum);

    /* c[r, j] (+)= sum_k a[r * a_row + k * a_k] b[k, j]; b: (n_k, n_col), c: (n_row, n_col) */
    void (*gemm)(const float * a, int a_row, int a_k, const float * b, int n_row, int n_k, int n_col, int add,
                 float * c);
    /* The same down each column of s: (n_row, n_col); max, sum, factor: (n_col). */
    void (*softmax_columns)(float * s, int n_row, int n_col, float * max, float * sum, float * factor);
} tqi_kernels;

static inline const tqi_steps * tqi_steps_of(const tqi_kernels * kernel, const tqi_codec * codec) {
    return codec->trellis ? kernel->trellis : kernel->pqo;
}

/* In place, over n_blocks blocks. */
static inline void tqi_inverse_transform_blocks(const tqi_kernels * kernel, const tqi_codec * codec, float * y,
                                                int64_t n_blocks) {
    kernel->transform(tqi_inverse_of(codec->signs), y, n_blocks);
}

/* x <- the values of n_blocks blocks */
static inline void tqi_decode(const tqi_kernels * kernel, const tqi_codec * codec, const uint8_t * blocks,
                              int64_t n_blocks, float * x) {
    tqi_steps_of(kernel, codec)->unpack(codec, blocks, n_blocks, x);
    tqi_inverse_transform_blocks(kernel, codec, x, n_blocks);
}

/* Calls f(bits, ...), an inline function, with bits as a constant: 3 or 4, the PQO types; 2 to 5, the trellis types. */
#define TQI_BY_BITS(f, bits, ...)                                                                                      \
    if ((bits) == 3) {                                                                                                 \
        f(3, __VA_ARGS__);                                                                                             \
    } else {                                                                                                           \
        f(4, __VA_ARGS__);                                                                                             \
    }

#define TQI_BY_TRELLIS_BITS(f, bits, ...)                                                                              \
    if ((bits) == 2) {                                                                                                 \
        f(2, __VA_ARGS__);                                                                                             \
    } else if ((bits) == 5) {                                                                                          \
        f(5, __VA_ARGS__);                                                                                             \
    } else {                                                                                                           \
        TQI_BY_BITS(f, bits, __VA_ARGS__)                                                                              \
    }

/* Calls f(bits, n_q, ...), an inline function, with both as constants. */
#define TQI_CASE(f, bits, n, ...)                                                                                      \
    case n:                                                                                                            \
        f(bits, n, __VA_ARGS__);                                                                                       \
        break;
#define TQI_BY_N_Q(f, bits, n_q, ...)                                                                                  \
    switch (n_q) {                                                                                                     \
        TQI_CASE(f, bits, 1, __VA_ARGS__)                                                                              \
        TQI_CASE(f, bits, 2, __VA_ARGS__)                                                                              \
        TQI_CASE(f, bits, 3, __VA_ARGS__)                                                                              \
        TQI_CASE(f, bits, 4, __VA_ARGS__)                                                                              \
        TQI_CASE(f, bits, 5, __VA_ARGS__)                                                                              \
        TQI_CASE(f, bits, 6, __VA_ARGS__)                                                                              \
        TQI_CASE(f, bits, 7, __VA_ARGS__)                                                                              \
        default:                                                                                                       \
            f(bits, 8, __VA_ARGS__);                                                                                   \
    }

/* Asks for a row's cache lines; any address is harmless. Always inline: GCC takes a function that only prefetches for
 * one without effect, and drops calls of it. */
static inline __attribute__((always_inline)) void tqi_prefetch(const uint8_t * row, size_t bytes) {
    for (size_t at = 0; at < bytes; at += TQI_LINE) {
        __builtin_prefetch(row + at, 0, 2);
    }
}

/* Those that the build has: TQI_HAVE_AVX2 and so on. */
extern const tqi_kernels tqi_kernels_portable, tqi_kernels_avx2, tqi_kernels_avx512, tqi_kernels_neon,
    tqi_kernels_dotprod, tqi_kernels_i8mm;
extern const tqi_steps tqi_trellis_avx2, tqi_trellis_avx512, tqi_trellis_neon, tqi_pqo_dotprod, tqi_trellis_dotprod,
    tqi_pqo_i8mm, tqi_trellis_i8mm;
extern const tqi_tiles tqi_pqo_tiles_i8mm, tqi_trellis_tiles_i8mm;

/* What the kernels of ARM64 share. */
void tqi_pqo_encode_neon(const tqi_codec * codec, const float * x, int64_t n_blocks, uint8_t * blocks);
void tqi_pqo_unpack_neon(const tqi_codec * codec, const uint8_t * blocks, int64_t n_blocks, float * y);
void tqi_trellis_encode_neon(const tqi_codec * codec, const float * x, int64_t n_blocks, uint8_t * blocks);
void tqi_trellis_unpack_neon(const tqi_codec * codec, const uint8_t * blocks, int64_t n_blocks, float * y);

/* The list of an instruction set's kernels, which its file has by these names. */
#define TQI_KERNELS(isa, pqo_tiles, trellis_steps)                                                                     \
    static const tqi_steps pqo = { encode, unpack, load_query, scores, accumulate, pqo_tiles };                        \
    TQI_KERNELS_OF(isa, supported, &pqo, trellis_steps)

#define TQI_KERNELS_OF(isa, is_supported, pqo_steps, trellis_steps)                                                    \
    const tqi_kernels tqi_kernels_##isa = {                                                                            \
        .name = #isa,                                                                                                  \
        .supported = is_supported,                                                                                     \
        .pqo = pqo_steps,                                                                                              \
        .trellis = trellis_steps,                                                                                      \
        .widen = widen,                                                                                                \
        .narrow = narrow,                                                                                              \
        .transform = transform,                                                                                        \
        .scores_f16 = scores_f16,                                                                                      \
        .accumulate_f16 = accumulate_f16,                                                                              \
        .softmax_row = softmax_row,                                                                                    \
        .gemm = gemm,                                                                                                  \
        .softmax_columns = softmax_columns,                                                                            \
    }

/* The kernel in force; never NULL. */
const tqi_kernels * tqi_active(void);

#endif
