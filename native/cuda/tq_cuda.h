/* tq_cuda.h: launches of the CUDA kernels: raw device pointers, a stream, no ggml. Encode and decode of rows by
 * strides, the block transform, and decode attention over a compressed cache.
 *
 * Conventions are tqgguf.h's: 0 or a negative tq_status, and tq_cuda_last_error() then holds a sentence for the calling
 * thread. stream is a cudaStream_t; everything is asynchronous on it, on the calling thread's current device. Nothing
 * is allocated and no pointer is kept. Blocks of our types lie at even addresses, f32 values at multiples of four.
 *
 * tests/native build the same sources with a host compiler: the kernels then run on the CPU, thread by thread, on host
 * pointers (emulated/simt.h). tq_cuda_emulated() tells which library one has. */
#ifndef TQ_CUDA_H
#define TQ_CUDA_H

#include "tqgguf.h"

#if defined(TQ_CUDA_SHARED) && !defined(_WIN32)
#    define TQ_CUDA_API __attribute__((visibility("default")))
#else
#    define TQ_CUDA_API
#endif

/* ggml's numbers of what is none of tq_type's: sources and targets of rows, and q8_0 as K or V beside a type of
 * tqgguf's. */
#define TQ_CUDA_TYPE_Q8_0 8
#define TQ_CUDA_TYPE_BF16 30
#define TQ_CUDA_TYPE_I32 26
#define TQ_CUDA_TYPE_I64 27

/* The largest DV, and what K may take in shared memory: attention refuses what does not fit, and says so. */
#define TQ_CUDA_MAX_HEAD_DIM_V 512

/* Raised by one with every incompatible change of this header. tq_attn belongs to tqgguf.h, hence the other number. */
#define TQ_CUDA_ABI_VERSION 1

/* The most dimensions of a DLPack tensor made here. */
#define TQ_CUDA_MAX_DIMS 4

#ifdef __cplusplus
extern "C" {
#endif

/* 1000 TQ_ABI_VERSION + TQ_CUDA_ABI_VERSION, as the library was compiled. */
TQ_CUDA_API int tq_cuda_abi_version(void);

/* For C code that works with this library: records the sentence that tq_cuda_last_error() gives; returns status. */
TQ_CUDA_API int tq_cuda_fail(int status, const char * format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 2, 3)))
#endif
    ;

/* cffi: begin */

TQ_CUDA_API const char * tq_cuda_last_error(void);
TQ_CUDA_API int tq_cuda_emulated(void);

/* ---- Devices ---- */

typedef struct tq_cuda_device {
    char name[128];
    int cc; /* compute capability, 90 for 9.0 */
    int n_sm;
    size_t shared_per_block; /* the most that a block can ask for */
    size_t shared_per_sm;
    size_t total_bytes;
} tq_cuda_device;

/* Number of devices, or TQ_E_UNSUPPORTED with the driver's reason. */
TQ_CUDA_API int tq_cuda_device_count(void);
/* Describes device i; an error if no kernel of this build can run on it. Makes it current if that is not so. */
TQ_CUDA_API int tq_cuda_device_use(int i, tq_cuda_device * device);
/* Makes device i current for the calling thread and returns the one that was, or a negative status; i < 0 only asks.
 * Programs that use CUDA themselves see the current device, too: it must be put back. What becomes current gets a
 * context, some hundred MB on the device, if it has none. */
TQ_CUDA_API int tq_cuda_device_swap(int i);
/* The device whose memory data points into, or TQ_E_ARGUMENT. */
TQ_CUDA_API int tq_cuda_device_of(const void * data);

/* TQ_OK if the current device can run the kernels of this build. */
TQ_CUDA_API int tq_cuda_device_ready(void);

/* Device memory for callers without a runtime of their own. kind: 1 host to device, 2 device to host, 3 device to
 * device; copies wait for the stream unless kind is 3. */
TQ_CUDA_API int tq_cuda_alloc(size_t bytes, void ** data);
TQ_CUDA_API int tq_cuda_free(void * data);
TQ_CUDA_API int tq_cuda_copy(const void * from, size_t bytes, int kind, void * stream, void * to);
TQ_CUDA_API int tq_cuda_synchronize(void * stream);
/* What is launched on waiting from now on begins after what has been launched on other. */
TQ_CUDA_API int tq_cuda_stream_wait(void * waiting, void * other);

