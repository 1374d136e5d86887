/* tq_ggml_device.c: see tq_ggml_device.h. */
#include "tq_ggml_device.h"

#include "tq_ggml_tail.h"

#include <stdio.h>

static _Thread_local char message[512];

static bool has_stock_tail(const struct ggml_tensor * t) {
    return !tq_ggml_is_pqo(t->type) && tq_ggml_tail_rows(t);
}

/* The device that a tensor of ours, or one with a tail, lies on; NULL if it is neither, has no memory, or the CPU can
 * reach it. */
static ggml_backend_dev_t device_of(const struct ggml_tensor * t) {
    if ((!tq_ggml_is_pqo(t->type) && !has_stock_tail(t)) || !t->buffer || ggml_backend_buffer_is_host(t->buffer)) {
        return NULL;
    }
    return ggml_backend_buft_get_device(ggml_backend_buffer_get_type(t->buffer));
}

static bool is_view(const struct ggml_tensor * node) {
    return node->op == GGML_OP_NONE || node->op == GGML_OP_VIEW || node->op == GGML_OP_RESHAPE ||
           node->op == GGML_OP_PERMUTE || node->op == GGML_OP_TRANSPOSE;
}

/* Whether a backend looks at the tail of a stock type: CUDA, patched, to refuse it; RPC to hand it on to a worker, which
 * Python asks. Others would do without it and say nothing. */
static bool knows_tails(ggml_backend_dev_t dev) {
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(dev);
    return reg && (ggml_backend_reg_get_proc_address(reg, "tq_ggml_reason") ||
                   ggml_backend_reg_get_proc_address(reg, "ggml_backend_rpc_add_server"));
}

/* What the device's backend says of the node it has just refused. */
static const char * reason_of(ggml_backend_dev_t dev, const struct ggml_tensor * node) {
    const char * (*reason)(void) = NULL;
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(dev);
    if (node->op == GGML_OP_MUL_MAT) {
        return "K and V of this type are read by flash attention only";
    }
    if (reg) {
        *(void **) &reason = ggml_backend_reg_get_proc_address(reg, "tq_ggml_reason");
    }
    return reason ? reason() : "its backend has no kernel for this type";
}

const char * tq_ggml_graph_obstacle(struct ggml_cgraph * graph) {
    for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
        const struct ggml_tensor * node = ggml_graph_node(graph, i);
        for (int j = 0; j < GGML_MAX_SRC && !is_view(node); j++) {
            const struct ggml_tensor * t =
                node->src[j] && node->src[j]->view_src ? node->src[j]->view_src : node->src[j];
            ggml_backend_dev_t dev = t ? device_of(t) : NULL;
            if (!dev) {
                continue;
            }
            char type[64];
            snprintf(type, sizeof(type), "%s%s", ggml_type_name(t->type),
                     has_stock_tail(t) ? " with a precise tail" : "");
            if (ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_META) {
                snprintf(message, sizeof(message),
                         "%s is of type %s, which is not cut into the devices' parts (split mode tensor); "
                         "choose split mode layer or another type",
                         ggml_get_name(t), type);
                return message;
            }
            const bool unknown = has_stock_tail(t) && !knows_tails(dev);
            if (unknown || !ggml_backend_dev_supports_op(dev, node)) {
                snprintf(message, sizeof(message),
                         "%s cannot do %s with %s, which is of type %s: %s; keep the KV cache on the CPU "
                         "(offload_kqv = False, --no-kv-offload) or choose other types",
                         ggml_backend_dev_name(dev), ggml_op_desc(node), ggml_get_name(t), type,
                         unknown ? "its backend knows no tail beside it" : reason_of(dev, node));
                return message;
            }
        }
    }
    return NULL;
}
