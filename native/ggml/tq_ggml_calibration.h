/* tq_ggml_calibration.h: keys are stored less a mean and times a gain: D (k - m), after RoPE.
 *
 * Softmax does not notice a mean, for it moves all scores of a query alike; and a query divided by D meets a key times
 * D in the score that it had without. Behind the transform an error is spread over a block, so the gain of a channel
 * says how much of the precision goes there.
 *
 * The K tensor of a layer gets companions in its buffer: mean and gain (head_dim_k, n_head_kv) f32, and the matrix by
 * which keys are rotated, if the policy calibrates and the layer's type gains from a rotation. The cache's tensor is a
 * leaf, so its sources are free: src[0] and src[1] are the tail's (tq_ggml_tail.h), src[2] to src[4] are these, and
 * every view of the cache knows them through view_src. So whatever writes keys by llama_kv_cache::cpy_k and reads them
 * by llm_graph_context::build_attn_mha is calibrated, on every backend. In libggml-base. */
#ifndef TQ_GGML_CALIBRATION_H
#define TQ_GGML_CALIBRATION_H

#include "ggml-backend.h"
#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

#define TQ_GGML_K_MEAN 2
#define TQ_GGML_K_GAIN 3
#define TQ_GGML_K_ROTATION 4

/* One of the companions of a K tensor of the cache, or of the K tensor that t is a view of; NULL if it has none. */
static inline struct ggml_tensor * tq_ggml_k_companion(const struct ggml_tensor * t, int i) {
    const struct ggml_tensor * cache = t->view_src ? t->view_src : t;
    return cache->op == GGML_OP_NONE ? cache->src[i] : NULL;
}

static inline bool tq_ggml_k_calibrated(const struct ggml_tensor * t) {
    return tq_ggml_k_companion(t, TQ_GGML_K_MEAN) || tq_ggml_k_companion(t, TQ_GGML_K_GAIN) ||
           tq_ggml_k_companion(t, TQ_GGML_K_ROTATION);
}

/* Gives k, the K tensor (head_dim * n_head_kv, kv_size, n_stream) of layer il, the companions in ctx that the policy of
 * this thread (tq_ggml_policy.h) has for it: three tensors at the most. */
void tq_ggml_calibration_new(struct ggml_context * ctx, struct ggml_tensor * k, uint32_t il, int64_t head_dim);

/* Writes the values of all companions in ctx, once they have memory, while the policy is still set. */
void tq_ggml_calibration_set(struct ggml_context * ctx);

/* Fills the buffer of the tensors in ctx with zeros, and keeps the companions in it. */
void tq_ggml_calibration_clear(struct ggml_context * ctx, ggml_backend_buffer_t buffer);

/* Keys x (n, n_head_kv, n_tokens), the first n values of each head, as k stores them. k: a tensor of the cache, or a
 * view of one. All values of a head are there if it is rotated (tq_ggml_k_turned). */
struct ggml_tensor * tq_ggml_k_calibrate(struct ggml_context * ctx, struct ggml_tensor * x,
                                         const struct ggml_tensor * k);

/* For a context shift: the keys of a view k of the cache in f32, as calibrate was given them, and the way back; both with
 * the tail's rows (tq_ggml_tail_turn). */
struct ggml_tensor * tq_ggml_k_load(struct ggml_context * ctx, struct ggml_tensor * k);
struct ggml_tensor * tq_ggml_k_store(struct ggml_context * ctx, struct ggml_tensor * x, struct ggml_tensor * k);

/* Queries q (head_dim, n_head, n_tokens) for keys as k stores them; n_head_kv divides n_head. */
struct ggml_tensor * tq_ggml_q_calibrate(struct ggml_context * ctx, struct ggml_tensor * q,
                                         const struct ggml_tensor * k);

/* The view of keys that a context shift must decode to turn k, a view (n_rot or more, n_head_kv, n_cells) of the cache:
 * k itself, or whole heads where they are rotated. */
struct ggml_tensor * tq_ggml_k_turned(struct ggml_context * ctx, struct ggml_tensor * k);

/* What the memory of k's mean and gain holds, as one number: the sum of (2 i + 1) times the bits of value i, modulo
 * 2^64, over the mean and then the gain. 0 if it has neither, or no memory. */
uint64_t tq_ggml_calibration_sum(const struct ggml_tensor * k);

#ifdef __cplusplus
}
#endif

#endif /* TQ_GGML_CALIBRATION_H */