/* Memory that several owners share, allocated and freed in the order of a stream's work, so that nobody waits. The
 * stream must live as long. bytes may be 0. */
typedef struct tq_cuda_memory tq_cuda_memory;

TQ_CUDA_API int tq_cuda_memory_new(int device, size_t bytes, void * stream, tq_cuda_memory ** memory, void ** data);
/* Ends the caller's ownership; the last owner's end frees. Any thread. */
TQ_CUDA_API void tq_cuda_memory_free(tq_cuda_memory * memory);
/* Says that other streams use the memory: freeing it then waits for the device. */
TQ_CUDA_API void tq_cuda_memory_elsewhere(tq_cuda_memory * memory);

/* ---- DLPack ---- */

/* The structures of DLPack 1.x (github.com/dmlc/dlpack, dlpack.h), the versioned one and its predecessor. */
enum { TQ_DLPACK_CPU = 1, TQ_DLPACK_CUDA = 2, TQ_DLPACK_CUDA_MANAGED = 13, TQ_DLPACK_FLOAT = 2, TQ_DLPACK_BFLOAT = 4 };

typedef struct tq_dlpack_tensor {
    void * data;
    int32_t device_type;
    int32_t device_id;
    int32_t n_dims;
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
    int64_t * shape;
    int64_t * strides; /* in values; NULL: contiguous */
    uint64_t byte_offset;
} tq_dlpack_tensor;

typedef struct tq_dlpack_managed {
    tq_dlpack_tensor tensor;
    void * context;
    void (*deleter)(struct tq_dlpack_managed * self);
} tq_dlpack_managed;

typedef struct tq_dlpack_versioned {
    uint32_t major;
    uint32_t minor;
    void * context;
    void (*deleter)(struct tq_dlpack_versioned * self);
    uint64_t flags;
    tq_dlpack_tensor tensor;
} tq_dlpack_versioned;

/* A managed tensor over memory, of f32, f16 or bf16 in C order, which becomes an owner of it; NULL and a message if
 * there is none. It is the CPU's where the library is emulated. */
TQ_CUDA_API void * tq_cuda_memory_export(tq_cuda_memory * memory, int type, int n_dims, const int64_t * shape,
                                         int versioned);
/* What Python needs to make a capsule of one that deletes it without running Python code: the name, the destructor,
 * and, given once beforehand, the addresses of PyCapsule_IsValid and PyCapsule_GetPointer. */
TQ_CUDA_API void tq_cuda_capsule_api(void * is_valid, void * pointer);
TQ_CUDA_API const char * tq_cuda_capsule_name(int versioned);
TQ_CUDA_API void tq_cuda_capsule_free(void * capsule);

/* ---- Rows ---- */

/* A tensor: ne[0] is innermost. Of our types ne[0] is a multiple of 32 and nb[0] the bytes of a block. Values may have
 * any strides. mode is read for our types only. */
typedef struct tq_cuda_view {
    void * data;
    int type;
    int mode;
    int64_t ne[4];
    size_t nb[4];
} tq_cuda_view;

/* Row numbers: type i32 or i64; (ne[0], ne[1], ne[2]) of them, the last two repeated as often as needed. */
typedef struct tq_cuda_index {
    const void * data;
    int type;
    int64_t ne[3];
    size_t nb[3];
} tq_cuda_index;

/* Encodes src: f32, f16, bf16, or another type of ours, into dst, of our types: bytes equal to tq_encode's. Without
 * rows the two are the same sequence of values, whatever their shapes (ggml's CPY). With rows, row (i1, i2, i3) of src
 * goes to row rows[i1, i2 % ne[1], i3 % ne[2]] of (.., i2, i3) in dst (SET_ROWS); a number out of range writes
 * nothing. */
TQ_CUDA_API int tq_cuda_encode(const tq_cuda_view * src, const tq_cuda_index * rows, const tq_cuda_view * dst,
                               void * stream);
/* Decodes src, of our types, into dst: f32, f16 or bf16; f32 equals tq_decode's. With rows, row (i1, i2, i3) of dst
 * comes from row rows[..] of (.., i2, i3) in src (GET_ROWS); a number out of range gives zeros. transformed: leave out
 * the inverse transform, as attention does. */
