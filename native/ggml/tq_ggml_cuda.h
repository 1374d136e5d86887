/* tq_ggml_cuda.h: our types on ggml's CUDA backend (libggml-cuda): what the patch of ggml-cuda.cu calls. Behind it are
 * the kernels of native/cuda, which libggml-cuda links: its own flags (-use_fast_math) would change the bytes that
 * encoders write.
 *
 * Nodes: SET_ROWS into ours from f32, f16, bf16; GET_ROWS from ours to f32; DUP, CPY, CONT between ours and f32, f16,
 * bf16, or two types of ours; FLASH_ATTN_EXT with K and V of ours, or one of them f16. Precise tails come along as on
 * the CPU. Everything is asynchronous on the stream, on the current device, and may be captured in a graph: sizes,
 * addresses and launches follow from the node alone. */
#ifndef TQ_GGML_CUDA_H
#define TQ_GGML_CUDA_H

#include "tq_ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Up to so many query vectors per KV head (rows times heads that share a KV head) the fused kernel reads the blocks, 16
 * vectors at a time. With more, K and V are decoded to f16 once and upstream's kernel reads them, which costs 2.5 to 3
 * passes of the fused one at 32k tokens by the reckoning in docs/cuda.md. No GPU has measured it. */
#define TQ_GGML_CUDA_FUSED_VECTORS 32

/* Upstream's attention, for nodes whose K and V are f16: whether a device has a kernel for a node, and the call of it
 * with upstream's backend context. */
struct tq_ggml_cuda_dense {
    int device;
    bool (*supported)(int device, const struct ggml_tensor * node);
    void (*compute)(void * context, struct ggml_tensor * node);
    void * context;
};

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)
/* The other vendors' builds of ggml-cuda's sources have no such kernels: their switches refuse our types, and this says
 * why. */
static inline bool tq_ggml_cuda_used(const struct ggml_tensor *) {
    return false;
}
static inline bool tq_ggml_cuda_supported(const struct ggml_tensor *) {
    return false;
}
static inline const char * tq_ggml_cuda_reason(void) {
    return "the kernels for this type are written for CUDA";
}
static inline size_t tq_ggml_cuda_alloc_bytes(const struct ggml_tensor *, const struct tq_ggml_cuda_dense *) {
    return 0;
}
static inline void tq_ggml_cuda_compute(struct ggml_tensor *, const struct tq_ggml_cuda_dense *, void *) {}
#else
/* Whether the node is one of the above, or of their kind with a type that is not: no kernel of upstream's may have
 * it. */
bool tq_ggml_cuda_used(const struct ggml_tensor * node);
/* Whether the current device can compute such a node. */
bool tq_ggml_cuda_supported(const struct ggml_tensor * node);
/* Why it could not the last node that the calling thread asked about. */
const char * tq_ggml_cuda_reason(void);
/* Bytes of device memory for the node's result and, behind it, for what compute needs besides: as upstream does it for
 * K and V that it converts, so that ggml plans this memory when a context is made. dense->compute is not used. */
size_t tq_ggml_cuda_alloc_bytes(const struct ggml_tensor * node, const struct tq_ggml_cuda_dense * dense);
void tq_ggml_cuda_compute(struct ggml_tensor * node, const struct tq_ggml_cuda_dense * dense, void * stream);
#endif

#ifdef __cplusplus
}
#endif

#endif /* TQ_GGML_CUDA_H */
