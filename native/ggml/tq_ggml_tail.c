/* tq_ggml_tail.c: see tq_ggml_tail.h. */
#include "tq_ggml_tail.h"

#include "ggml-backend.h"
#include "tqgguf.h"

#include <stdlib.h>

static _Thread_local int32_t recent_of_ours;
static _Thread_local int32_t recent_of_stock;

void tq_ggml_tail_set(int32_t n_ours, int32_t n_stock) {
    recent_of_ours = n_ours;
    recent_of_stock = n_stock;
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

void tq_ggml_tail_disown_stream(struct ggml_tensor * t, int64_t stream) {
    if (tq_ggml_tail_rows(t)) {
        ggml_backend_tensor_memset(t->src[1], 0, (size_t) stream * t->src[1]->nb[1], t->src[1]->nb[1]);
    }
}