TQ_CUDA_API int tq_cuda_decode(const tq_cuda_view * src, const tq_cuda_index * rows, int transformed,
                               const tq_cuda_view * dst, void * stream);
/* dst <- src: f32, f16 or bf16 both, or src q8_0; equal ne. */
TQ_CUDA_API int tq_cuda_convert(const tq_cuda_view * src, const tq_cuda_view * dst, void * stream);
/* The rows of a precise tail (tq_attn_tail in tqgguf.h) as they are written: all KV heads of a token are one row. */
typedef struct tq_cuda_tail {
    uint16_t * data;
    int32_t * owner;
    int64_t n_recent;
    int64_t n_first;
    int64_t n_cells; /* tokens that a stream has room for */
    int64_t n_stream;
    size_t stride_row;
    size_t stride_stream;
    size_t owner_stride_stream;
} tq_cuda_tail;

/* What SET_ROWS writes into a tail beside the blocks. Row i of src, f32, f16 or bf16, (n_values, n_rows), is token
 * rows[i] % n_cells of stream rows[i] / n_cells. Of several that share a row of the tail the last one stays, as if they
 * were written in their order; numbers out of range write nothing. The bytes equal tq_tail_encode's. */
TQ_CUDA_API int tq_cuda_tail_encode(const tq_cuda_view * src, const tq_cuda_index * rows, int mode,
                                    const tq_cuda_tail * tail, void * stream);
/* What a batch of tokens reads of a tail that they are written to afterwards (tq_tail_batch in tqgguf.h). tail: its
 * streams, from the batch's first one on. Rows: dst, f16, (n_values, n_row + n_own, n_stream), gets the tail's rows and
 * those of src, f32, f16 or bf16, (n_values, n_own * n_stream). Index: 2 (n_row + n_own) + n_own integers of each
 * stream, as many tokens of which go to cells rows[..] - base - stream * n_cells. */
TQ_CUDA_API int tq_cuda_tail_batch_rows(const tq_cuda_view * src, int mode, const tq_cuda_tail * tail,
                                        const tq_cuda_view * dst, void * stream);
TQ_CUDA_API int tq_cuda_tail_batch_index(const tq_cuda_tail * tail, const tq_cuda_index * rows, int64_t base,
                                         int32_t * index, size_t stride_stream, void * stream);
/* Where a token owns a row of x's tail, dst gets the values it stands for. dst: f32, f16 or bf16, (head_dim, n_head,
 * n_tokens, n_stream); everything else in it stays. */
TQ_CUDA_API int tq_cuda_tail_decode(const tq_attn_operand * x, const tq_cuda_view * dst, void * stream);
/* y <- the block transform of x, or its inverse, in the sign order of mode; f32, n a multiple of 32; x may be y. */
TQ_CUDA_API int tq_cuda_transform(const float * x, int64_t n, int mode, int inverse, float * y, void * stream);

/* ---- Attention ---- */

/* tq_attn as in tqgguf.h, with device pointers. K and V are of our types, or one of them f16 or q8_0
 * (TQ_CUDA_TYPE_Q8_0); decoder is NULL. Both head sizes are multiples of 32, DV at most 512. Tails of K and V have the
 * same numbers of rows; there is one if n_recent is not 0, and its n_own is 0 or n_q. Made for few query rows: n_q *
 * n_head / n_head_kv up to 16 vectors per KV head decode each block once, more of them every 16 once again. Relative L2
 * error of the output against exact arithmetic on the decoded values, for normal q, K, V: 2e-3 at most. */

/* TQ_OK, or TQ_E_UNSUPPORTED or TQ_E_ARGUMENT and the reason. Does not look at the pointers. */
TQ_CUDA_API int tq_cuda_attn_supported(const tq_attn * args);
/* Bytes of device scratch, 0 if none is needed; (size_t) -1 and a message if the arguments are not usable. The same for
 * the same shapes on the same device. */
TQ_CUDA_API size_t tq_cuda_attn_work_bytes(const tq_attn * args);
/* One to three launches. work: 16-byte aligned. Safe to capture in a graph. */
TQ_CUDA_API int tq_cuda_attn(const tq_attn * args, void * work, void * stream);

/* cffi: end */

#ifdef __cplusplus
}
#endif

#endif
