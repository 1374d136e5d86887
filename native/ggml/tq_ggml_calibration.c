/* tq_ggml_calibration.c: see tq_ggml_calibration.h. */
#include "tq_ggml_calibration.h"

#include "tq_ggml_policy.h"
#include "tq_ggml_tail.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- The companions ---- */

/* il: noted in the tensor for tq_ggml_calibration_set */
static struct ggml_tensor * new_companion(struct ggml_context * ctx, const struct ggml_tensor * k, const char * what,
                                          uint32_t il, int64_t head_dim, int64_t n_values) {
    GGML_ASSERT(n_values == k->ne[0] && "the policy's calibration has another size than the model's keys");
    struct ggml_tensor * t = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, head_dim, n_values / head_dim);
    ggml_format_name(t, "%s_%s", ggml_get_name(k), what);
    t->op_params[0] = (int32_t) il;
    return t;
}

/* One for all layers of a head size: the matrix of 256 has 256 KiB. It rotates all values of a head, or mixes its blocks
 * of so many values, which types of ours rotate themselves. Noted in the tensor: their number. */
static struct ggml_tensor * rotation(struct ggml_context * ctx, int64_t head_dim, int64_t n_block) {
    const int64_t n = head_dim & -head_dim; /* the largest power of two that divides it, as llama.cpp has it */
    char name[64];
    snprintf(name, sizeof(name), "cache_k_rotation_%d_%d", (int) n, (int) n_block);
    struct ggml_tensor * t = ggml_get_tensor(ctx, name);
    if (!t) {
        t = ggml_set_name(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n, n), name);
        t->op_params[0] = (int32_t) n_block;
    }
    return t;
}

void tq_ggml_calibration_new(struct ggml_context * ctx, struct ggml_tensor * k, uint32_t il, int64_t head_dim) {
    const struct tq_ggml_layer_policy * layer = k ? tq_ggml_policy_layer(il) : NULL;
    if (!layer) {
        return;
    }
    if (layer->k_mean) {
        k->src[TQ_GGML_K_MEAN] = new_companion(ctx, k, "mean", il, head_dim, layer->n_mean);
    }
    if (layer->k_gain) {
        k->src[TQ_GGML_K_GAIN] = new_companion(ctx, k, "gain", il, head_dim, layer->n_gain);
    }
    if (tq_ggml_policy_rotates_layer(il, head_dim)) {
        k->src[TQ_GGML_K_ROTATION] = rotation(ctx, head_dim, tq_ggml_is_pqo(k->type) ? TQ_GGML_BLOCK : 1);
    }
}

/* Sylvester's Hadamard matrix of values or of blocks, orthonormal, which is its own inverse. */
static void set_rotation(struct ggml_tensor * t) {
    const int64_t n = t->ne[0];
    const int64_t n_block = t->op_params[0];
    const float scale = 1.0f / sqrtf((float) (n / n_block));
    float * values = malloc(ggml_nbytes(t));
    GGML_ASSERT(values && "no memory for the rotation of keys");
    for (int64_t i = 0; i < n * n; i++) {
        const int64_t row = i / n;
        const int64_t column = i % n;
        int odd = 0;
        for (int64_t both = row / n_block & column / n_block; both; both &= both - 1) {
            odd = !odd;
        }
        values[i] = row % n_block != column % n_block ? 0.0f : odd ? -scale : scale;
    }
    ggml_backend_tensor_set(t, values, 0, ggml_nbytes(t));
    free(values);
}

void tq_ggml_calibration_set(struct ggml_context * ctx) {
    for (struct ggml_tensor * k = ggml_get_first_tensor(ctx); k; k = ggml_get_next_tensor(ctx, k)) {
        for (int i = TQ_GGML_K_MEAN; i <= TQ_GGML_K_ROTATION && k->op == GGML_OP_NONE; i++) {
            struct ggml_tensor * t = k->src[i];
            if (!t || !t->data) {
                continue;
            }
            if (i == TQ_GGML_K_ROTATION) {
                set_rotation(t);
                continue;
            }
            const struct tq_ggml_layer_policy * layer = tq_ggml_policy_layer((uint32_t) t->op_params[0]);
            ggml_backend_tensor_set(t, i == TQ_GGML_K_MEAN ? layer->k_mean : layer->k_gain, 0, ggml_nbytes(t));
        }
    }
}

/* Copies the companions in ctx to values, one behind the other, or from there; values: NULL copies nothing. Returns
 * their bytes. A matrix that layers share is among them once for each. */
static size_t copy(struct ggml_context * ctx, char * values, bool from_values) {
    size_t n = 0;
    for (struct ggml_tensor * k = ggml_get_first_tensor(ctx); k; k = ggml_get_next_tensor(ctx, k)) {
        for (int i = TQ_GGML_K_MEAN; i <= TQ_GGML_K_ROTATION && k->op == GGML_OP_NONE; i++) {
            struct ggml_tensor * t = k->src[i];
            if (!t || !t->data) {
                continue;
            }
            if (values && from_values) {
                ggml_backend_tensor_set(t, values + n, 0, ggml_nbytes(t));
            } else if (values) {
                ggml_backend_tensor_get(t, values + n, 0, ggml_nbytes(t));
            }
            n += ggml_nbytes(t);
        }
    }
    return n;
}

void tq_ggml_calibration_clear(struct ggml_context * ctx, ggml_backend_buffer_t buffer) {
    const size_t n = copy(ctx, NULL, false);
    char * kept = n ? malloc(n) : NULL;
    GGML_ASSERT((kept || n == 0) && "no memory for the calibration of keys");
    copy(ctx, kept, false);
    ggml_backend_buffer_clear(buffer, 0);
    copy(ctx, kept, true);
    free(kept);
}

