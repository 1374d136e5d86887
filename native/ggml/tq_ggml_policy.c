/* tq_ggml_policy.c: see tq_ggml_policy.h. */
#include "tq_ggml_policy.h"

#include "ggml-backend.h"

static _Thread_local const struct tq_ggml_layer_policy * policy;
static _Thread_local int32_t n_policy;
static _Thread_local bool rotation_forbidden;

void tq_ggml_policy_set(const struct tq_ggml_layer_policy * layers, int32_t n_layer) {
    policy = layers;
    n_policy = layers ? n_layer : 0;
}

static const struct tq_ggml_layer_policy * of_layer(uint32_t il) {
    return il < (uint32_t) n_policy ? &policy[il] : NULL;
}

enum ggml_type tq_ggml_policy_type_k(enum ggml_type type, uint32_t il) {
    const struct tq_ggml_layer_policy * layer = of_layer(il);
    return layer ? (enum ggml_type) layer->type_k : type;
}

enum ggml_type tq_ggml_policy_type_v(enum ggml_type type, uint32_t il) {
    const struct tq_ggml_layer_policy * layer = of_layer(il);
    return layer ? (enum ggml_type) layer->type_v : type;
}

void tq_ggml_policy_set_rotation(bool allowed) {
    rotation_forbidden = !allowed;
}

/* Stock quantized types gain from the rotation. The types of tqgguf rotate each block themselves, and a second Hadamard
 * matrix would undo most of the first. */
static bool gains(enum ggml_type type) {
    return ggml_is_quantized(type) && !tq_ggml_is_pqo(type);
}

/* type: of every layer, where there is no policy */
static bool rotates(enum ggml_type type, bool is_k) {
    bool any = n_policy == 0 && gains(type);
    for (int32_t il = 0; il < n_policy; il++) {
        const enum ggml_type of_il = (enum ggml_type)(is_k ? policy[il].type_k : policy[il].type_v);
        if (tq_ggml_is_pqo(of_il) || (is_k && policy[il].k_mean)) {
            return false;
        }
        any |= gains(of_il);
    }
    return any && !rotation_forbidden;
}

bool tq_ggml_policy_rotates_k(enum ggml_type type) {
    return rotates(type, true);
}

bool tq_ggml_policy_rotates_v(enum ggml_type type) {
    return rotates(type, false);
}

struct ggml_tensor * tq_ggml_policy_new_k_mean(struct ggml_context * ctx, uint32_t il, int64_t n) {
    const struct tq_ggml_layer_policy * layer = of_layer(il);
    if (!layer || !layer->k_mean) {
        return NULL;
    }
    GGML_ASSERT(layer->n_mean == n && "the policy's mean key has another size than the model's keys");
    return ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n);
}

void tq_ggml_k_mean_set(struct ggml_tensor * mean, const float * values) {
    if (mean && mean->data) {
        ggml_backend_tensor_set(mean, values, 0, ggml_nbytes(mean));
    }
}

const float * tq_ggml_policy_k_mean(uint32_t il) {
    return of_layer(il)->k_mean;
}
