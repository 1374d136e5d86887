/* tq_ggml_tail.c: see tq_ggml_tail.h. */
#include "tq_ggml_tail.h"

#include "ggml-backend.h"

static _Thread_local int32_t recent;

void tq_ggml_tail_set(int32_t n_recent) {
    recent = n_recent > 0 ? n_recent : 0;
}

int32_t tq_ggml_tail_get(void) {
    return recent;
}

void tq_ggml_tail_new(struct ggml_context * ctx, struct ggml_tensor * t) {
    if (!t || !tq_ggml_is_ours(t->type) || recent == 0) {
        return;
    }
    const int64_t n_recent = recent < t->ne[1] ? recent : t->ne[1];
    const int64_t n_row    = n_recent + (TQ_GGML_TAIL_FIRST < t->ne[1] ? TQ_GGML_TAIL_FIRST : t->ne[1]);
    t->src[0]              = ggml_new_tensor_3d(ctx, GGML_TYPE_F16, t->ne[0], n_row, t->ne[2]);
    t->src[1]              = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_row, t->ne[2]);
    ggml_format_name(t->src[0], "%s_tail", ggml_get_name(t));
    ggml_format_name(t->src[1], "%s_tail_owner", ggml_get_name(t));
}

void tq_ggml_tail_disown(struct ggml_tensor * t, int64_t stream) {
    if (tq_ggml_tail_rows(t)) {
        struct ggml_tensor * owner = t->src[1];
        const size_t         bytes = stream < 0 ? ggml_nbytes(owner) : owner->nb[1];
        ggml_backend_tensor_memset(owner, 0, stream < 0 ? 0 : (size_t) stream * owner->nb[1], bytes);
    }
}
