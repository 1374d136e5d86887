/* tq_ggml_policy.h: what a KV cache about to be made stores each layer in, and how its keys are calibrated.
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
    const float * k_mean; /* (n_head_kv, head_dim_k), subtracted from every key before it is stored; NULL: nothing is */
    const float * k_gain; /* (n_head_kv, head_dim_k), by which keys less their mean are multiplied; NULL: by nothing */
    int64_t n_mean;       /* values in k_mean */
    int64_t n_gain;       /* values in k_gain */
};

/* layers: (n_layer), by layer number; the caller keeps their means and gains until the policy is cleared. NULL clears.
 */
void tq_ggml_policy_set(const struct tq_ggml_layer_policy * layers, int32_t n_layer);

/* Whether the graph of a context that this thread makes from now on may rotate K and V: true, until it is called. For
 * one context only: LLAMA_ATTN_ROT_DISABLE, upstream's way to forbid it, holds for all contexts of the process. */
void tq_ggml_policy_set_rotation(bool allowed);

/* cffi: end */

/* The type of K or V of layer il, where the context asked for type. */
enum ggml_type tq_ggml_policy_type_k(enum ggml_type type, uint32_t il);
enum ggml_type tq_ggml_policy_type_v(enum ggml_type type, uint32_t il);

/* Why layer il cannot have what the policy has for it: a sentence, valid until the thread's next call; NULL if it can.
 * n_head_k, n_head_v: values of a head; n_embd_k: of all heads of K. */
const char * tq_ggml_policy_obstacle(uint32_t il, int64_t n_head_k, int64_t n_head_v, int64_t n_embd_k);

/* Whether llama.cpp's graph rotates K or V by its Hadamard matrix, which it does in all layers or in none: this thread
 * allows it, a layer gains from it, none holds a type of ours, and, for K, the policy calibrates no layer. */
bool tq_ggml_policy_rotates_k(enum ggml_type type);
bool tq_ggml_policy_rotates_v(enum ggml_type type);

/* Whether the keys of layer il are rotated behind their calibration (tq_ggml_calibration.h): the policy calibrates a
 * layer, so that llama.cpp rotates no keys, this thread and LLAMA_ATTN_ROT_DISABLE allow it, and this layer gains. */
bool tq_ggml_policy_rotates_layer(uint32_t il, int64_t head_dim);

/* What the policy has for layer il; NULL if there is none. Valid until the policy is cleared. */
const struct tq_ggml_layer_policy * tq_ggml_policy_layer(uint32_t il);

#ifdef __cplusplus
}
#endif

#endif /* TQ_GGML_POLICY_H */
