/* tq_ggml_device.h: whether a device can work on the KV caches of ours that lie on it. ggml asks its backends node by
 * node: it ends the process where a node that writes a cache is refused, and runs one that reads it on the CPU, with a
 * copy of the cache for every token and no word about it. So libllama asks first, of the graphs it plans its memory
 * with. In libggml-base. */
#ifndef TQ_GGML_DEVICE_H
#define TQ_GGML_DEVICE_H

#include "tq_ggml.h"

#include "ggml-backend.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A sentence about the first node of the graph that writes or reads a tensor of ours, or one of another type with a tail,
 * on a device that does not support it; it is the calling thread's until the next call. NULL if there is none such. The graph is as it was built: not yet
 * split. Backends that know more than yes and no export tq_ggml_reason, a const char * (*)(void). */
const char * tq_ggml_graph_obstacle(struct ggml_cgraph * graph);

#ifdef __cplusplus
}
#endif

#endif /* TQ_GGML_DEVICE_H */
