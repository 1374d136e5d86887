/* tq_ggml_policy.h: what a KV cache about to be made stores each layer in, and whether its keys are centred.
 *
 * libllama has one type for K and one for V. A policy overrides them by layer: set it, make the context, clear it, all
 * on one thread (it is thread-local, and read by the constructor of the KV cache only). In libggml-base. */
#ifndef TQ_GGML_POLICY_H
#define TQ_GGML_POLICY_H

#include "tq_ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

/* cffi: begin */

struct tq_ggml_layer_policy {
    int32_t type_k; /* an enum ggml_type whose block divides the layer's head sizes: nothing here can check it */
    int32_t type_v;
    const float *
        k_mean;     /* (n_head_kv * head_dim_k), subtracted from every key before it is stored; NULL: nothing is */
    int64_t n_mean; /* values in k_mean */
};

/* layers: (n_layer), by layer number, with their means to be kept by the caller until the policy is cleared; NULL
 * clears. */
void tq_ggml_policy_set(const struct tq_ggml_layer_policy * layers, int32_t n_layer);

/* Whether the graph of a context that this thread makes from now on may rotate K and V: true, until it is called. For
 * one context only: LLAMA_ATTN_ROT_DISABLE, upstream's way to forbid it, holds for all contexts of the process. */
void tq_ggml_policy_set_rotation(bool allowed);

/* cffi: end */

/* The type of K or V of layer il, where the context asked for type. */
enum ggml_type tq_ggml_policy_type_k(enum ggml_type type, uint32_t il);
enum ggml_type tq_ggml_policy_type_v(enum ggml_type type, uint32_t il);

/* Whether the graph rotates K or V by its Hadamard matrix, which it does in all layers or in none: this thread allows
 * it, a layer gains from it, none holds a type of ours and no keys are centred (the means are those of keys that are
 * not rotated). */
bool tq_ggml_policy_rotates_k(enum ggml_type type);
bool tq_ggml_policy_rotates_v(enum ggml_type type);

/* A tensor in ctx for layer il's mean key of n values; NULL if its keys are not centred. It lies in the cache's buffer,
 * which llama.cpp clears now and then: once it is allocated, and after every clearing, its values must be set. */
struct ggml_tensor * tq_ggml_policy_new_k_mean(struct ggml_context * ctx, uint32_t il, int64_t n);
void tq_ggml_k_mean_set(struct ggml_tensor * mean, const float * values);

/* The mean key of a layer whose keys are centred, valid until the policy is cleared. */
const float * tq_ggml_policy_k_mean(uint32_t il);

/* The part of a mean that belongs to k, a view of the cache with the first k->ne[0] values of each head: (k->ne[0],
 * n_head_kv). NULL if mean is. */
static inline struct ggml_tensor * tq_ggml_k_mean_like(struct ggml_context * ctx, struct ggml_tensor * mean,
                                                       const struct ggml_tensor * k) {
    return mean ? ggml_view_2d(ctx, mean, k->ne[0], k->ne[1], ggml_nbytes(mean) / (size_t) k->ne[1], 0) : NULL;
}

#ifdef __cplusplus
}
#endif

#endif /* TQ_GGML_POLICY_H */