uint64_t tq_ggml_calibration_sum(const struct ggml_tensor * k) {
    uint64_t sum = 0;
    uint64_t odd = 1;
    for (int i = TQ_GGML_K_MEAN; i <= TQ_GGML_K_GAIN; i++) {
        const struct ggml_tensor * t = tq_ggml_k_companion(k, i);
        if (!t || !t->data) {
            continue;
        }
        const int64_t n = ggml_nelements(t);
        uint32_t * bits = malloc((size_t) n * sizeof(*bits));
        GGML_ASSERT(bits && "no memory for the calibration of keys");
        ggml_backend_tensor_get(t, bits, 0, (size_t) n * sizeof(*bits));
        for (int64_t j = 0; j < n; j++, odd += 2) {
            sum += odd * bits[j];
        }
        free(bits);
    }
    return sum;
}

/* ---- The graph ---- */

/* The part of a mean or a gain that belongs to the first n values of each head. */
static struct ggml_tensor * part(struct ggml_context * ctx, struct ggml_tensor * t, int64_t n) {
    return t->ne[0] == n ? t : ggml_view_2d(ctx, t, n, t->ne[1], t->nb[1], 0);
}

/* As llama_mul_mat_hadamard of llama.cpp. What a backend makes of the hint is its own affair: it is a product of
 * matrices, too. */
static struct ggml_tensor * rotate(struct ggml_context * ctx, struct ggml_tensor * x, struct ggml_tensor * matrix) {
    const int64_t n = matrix->ne[0];
    x = ggml_is_contiguous(x) ? x : ggml_cont(ctx, x);
    struct ggml_tensor * rows = ggml_reshape_2d(ctx, x, n, ggml_nelements(x) / n);
    struct ggml_tensor * rotated = ggml_mul_mat(ctx, matrix, rows);
    const int hint = matrix->op_params[0] == 1 ? GGML_HINT_SRC0_IS_HADAMARD : TQ_GGML_HINT_MIX;
    ggml_mul_mat_set_hint(rotated, (enum ggml_op_hint) hint);
    return ggml_reshape_3d(ctx, rotated, x->ne[0], x->ne[1], x->ne[2]);
}

struct ggml_tensor * tq_ggml_k_calibrate(struct ggml_context * ctx, struct ggml_tensor * x,
                                         const struct ggml_tensor * k) {
    struct ggml_tensor * mean = tq_ggml_k_companion(k, TQ_GGML_K_MEAN);
    struct ggml_tensor * gain = tq_ggml_k_companion(k, TQ_GGML_K_GAIN);
    struct ggml_tensor * matrix = tq_ggml_k_companion(k, TQ_GGML_K_ROTATION);
    x = mean ? ggml_sub(ctx, x, part(ctx, mean, x->ne[0])) : x;
    x = gain ? ggml_mul(ctx, x, part(ctx, gain, x->ne[0])) : x;
    return matrix ? rotate(ctx, x, matrix) : x;
}

struct ggml_tensor * tq_ggml_k_load(struct ggml_context * ctx, struct ggml_tensor * k) {
    struct ggml_tensor * mean = tq_ggml_k_companion(k, TQ_GGML_K_MEAN);
    struct ggml_tensor * gain = tq_ggml_k_companion(k, TQ_GGML_K_GAIN);
    struct ggml_tensor * matrix = tq_ggml_k_companion(k, TQ_GGML_K_ROTATION);
    struct ggml_tensor * x = tq_ggml_tail_turn(ggml_cast(ctx, k, GGML_TYPE_F32));
    x = matrix ? rotate(ctx, x, matrix) : x;
    x = gain ? ggml_div(ctx, x, part(ctx, gain, x->ne[0])) : x;
    return mean ? ggml_add(ctx, x, part(ctx, mean, x->ne[0])) : x;
}

struct ggml_tensor * tq_ggml_k_store(struct ggml_context * ctx, struct ggml_tensor * x, struct ggml_tensor * k) {
    return tq_ggml_tail_turn(ggml_cpy(ctx, tq_ggml_k_calibrate(ctx, x, k), k));
}

struct ggml_tensor * tq_ggml_q_calibrate(struct ggml_context * ctx, struct ggml_tensor * q,
                                         const struct ggml_tensor * k) {
    struct ggml_tensor * gain = tq_ggml_k_companion(k, TQ_GGML_K_GAIN);
    struct ggml_tensor * matrix = tq_ggml_k_companion(k, TQ_GGML_K_ROTATION);
    if (gain) {
        const int64_t n_head = q->ne[1];
        const int64_t n_head_kv = gain->ne[1];
        const int64_t n_group = n_head / n_head_kv;
        struct ggml_tensor * groups = ggml_view_4d(ctx, q, q->ne[0], n_group, n_head_kv, q->ne[2], q->nb[1],
                                                   q->nb[1] * (size_t) n_group, q->nb[2], 0);
        gain = ggml_view_3d(ctx, gain, gain->ne[0], 1, n_head_kv, gain->nb[1], gain->nb[1], 0);
        q = ggml_reshape_3d(ctx, ggml_div(ctx, groups, gain), q->ne[0], n_head, q->ne[2]);
    }
    return matrix ? rotate(ctx, q, matrix) : q;
}

struct ggml_tensor * tq_ggml_k_turned(struct ggml_context * ctx, struct ggml_tensor * k) {
    if (!tq_ggml_k_companion(k, TQ_GGML_K_ROTATION)) {
        return k;
    }
    struct ggml_tensor * cache = k->view_src;
    const int64_t head_dim = cache->ne[0] / k->ne[1];
    return ggml_view_3d(ctx, cache, head_dim, k->ne[1], k->ne[2], ggml_row_size(cache->type, head_dim), k->nb[2], 0);
}
