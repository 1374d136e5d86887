/* tq_ggml_tail.c: see tq_ggml_tail.h. */
#include "tq_ggml_tail.h"

#include "ggml-backend.h"
#include "tqgguf.h"

#include <stdlib.h>
#include <string.h>

static _Thread_local int32_t recent_of_ours;
static _Thread_local int32_t recent_of_stock;
static _Thread_local bool in_states;
static bool in_all_states;

void tq_ggml_tail_set(int32_t n_ours, int32_t n_stock) {
    recent_of_ours = n_ours;
    recent_of_stock = n_stock;
}

void tq_ggml_tail_in_states(bool held) {
    in_states = held;
}

void tq_ggml_tail_in_all_states(bool held) {
    in_all_states = held;
}

bool tq_ggml_tail_states(void) {
    return in_states || in_all_states;
}

void tq_ggml_tail_new(struct ggml_context * ctx, struct ggml_tensor * t, bool flash) {
    if (!t || !flash || ggml_blck_size(t->type) != TQ_GGML_BLOCK) {
        return;
    }
    const int32_t recent = tq_ggml_is_pqo(t->type) ? recent_of_ours : recent_of_stock;
    if (recent <= 0) {
        return;
    }
    const int64_t n_recent = recent < t->ne[1] ? recent : t->ne[1];
    const int64_t n_row = n_recent + tq_ggml_tail_n_first(t);
    t->src[0] = ggml_new_tensor_3d(ctx, GGML_TYPE_F16, t->ne[0], n_row, t->ne[2]);
    t->src[1] = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_row, t->ne[2]);
    ggml_format_name(t->src[0], "%s_tail", ggml_get_name(t));
    ggml_format_name(t->src[1], "%s_tail_owner", ggml_get_name(t));
}

void tq_ggml_tail_disown(struct ggml_tensor * t, int64_t stream, const uint32_t * cells, size_t n_cells) {
    if (!tq_ggml_tail_rows(t)) {
        return;
    }
    struct ggml_tensor * tensor = t->src[1];
    const size_t start = (size_t) stream * tensor->nb[1];
    const int64_t n_first = tq_ggml_tail_n_first(t);
    const int64_t n_recent = tensor->ne[0] - n_first;
    int32_t * owner = malloc(tensor->nb[1]);
    GGML_ASSERT(owner && "no memory for the owners of a tail");
    ggml_backend_tensor_get(tensor, owner, start, tensor->nb[1]);
    for (size_t i = 0; i < n_cells; i++) {
        const int64_t cell = cells[i];
        const int64_t row = tq_tail_row(n_recent, n_first, cell);
        if (owner[row] == cell + 1) {
            owner[row] = 0;
        }
    }
    ggml_backend_tensor_set(tensor, owner, start, tensor->nb[1]);
    free(owner);
}

/* Whether a shift turns its rows. */
static bool turns(const struct ggml_tensor * t) {
    return tq_ggml_tail_rows(t) && t->buffer && ggml_backend_buffer_is_host(t->buffer);
}

void tq_ggml_tail_turned(struct ggml_tensor * t, int64_t stream, const uint32_t * cells, size_t n_cells) {
    if (!turns(t)) {
        tq_ggml_tail_disown(t, stream, cells, n_cells);
    }
}

static void copy_plane(struct ggml_tensor * t, size_t stride, int64_t from, int64_t to) {
    void * plane = malloc(stride);
    GGML_ASSERT(plane && "no memory for the tail of a stream");
    ggml_backend_tensor_get(t, plane, (size_t) from * stride, stride);
    ggml_backend_tensor_set(t, plane, (size_t) to * stride, stride);
    free(plane);
}

void tq_ggml_tail_copy_stream(struct ggml_tensor * t, int64_t from, int64_t to) {
    if (tq_ggml_tail_rows(t)) {
        copy_plane(t->src[0], t->src[0]->nb[2], from, to);
        copy_plane(t->src[1], t->src[1]->nb[1], from, to);
    }
}

struct ggml_tensor * tq_ggml_tail_turn(struct ggml_tensor * node) {
    const struct ggml_tensor * cache = node->view_src ? node->view_src : node->src[0]->view_src;
    if (turns(cache)) {
        tq_ggml_set_src(node, 3, cache->src[0]);
        tq_ggml_set_src(node, 4, cache->src[1]);
    }
    return node;
}

