/* tqgguf.h: the public C interface of libtqgguf: the block formats (PQO and trellis), their encoders and decoders,
 * attention over a compressed KV cache, and the stand-alone cache object.
 *
 * Conventions. Functions that can fail return 0 or a negative tq_status; tq_last_error() then holds a sentence for the
 * calling thread. Arrays are row-major and named with their shape, innermost dimension last. Inputs come first, outputs
 * last. Nothing here keeps a pointer it was given, except a tq_cache its own memory.
 *
 * The region between the two "cffi" lines is plain declarations only: Python's cffi reads it as it stands. / */
#ifndef TQGGUF_H
#define TQGGUF_H

#include <stddef.h>
#include <stdint.h>

/* Raised by one with every incompatible change of this header; tq_abi_version() returns the library's. */
#define TQ_ABI_VERSION 3

/* Values per block, of one head. */
#define TQ_BLOCK 32

/* The largest head and the most heads (and streams) that attention and tq_cache take. */
#define TQ_MAX_HEAD_DIM 16384
#define TQ_MAX_HEADS 16384

#ifdef __cplusplus
extern "C" {
#endif
#if !defined(_WIN32)
#    pragma GCC visibility push(default)
#endif

/* cffi: begin */

typedef enum tq_status {
    TQ_OK = 0,
    TQ_E_ARGUMENT = -1,   /* a value out of its range, a wrong count, a null pointer */
    TQ_E_MEMORY = -2,     /* an allocation failed; nothing was changed */
    TQ_E_UNSUPPORTED = -3 /* right in itself, but not on this machine or in this build */
} tq_status;

/* Storage types. The numbers are ggml's for the types ggml has, and for those of tqgguf the ones that the patch series
 * registers in ggml. Saved sessions contain them, so they never change. The trellis types of 3 and 4 bits take the bytes of
 * the PQO types and make a quarter less squared error; encoding takes several times as long. */
typedef enum tq_type {
    TQ_TYPE_F32 = 0,
    TQ_TYPE_F16 = 1,
    TQ_TYPE_PQO3 = 300, /* 14 bytes per 32 values, 3.5 bits per value */
    TQ_TYPE_PQO4 = 301, /* 18 bytes per 32 values, 4.5 bits per value */
    TQ_TYPE_PQT3 = 302, /* trellis, 14 bytes per 32 values */
    TQ_TYPE_PQT4 = 303, /* trellis, 18 bytes per 32 values */
    TQ_TYPE_PQT2 = 304, /* trellis, 10 bytes per 32 values, 2.5 bits per value */
    TQ_TYPE_PQT5 = 305  /* trellis, 22 bytes per 32 values, 5.5 bits per value */
} tq_type;

/* How a block's scale is found, and with it which codebook its indices refer to. All modes write the same block layout;
 * a reader must know the mode. llama.cpp caches always use TQ_MODE_SEARCH, and the trellis types have no other. */
typedef enum tq_mode {
    TQ_MODE_SEARCH = 0,  /* signed codebook, scale searched for the least squared error */
    TQ_MODE_MAXNORM = 1, /* turboquant-rs MaxNorm: scale = largest magnitude / outermost centroid */
    TQ_MODE_L2NORM = 2   /* turboquant-rs L2Norm: scale = L2 norm, Lloyd-Max codebook of the unit sphere */
} tq_mode;

/* ---- Library ---- */

int tq_abi_version(void);
const char * tq_version(void);
/* The calling thread's last error message; "" if there was none. Valid until that thread's next failing call. */
const char * tq_last_error(void);

/* ---- Types and codebooks ---- */

/* Name of a type or mode ("pqo3", "search"), or NULL if there is none such. */
const char * tq_type_name(int type);
const char * tq_mode_name(int mode);
/* Bytes of n values of a type; 0 if the type is unknown, n is negative or not a multiple of the type's block. */
size_t tq_row_bytes(int type, int64_t n);
/* Copies a type's codebook for a mode: n_levels = 8 to 64 ascending levels, and its decision boundaries. PQO types
 * have n_levels - 1 of them (index = number of boundaries below the value), trellis types n_levels - 4 (boundary j is
 * midway between levels j and j + 4). Either pointer may be NULL. Returns n_levels or a negative status. */
int tq_codebook(int type, int mode, float * levels, float * boundaries);
/* The 32 signs (+1 or -1) of the block transform. */
void tq_signs(float * signs);

/* ---- Blocks ---- */

/* Encodes n values (a multiple of 32) into n/32 blocks. NaN encodes as 0, magnitudes above 65504 (infinities too) as
 * +-65504; a block of zeros, or of magnitudes too small for an f16 scale, gives scale 0 and index bytes 0. Output bytes
 * are the same on every kernel. Thread-safe. */
int tq_encode(int type, int mode, const float * x, int64_t n, void * blocks);
/* Decodes n values (a multiple of 32). Any byte string is valid input; a scale that is NaN or infinite decodes as 0. */
int tq_decode(int type, int mode, const void * blocks, int64_t n, float * x);
/* Dot product of n encoded values (a multiple of 32) with x: (n), computed in the transformed domain and as exactly as
 * attention. NaN if the arguments are not usable. */
float tq_dot(int type, int mode, const void * blocks, const float * x, int64_t n);

/* ---- Kernels ---- */

/* The instruction-set implementations built into this library, best first; the last one is "portable". */
int tq_kernel_count(void);
const char * tq_kernel_name(int i);
/* 1 if this machine can run kernel i, 0 if not, negative if i is out of range. */
int tq_kernel_supported(int i);
/* Selects a kernel by name for the whole process ("auto" or NULL: the best supported). A name that does not exist is
 * TQ_E_ARGUMENT, one that this machine cannot run is TQ_E_UNSUPPORTED; the message lists the usable ones. Not to be
 * called while other threads compute. The environment variable TQGGUF_KERNEL is read once, at first use, and must name
 * a usable kernel, too. */
int tq_kernel_force(const char * name);
const char * tq_kernel_active(void);

/* ---- Attention ---- */

/* Decodes one row of n values to f32; what ggml calls to_float. */
typedef void (*tq_row_decoder)(const void * row, float * x, int64_t n);

/* A precise tail: rows of f16 beside the blocks of K or V, for the tokens written last and for the first ones. Token t,
 * when it is written, also goes to row tq_tail_row(t), and owner of that row becomes t + 1. Attention reads the row of
 * a token that owns one instead of its blocks; whatever else may have changed a token's blocks must set owner to 0. */
typedef struct tq_attn_tail {
    const void * data;     /* f16 bits, head_dim to a head: as tq_tail_encode writes them, or of the values themselves
                            * beside a type with a decoder; NULL: there is no tail */
    const int32_t * owner; /* (n_stream, n_recent + n_first) by owner_stride_stream: 1 + the row's token, 0: nobody's */
    int64_t n_recent;      /* rows that tokens take in turn, at least 1 */
    int64_t n_first;       /* rows of the first n_first tokens, after those */
    int64_t n_own;         /* rows of the query rows' own tokens, after those; 0: they have none (see tq_tail_batch) */
    size_t stride_row;     /* strides are in bytes */
    size_t stride_head;
    size_t stride_stream;
    size_t owner_stride_stream;
} tq_attn_tail;

/* A batch of tokens that is written before it is read would take rows away which its first tokens still read. So it
 * reads a copy: the rows from before it, n_row = n_recent + n_first, then a row for each of its n_own tokens. Query row
 * i then reads what it would read if the tokens were written and read one by one. This fills what such a tail has in
 * the place of owner, 2 * (n_row + n_own) + n_own integers: owners; the first query row that no longer reads a row; and
 * the batch's tokens by ascending cell. owner: (n_row) from before the batch; cells: (n_own) the cells that its tokens
 * go to, counted from `base`, none twice. */
void tq_tail_batch(int64_t n_recent, int64_t n_first, const int32_t * owner, const int64_t * cells, int64_t base,
                   int64_t n_own, int32_t * index);
/* The row of token t >= 0 in a tail. */
int64_t tq_tail_row(int64_t n_recent, int64_t n_first, int64_t token);
/* What a tail holds of n values (a multiple of 32): transformed as blocks of that type and mode are, rounded to f16.
 * NaN counts as 0, magnitudes above 65504 as 65504, before the transform and after it. */
int tq_tail_encode(int type, int mode, const float * x, int64_t n, uint16_t * rows);
/* The n values that such a row holds. */
int tq_tail_decode(int type, int mode, const uint16_t * rows, int64_t n, float * x);

/* One operand of attention. Rows of head_dim values are contiguous; strides are in bytes and arbitrary. */
typedef struct tq_attn_operand {
    const void * data;
    int type;               /* a tq_type, or any number if decoder is given */
    int mode;               /* a tq_mode, for the types of tqgguf */
    tq_row_decoder decoder; /* NULL for the types of tq_type */
    int64_t head_dim;
    int64_t n_head;
    int64_t n_stream;
    size_t stride_token;
    size_t stride_head;
    size_t stride_stream;
    tq_attn_tail tail; /* of K or V in a type of tqgguf or with a decoder; zeros: none */
} tq_attn_operand;

/* out[row, h] = sum_t softmax_t(score[h, row, t]) v[t, h / (n_head / n_head_kv)], with score = softcap(scale * <q, k>)
 * + slope_h * mask, softcap(x) = c tanh(x / c) for c > 0, ALiBi slope_h from max_bias, and exp(sink_h) added to the
 * softmax's denominator. A row whose keys are all masked gives zeros. Relative L2 error of the output against exact
 * arithmetic on the decoded K and V, for normal q, K and V: 5e-5 at most, and 1e-3 with the kernel avx512, which sums
 * 16-bit integers where a KV head has few query vectors. There a score's error is 1e-4 of |q| |k|, so it shows more
 * where scores are large. NaN in q, or in a key that is seen, and scores beyond the range of f32 give NaN. */
typedef struct tq_attn {
    /* q: f32, (n_stream, n_head, n_q, head_dim_k) by strides; stride_token steps through the query rows */
    tq_attn_operand q;
    tq_attn_operand k;
    tq_attn_operand v;
    int64_t n_q;
    int64_t n_kv;
    /* f16 bits, (n_mask_stream, n_mask_head, n_q, n_kv) by byte strides; NULL: nothing is masked. Head h reads plane
     * h % n_mask_head, stream s plane s % n_mask_stream. */
    const uint16_t * mask;
    int64_t n_mask_head;
    int64_t n_mask_stream;
    size_t mask_stride_row;
    size_t mask_stride_head;
    size_t mask_stride_stream;
    const float * sinks; /* (n_head), or NULL */
    float scale;
    float max_bias; /* 0: no ALiBi */
    float softcap;  /* 0: none */
    /* f32, (n_stream, n_q, n_head, head_dim_v) by byte strides */
    float * out;
    size_t out_stride_row;
    size_t out_stride_head;
    size_t out_stride_stream;
} tq_attn;

/* Bytes of scratch (any alignment) that n_threads threads need together, or any smaller number of them; 0 and an error
 * message if the arguments are not usable. */
size_t tq_attn_work_bytes(const tq_attn * args, int n_threads);
/* Computes attention with n_threads threads: each calls phase 0 with its own thread index, all wait for each other,
 * then each calls phase 1. work is shared by all of them. */
int tq_attn_compute(const tq_attn * args, int phase, int thread, int n_threads, void * work);

/* ---- Stand-alone cache ---- */

typedef struct tq_cache tq_cache;

typedef struct tq_cache_config {
    int bits;     /* 3 or 4 */
    int head_dim; /* a multiple of 32 */
    int n_head_kv;
    int n_layer;
    int mode; /* a tq_mode */
} tq_cache_config;

/* A cache may be used by one thread at a time; different caches are independent. */
int tq_cache_new(const tq_cache_config * config, tq_cache ** cache);
void tq_cache_free(tq_cache * cache);
/* Appends n_tokens tokens to a layer. k, v: (n_tokens, n_head_kv, head_dim). If k_out and v_out are given they receive
 * (seq_len after the call, n_head_kv, head_dim): the given k and v if the layer was empty, otherwise the whole layer
 * decoded. */
int tq_cache_prefill(tq_cache * cache, int layer, const float * k, const float * v, int64_t n_tokens, float * k_out,
                     float * v_out);
/* Appends one token, k, v: (n_head_kv, head_dim), and attends to the whole layer: q, out: (n_head, head_dim), n_head a
 * multiple of n_head_kv. NaN or infinity in q is an error; nothing is appended then. */
int tq_cache_decode(tq_cache * cache, int layer, const float * k, const float * v, const float * q, int n_head,
                    float scale, float * out);
/* Decodes a whole layer, k_out, v_out: (seq_len, n_head_kv, head_dim); either may be NULL. */
int tq_cache_dequantize(tq_cache * cache, int layer, float * k_out, float * v_out);
/* Tokens in a layer, or a negative status. */
int64_t tq_cache_seq_len(const tq_cache * cache, int layer);
/* Keeps the first n_tokens tokens of a layer; an error if it has fewer. Memory is kept. */
int tq_cache_truncate(tq_cache * cache, int layer, int64_t n_tokens);
/* Empties every layer and gives its memory back. */
int tq_cache_reset(tq_cache * cache);
/* Bytes allocated for blocks, headroom included. */
size_t tq_cache_memory_usage(const tq_cache * cache);
/* The tokens for which a layer that must grow to n_tokens makes room: a quarter and 128 more. */
int64_t tq_cache_capacity(int64_t n_tokens);

/* cffi: end */

#if !defined(_WIN32)
#    pragma GCC visibility pop
#endif
#ifdef __cplusplus
}
#endif

#endif /* TQGGUF_H */
