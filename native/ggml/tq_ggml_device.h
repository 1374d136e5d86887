/* tq_ggml_device.h: whether a device can work on a KV cache of ours. ggml asks its backends node by node: it ends the process where
 * a node that writes the cache is refused, and runs one that reads it on the CPU, with a copy of the cache for every token and no
 * word about it. So the cache asks first. In libggml-base. */
#ifndef TQ_GGML_DEVICE_H
#define TQ_GGML_DEVICE_H

#include "tq_ggml.h"

#include "ggml-backend.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Why dev cannot write and read this layer's cache, a sentence that is the calling thread's until the next call; NULL if it can,
 * if it is the CPU, or if no type is ours. k, v: the cache's tensors, (n_embd_gqa, kv_size, n_stream), with their tails; v is
 * NULL where V is a part of K (MLA). Backends that know more than yes and no export tq_ggml_reason (const char * (void)). */
const char * tq_ggml_device_obstacle(ggml_backend_dev_t dev, struct ggml_tensor * k, struct ggml_tensor * v, int64_t head_dim_k,
                                     int64_t head_dim_v, int64_t n_head, bool flash_attn);

#ifdef __cplusplus
}
#endif

#endif /* TQ_GGML_DEVICE_H */
