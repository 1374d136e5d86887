/* tq_ggml_attention.h: a FLASH_ATTN_EXT node as the arguments of libtqgguf's attention, on the CPU and on CUDA. C only;
 * included by tq_ggml_cpu.c and tq_ggml_cuda.c. */
#ifndef TQ_GGML_ATTENTION_H
#define TQ_GGML_ATTENTION_H

#include "tq_ggml_tail.h"

#include "ggml-impl.h"
#include "tqgguf.h"

static inline bool tq_ggml_is_float(enum ggml_type type) {
    return type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
}

/* The tail of a view of the cache, (head_dim, n_kv, n_head_kv, n_stream): the view may begin at a later stream or value
 * of a row. A batch's copy begins at the view's stream. */
static inline struct tq_attn_tail tq_ggml_tail_of(const struct ggml_tensor * t, const struct ggml_tensor * rows,
                                                  const struct ggml_tensor * owner) {
    const struct ggml_tensor * cache = t->view_src;
    const int64_t n_own = rows->ne[1] - cache->src[0]->ne[1];
    const int64_t stream = n_own > 0 ? 0 : (int64_t) (t->view_offs / cache->nb[2]);
    const int64_t block = (int64_t) (t->view_offs % cache->nb[2] / cache->nb[0]);
    const int64_t first = tq_ggml_tail_n_first(cache);

    GGML_ASSERT(t->view_offs % cache->nb[2] < cache->nb[1] && t->nb[1] == cache->nb[1] && t->nb[2] % cache->nb[0] == 0);
    GGML_ASSERT(t->ne[3] == 1 || t->nb[3] == cache->nb[2]);

    return (struct tq_attn_tail) {
        .data = (const uint16_t *) ((const char *) rows->data + stream * (int64_t) rows->nb[2]) + block * TQ_GGML_BLOCK,
        .owner = (const int32_t *) ((const char *) owner->data + stream * (int64_t) owner->nb[1]),
        .n_recent = cache->src[0]->ne[1] - first,
        .n_first = first,
        .n_own = n_own,
        .stride_row = rows->nb[1],
        .stride_head = t->nb[2] / cache->nb[0] * TQ_GGML_BLOCK * rows->nb[0],
        .stride_stream = rows->nb[2],
        .owner_stride_stream = owner->nb[1],
    };
}

static inline struct tq_attn_operand tq_ggml_operand(const struct ggml_tensor * t) {
    struct tq_attn_operand o = {
        .data = t->data,
        .type = (int) t->type,
        .mode = TQ_MODE_SEARCH,
        .head_dim = t->ne[0],
        .n_head = t->ne[2],
        .n_stream = t->ne[3],
        .stride_token = t->nb[1],
        .stride_head = t->nb[2],
        .stride_stream = t->nb[3],
    };
    if (!tq_ggml_is_pqo(t->type) && t->type != GGML_TYPE_F32 && t->type != GGML_TYPE_F16) {
        o.decoder = ggml_get_type_traits(t->type)->to_float;
        GGML_ASSERT(o.decoder && "flash attention: a K or V type without to_float");
    }
    GGML_ASSERT(t->nb[0] == ggml_type_size(t->type));
    return o;
}

static inline struct tq_attn tq_ggml_attention(const struct ggml_tensor * dst) {
    const struct ggml_tensor * q = dst->src[0];
    const struct ggml_tensor * k = dst->src[1];
    const struct ggml_tensor * v = dst->src[2];
    const struct ggml_tensor * mask = dst->src[3];
    const struct ggml_tensor * sinks = dst->src[4];

    GGML_ASSERT(q->type == GGML_TYPE_F32 && dst->type == GGML_TYPE_F32);
    GGML_ASSERT(q->ne[0] == k->ne[0] && k->ne[1] == v->ne[1]);
    GGML_ASSERT(dst->ne[0] == v->ne[0] && dst->ne[1] == q->ne[2] && dst->ne[2] == q->ne[1] && dst->ne[3] == q->ne[3]);
    GGML_ASSERT(dst->nb[0] == sizeof(float));

    struct tq_attn a = {
        .q = tq_ggml_operand(q),
        .k = tq_ggml_operand(k),
        .v = tq_ggml_operand(v),
        .n_q = q->ne[1],
        .n_kv = k->ne[1],
        .scale = ggml_get_op_params_f32(dst, 0),
        .max_bias = ggml_get_op_params_f32(dst, 1),
        .softcap = ggml_get_op_params_f32(dst, 2),
        .out = (float *) dst->data,
        .out_stride_row = dst->nb[2],
        .out_stride_head = dst->nb[1],
        .out_stride_stream = dst->nb[3],
    };
    if (dst->src[5]) {
        a.k.tail = tq_ggml_tail_of(k, dst->src[5], dst->src[6]);
    }
    if (dst->src[7]) {
        a.v.tail = tq_ggml_tail_of(v, dst->src[7], dst->src[8]);
    }
    if (mask) {
        GGML_ASSERT(mask->type == GGML_TYPE_F16 && mask->nb[0] == sizeof(ggml_fp16_t));
        GGML_ASSERT(mask->ne[0] >= k->ne[1] && mask->ne[1] >= q->ne[1]);
        a.mask = (const uint16_t *) mask->data;
        a.n_mask_head = mask->ne[2];
        a.n_mask_stream = mask->ne[3];
        a.mask_stride_row = mask->nb[1];
        a.mask_stride_head = mask->nb[2];
        a.mask_stride_stream = mask->nb[3];
    }
    if (sinks) {
        GGML_ASSERT(sinks->type == GGML_TYPE_F32 && sinks->ne[0] == q->ne[2]);
        a.sinks = (const float *) sinks->data;
    }
    return a;
}

#endif /* TQ_GGML_ATTENTION_H */
