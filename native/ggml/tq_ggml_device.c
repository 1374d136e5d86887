/* tq_ggml_device.c: see tq_ggml_device.h. */
#include "tq_ggml_device.h"

#include "tq_ggml_tail.h"

#include <stdio.h>

static _Thread_local char message[512];

/* One node of each kind that libllama makes of a cache, for a single token and for many. */
#define TQ_MANY_TOKENS 512
#define TQ_MAX_NODES   16

/* The writing of n tokens into t. */
static struct ggml_tensor * write(struct ggml_context * ctx, struct ggml_tensor * t, int64_t n) {
    struct ggml_tensor * all    = ggml_reshape_2d(ctx, t, t->ne[0], t->ne[1] * t->ne[2]);
    struct ggml_tensor * values = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, t->ne[0], n);
    return tq_ggml_tail_set_rows(ggml_set_rows(ctx, all, values, ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n)));
}

/* t as attention sees it: (head_dim, kv_size, n_head_kv, n_stream). */
static struct ggml_tensor * heads(struct ggml_context * ctx, struct ggml_tensor * t, int64_t head_dim, int64_t stride, int64_t n_head) {
    return ggml_permute(ctx, ggml_view_4d(ctx, t, head_dim, n_head, t->ne[1], t->ne[2], ggml_row_size(t->type, stride), t->nb[1], t->nb[2], 0),
                        0, 2, 1, 3);
}

/* Fills nodes and returns how many; n_write of them write the cache. */
static int make_nodes(struct ggml_context * ctx, struct ggml_tensor * k, struct ggml_tensor * v, int64_t head_dim_k, int64_t head_dim_v,
                      int64_t n_head, bool flash_attn, struct ggml_tensor ** nodes) {
    const int64_t        n_head_kv = k->ne[0] / head_dim_k;
    struct ggml_tensor * k_heads   = heads(ctx, k, head_dim_k, head_dim_k, n_head_kv);
    struct ggml_tensor * v_heads   = v ? heads(ctx, v, head_dim_v, head_dim_v, n_head_kv) : heads(ctx, k, head_dim_v, head_dim_k, n_head_kv);
    int                  n         = 0;

    for (int64_t n_tokens = 1; n_tokens <= TQ_MANY_TOKENS; n_tokens += TQ_MANY_TOKENS - 1) {
        struct ggml_tensor * q    = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, head_dim_k, n_tokens, n_head, k->ne[2]);
        struct ggml_tensor * mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, k->ne[1], n_tokens, 1, k->ne[2]);
        nodes[n++] = tq_ggml_is_ours(k->type) ? write(ctx, k, n_tokens) : NULL;
        nodes[n++] = v && tq_ggml_is_ours(v->type) ? write(ctx, v, n_tokens) : NULL;
        nodes[n++] = flash_attn ? tq_ggml_tail_flash_attn(ggml_flash_attn_ext(ctx, q, k_heads, v_heads, mask, 1.0f, 0.0f, 0.0f))
                                : ggml_mul_mat(ctx, k_heads, q);
    }
    if (tq_ggml_is_ours(k->type)) { /* a context shift turns K */
        struct ggml_tensor * values = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, k->ne[0], k->ne[1] * k->ne[2]);
        struct ggml_tensor * all    = ggml_reshape_2d(ctx, k, k->ne[0], k->ne[1] * k->ne[2]);
        nodes[n++]                  = ggml_cpy(ctx, all, values);
        nodes[n++]                  = ggml_cpy(ctx, values, all);
    }
    return n;
}

/* What the device's backend says of the node it has just refused. */
static const char * reason_of(ggml_backend_dev_t dev, const struct ggml_tensor * node) {
    const char * (*reason)(void) = NULL;
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(dev);
    if (node->op == GGML_OP_MUL_MAT) {
        return "its attention needs flash_attn"; /* without it, K is a matrix to be multiplied with */
    }
    if (reg) {
        *(void **) &reason = ggml_backend_reg_get_proc_address(reg, "tq_ggml_reason");
    }
    return reason ? reason() : "its backend has no kernel for it";
}

const char * tq_ggml_device_obstacle(ggml_backend_dev_t dev, struct ggml_tensor * k, struct ggml_tensor * v, int64_t head_dim_k,
                                     int64_t head_dim_v, int64_t n_head, bool flash_attn) {
    if (!dev || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU || !(tq_ggml_is_ours(k->type) || (v && tq_ggml_is_ours(v->type)))) {
        return NULL;
    }
    const struct ggml_init_params params = { .mem_size = 64 * ggml_tensor_overhead(), .mem_buffer = NULL, .no_alloc = true };
    struct ggml_context *         ctx    = ggml_init(params);
    struct ggml_tensor *          nodes[TQ_MAX_NODES];
    const char *                  result = NULL;

    if (!ctx) {
        return "no memory to ask what the device supports";
    }
    const int n = make_nodes(ctx, k, v, head_dim_k, head_dim_v, n_head, flash_attn, nodes);
    for (int i = 0; i < n && !result; i++) {
        if (nodes[i] && !ggml_backend_dev_supports_op(dev, nodes[i])) {
            snprintf(message, sizeof(message), "%s cannot do %s on %s, a KV cache of %s (K) and %s (V): %s; keep it on the CPU (offload_kqv = "
                     "False, --no-kv-offload) or choose other types", ggml_backend_dev_name(dev), ggml_op_desc(nodes[i]), ggml_get_name(k),
                     ggml_type_name(k->type), ggml_type_name(v ? v->type : k->type), reason_of(dev, nodes[i]));
            result = message;
        }
    }
    ggml_free(ctx);
    return result;
}