int64_t tq_ggml_tail_owners(const struct ggml_tensor * t, int64_t stream, int32_t * owner) {
    if (!tq_ggml_tail_rows(t)) {
        return 0;
    }
    if (owner) {
        ggml_backend_tensor_get(t->src[1], owner, (size_t) stream * t->src[1]->nb[1], t->src[1]->nb[1]);
    }
    return t->src[1]->ne[0];
}

void tq_ggml_tail_own(struct ggml_tensor * t, int64_t stream, int64_t cell, const void * row) {
    if (!tq_ggml_tail_rows(t)) {
        return;
    }
    const int64_t n_first = tq_ggml_tail_n_first(t);
    const size_t at = (size_t) tq_tail_row(t->src[0]->ne[1] - n_first, n_first, cell);
    const int32_t owner = (int32_t) (cell + 1);
    ggml_backend_tensor_set(t->src[0], row, (size_t) stream * t->src[0]->nb[2] + at * t->src[0]->nb[1],
                            t->src[0]->nb[1]);
    ggml_backend_tensor_set(t->src[1], &owner, (size_t) stream * t->src[1]->nb[1] + at * sizeof owner, sizeof owner);
}

static void copy_node(struct ggml_tensor * node, int what, struct ggml_tensor * a, struct ggml_tensor * b,
                      int64_t first_stream, int64_t of) {
    const int32_t params[] = { what, (int32_t) first_stream, (int32_t) of };
    node->op = GGML_OP_DUP;
    node->src[0] = a;
    node->src[1] = b;
    memcpy(node->op_params, params, sizeof params);
    ggml_format_name(node, "%s_batch", ggml_get_name(what == TQ_GGML_TAIL_ROWS ? b : a));
}

struct ggml_tensor * tq_ggml_tail_set_rows(struct ggml_context * ctx, struct ggml_tensor * node, int64_t first_stream,
                                           int64_t n_stream) {
    struct ggml_tensor * cache = node->view_src;
    struct ggml_tensor * rows = tq_ggml_tail_rows(cache);
    if (!rows) {
        return node;
    }
    tq_ggml_set_src(node, 3, rows);
    tq_ggml_set_src(node, 4, cache->src[1]);
    const int64_t n_own = node->src[0]->ne[1] / n_stream;
    if (n_own > 1) {
        const int64_t n = rows->ne[1] + n_own;
        struct ggml_tensor * copy = ggml_new_tensor_3d(ctx, GGML_TYPE_F16, rows->ne[0], n, n_stream);
        struct ggml_tensor * index = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 2 * n + n_own, n_stream);
        copy_node(copy, TQ_GGML_TAIL_ROWS, node->src[0], rows, first_stream, cache->type);
        copy_node(index, TQ_GGML_TAIL_INDEX, cache->src[1], node->src[1], first_stream, cache->ne[1]);
        tq_ggml_set_src(node, 5, copy);
        tq_ggml_set_src(node, 6, index);
    }
    return node;
}

/* The node of graph that writes into a cache tensor; NULL if none does. */
static const struct ggml_tensor * writer(struct ggml_cgraph * graph, const struct ggml_tensor * cache) {
    for (int i = ggml_graph_n_nodes(graph) - 1; i >= 0; i--) {
        const struct ggml_tensor * node = ggml_graph_node(graph, i);
        if (node->op == GGML_OP_SET_ROWS && node->view_src == cache) {
            return node;
        }
    }
    return NULL;
}

struct ggml_tensor * tq_ggml_tail_flash_attn(struct ggml_cgraph * graph, struct ggml_tensor * node) {
    for (int i = 0; i < 2; i++) {
        const struct ggml_tensor * cache = node->src[1 + i]->view_src;
        if (tq_ggml_tail_rows(cache)) {
            const struct ggml_tensor * write = writer(graph, cache);
            const bool batch = write && write->src[5];
            tq_ggml_set_src(node, 5 + 2 * i, batch ? write->src[5] : cache->src[0]);
            tq_ggml_set_src(node, 6 + 2 * i, batch ? write->src[6] : cache->src[1]);
        }
    }
    return node;
}
