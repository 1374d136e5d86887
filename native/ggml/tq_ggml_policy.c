/* tq_ggml_policy.c: see tq_ggml_policy.h. */
#include "tq_ggml_policy.h"

#include <stdio.h>
#include <stdlib.h>

static _Thread_local const struct tq_ggml_layer_policy * policy;
static _Thread_local int32_t n_policy;
static _Thread_local bool rotation_forbidden;

void tq_ggml_policy_set(const struct tq_ggml_layer_policy * layers, int32_t n_layer) {
    policy = layers;
    n_policy = layers ? n_layer : 0;
}

const struct tq_ggml_layer_policy * tq_ggml_policy_layer(uint32_t il) {
    return il < (uint32_t) n_policy ? &policy[il] : NULL;
}

enum ggml_type tq_ggml_policy_type_k(enum ggml_type type, uint32_t il) {
    const struct tq_ggml_layer_policy * layer = tq_ggml_policy_layer(il);
    return layer ? (enum ggml_type) layer->type_k : type;
}

enum ggml_type tq_ggml_policy_type_v(enum ggml_type type, uint32_t il) {
    const struct tq_ggml_layer_policy * layer = tq_ggml_policy_layer(il);
    return layer ? (enum ggml_type) layer->type_v : type;
}

const char * tq_ggml_policy_obstacle(uint32_t il, int64_t n_head_k, int64_t n_head_v, int64_t n_embd_k) {
    static _Thread_local char message[160];
    const struct tq_ggml_layer_policy * layer = tq_ggml_policy_layer(il);
    if (!layer) {
        return NULL;
    }
    if (n_head_k % ggml_blck_size((enum ggml_type) layer->type_k) != 0 ||
        n_head_v % ggml_blck_size((enum ggml_type) layer->type_v) != 0) {
        snprintf(message, sizeof(message), "layer %u: heads of %d and %d values are no whole blocks of %s and %s", il,
                 (int) n_head_k, (int) n_head_v, ggml_type_name((enum ggml_type) layer->type_k),
                 ggml_type_name((enum ggml_type) layer->type_v));
        return message;
    }
    if ((layer->k_mean && layer->n_mean != n_embd_k) || (layer->k_gain && layer->n_gain != n_embd_k)) {
        snprintf(message, sizeof(message), "layer %u: the calibration is for other keys than this model's of %d values",
                 il, (int) n_embd_k);
        return message;
    }
    return NULL;
}

void tq_ggml_policy_set_rotation(bool allowed) {
    rotation_forbidden = !allowed;
}

/* Stock quantized types gain from the rotation. The types of tqgguf rotate each block themselves. Only behind a gain,
 * which makes keys large where queries are, they gain as well: then the blocks of a head should be equal, too. */
static bool gains(enum ggml_type type, bool has_gain) {
    return ggml_is_quantized(type) && (has_gain || !tq_ggml_is_pqo(type));
}

static bool calibrates(void) {
    for (int32_t il = 0; il < n_policy; il++) {
        if (policy[il].k_mean || policy[il].k_gain) {
            return true;
        }
    }
    return false;
}

/* type: of every layer, where there is no policy */
static bool rotates(enum ggml_type type, bool is_k) {
    bool any = n_policy == 0 && gains(type, false);
    for (int32_t il = 0; il < n_policy; il++) {
        const enum ggml_type of_il = (enum ggml_type)(is_k ? policy[il].type_k : policy[il].type_v);
        if (tq_ggml_is_pqo(of_il)) {
            return false;
        }
        any |= gains(of_il, false);
    }
    return any && !rotation_forbidden && !(is_k && calibrates());
}

bool tq_ggml_policy_rotates_k(enum ggml_type type) {
    return rotates(type, true);
}

bool tq_ggml_policy_rotates_v(enum ggml_type type) {
    return rotates(type, false);
}

bool tq_ggml_policy_rotates_layer(uint32_t il, int64_t head_dim) {
    const char * disabled = getenv("LLAMA_ATTN_ROT_DISABLE"); /* read as llama.cpp reads it */
    const struct tq_ggml_layer_policy * layer = tq_ggml_policy_layer(il);
    return layer && calibrates() && !rotation_forbidden && !(disabled && atoi(disabled)) && head_dim % 64 == 0 &&
           gains((enum ggml_type) layer->type_k, layer->k_gain != NULL);
}
