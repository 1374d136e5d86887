/* tq_ggml_cuda.c: see tq_ggml_cuda.h. A translation of ggml's tensors into launches of tq_cuda.h; no device code, and
 * nothing of ggml-cuda: the tests compile it for the host and run it with emulated kernels. */
#include "tq_ggml_cuda.h"

#include "ggml-backend.h"
#include "tq_cuda.h"
#include "tq_ggml_attention.h"

static_assert((int) GGML_TYPE_BF16 == TQ_CUDA_TYPE_BF16 && (int) GGML_TYPE_Q8_0 == TQ_CUDA_TYPE_Q8_0 &&
                  (int) GGML_TYPE_I32 == TQ_CUDA_TYPE_I32 && (int) GGML_TYPE_I64 == TQ_CUDA_TYPE_I64,
              "type numbers differ");

/* Says why a node is not done; tq_cuda_last_error() gives it. */
#define REFUSE(...) (tq_cuda_fail(TQ_E_UNSUPPORTED, __VA_ARGS__), false)

const char * tq_ggml_cuda_reason(void) {
    return tq_cuda_last_error();
}

/* Ends the process: supported() has let a node through that cannot be computed, or the device is lost. */
static void check(int status, const struct ggml_tensor * node) {
    if (status != TQ_OK) {
        GGML_ABORT("%s (%s): %s", ggml_op_name(node->op), node->name, tq_cuda_last_error());
    }
}

static bool is_copy(const struct ggml_tensor * node) {
    return node->op == GGML_OP_DUP || node->op == GGML_OP_CPY || node->op == GGML_OP_CONT;
}

bool tq_ggml_cuda_used(const struct ggml_tensor * node) {
    const struct ggml_tensor * const * src = (const struct ggml_tensor * const *) node->src;
    switch (node->op) {
        case GGML_OP_SET_ROWS:
            return tq_ggml_is_pqo(node->type) || tq_ggml_writes_tail(node);
        case GGML_OP_GET_ROWS:
            return tq_ggml_is_pqo(src[0]->type);
        case GGML_OP_FLASH_ATTN_EXT:
            return tq_ggml_attends(node);
        case GGML_OP_DUP:
        case GGML_OP_CPY:
        case GGML_OP_CONT:
            if (tq_ggml_copies_tail(node)) {
                return true;
            }
            if (src[0]->type == node->type && ggml_is_contiguous(src[0]) && ggml_is_contiguous(node)) {
                return false; /* bytes as they are: upstream's copy does */
            }
            return tq_ggml_is_pqo(src[0]->type) || tq_ggml_is_pqo(node->type);
        default:
            return false;
    }
}

/* Whether a batch of so many tokens has its own copy of the tail (tq_ggml_tail.h). Longer ones read the tail as it is
 * behind the batch: their K and V are decoded once for all query rows, which need one state of the tail. */
static bool has_copy(int64_t n_own) {
    return n_own <= TQ_GGML_CUDA_FUSED_VECTORS;
}

/* A FLASH_ATTN_EXT node's attention; decoded: with the tail as it is behind the batch. */
static struct tq_attn attention(const struct ggml_tensor * node, bool decoded) {
    struct ggml_tensor x = *node;
    for (int i = 0; i < 2; i++) {
        if (node->src[5 + 2 * i] && (decoded || !has_copy(node->src[0]->ne[1]))) {
            const struct ggml_tensor * cache = node->src[1 + i]->view_src;
            x.src[5 + 2 * i] = cache->src[0];
            x.src[6 + 2 * i] = cache->src[1];
        }
    }
    struct tq_attn a = tq_ggml_attention(&x);
    for (int i = 0; i < 2; i++) {
        if (node->src[1 + i]->type == GGML_TYPE_Q8_0) { /* kernels read it, as they read ours */
            *(i == 0 ? &a.k.decoder : &a.v.decoder) = NULL;
        }
    }
    return a;
}

/* ---- Tensors ---- */

static tq_cuda_view view(const struct ggml_tensor * t) {
    tq_cuda_view x = { .data = t->data, .type = (int) t->type, .mode = TQ_MODE_SEARCH };
    for (int i = 0; i < 4; i++) {
        x.ne[i] = t->ne[i];
        x.nb[i] = t->nb[i];
    }
    return x;
}

static tq_cuda_index row_numbers(const struct ggml_tensor * t) {
    tq_cuda_index x = { .data = t->data, .type = (int) t->type };
    for (int i = 0; i < 3; i++) {
        x.ne[i] = t->ne[i];
        x.nb[i] = t->nb[i];
    }
    return x;
}

/* f16 in the layout of a cache: heads of a token side by side. */
static struct ggml_tensor dense_like(const struct ggml_tensor * t, void * data) {
    struct ggml_tensor x = *t;
    x.type = GGML_TYPE_F16;
    x.data = data;
    x.nb[0] = sizeof(ggml_fp16_t);
    x.nb[2] = x.nb[0] * (size_t) t->ne[0];
    x.nb[1] = x.nb[2] * (size_t) t->ne[2];
    x.nb[3] = x.nb[1] * (size_t) t->ne[1];
    x.view_src = NULL;
    x.view_offs = 0;
    return x;
}

/* (head_dim, n_kv, n_head_kv, n_stream) as (head_dim, n_head_kv, n_kv, n_stream): the order in which a cache lies in
 * memory. */
static tq_cuda_view by_tokens(const struct ggml_tensor * t) {
    tq_cuda_view x = view(t);
    x.ne[1] = t->ne[2];
    x.ne[2] = t->ne[1];
    x.nb[1] = t->nb[2];
    x.nb[2] = t->nb[1];
    return x;
}

/* Types of K and V that kernels read as they are and upstream's attention must have decoded. */
static bool is_blocks(enum ggml_type type) {
    return tq_ggml_is_pqo(type) || type == GGML_TYPE_Q8_0;
}

/* ---- What is supported ---- */

/* The tail of a stock type is written and read on the CPU alone. */
static bool tail_supported(const struct ggml_tensor * node) {
    const bool writes = node->op == GGML_OP_SET_ROWS;
    for (int i = 0; i < (writes ? 1 : 2); i++) {
        const enum ggml_type type = writes ? node->type : node->src[1 + i]->type;
        const bool tail = writes ? tq_ggml_writes_tail(node) : node->src[5 + 2 * i] != NULL;
        if (tail && !tq_ggml_is_pqo(type)) {
            return REFUSE("a precise tail beside %s is read and written on the CPU only (tail = 0: none)",
                          ggml_type_name(type));
        }
    }
    return true;
}

static bool rows_supported(const struct ggml_tensor * node, enum ggml_type values) {
    const struct ggml_tensor * ids = node->src[1];
    if (!tq_ggml_is_float(values) || (node->op == GGML_OP_GET_ROWS && values != GGML_TYPE_F32)) {
        return REFUSE("%s with values of %s is not done on CUDA; f32 is%s", ggml_op_name(node->op),
                      ggml_type_name(values), node->op == GGML_OP_GET_ROWS ? "" : ", and f16 and bf16 are");
    }
    if ((ids->type != GGML_TYPE_I32 && ids->type != GGML_TYPE_I64) ||
        node->src[0]->nb[0] != ggml_type_size(node->src[0]->type)) {
        return REFUSE("%s with row numbers of %s, or rows that do not lie in one piece, is not done on CUDA",
                      ggml_op_name(node->op), ggml_type_name(ids->type));
    }
    if (node->op == GGML_OP_SET_ROWS && node->src[3] && (node->src[0]->ne[2] != 1 || node->src[0]->ne[3] != 1)) {
        return REFUSE("a precise tail is written for rows in one plane");
    }
    return true;
}

static bool copy_supported(const struct ggml_tensor * node) {
    const enum ggml_type from = node->src[0]->type;
    if (from == node->type || (!tq_ggml_is_pqo(from) && !tq_ggml_is_float(from)) ||
        (!tq_ggml_is_pqo(node->type) && !tq_ggml_is_float(node->type))) {
        return REFUSE("copying %s to %s%s is not done on CUDA; ours to and from f32, f16, bf16 and each other is",
                      ggml_type_name(from), ggml_type_name(node->type),
                      from == node->type ? " with other strides" : "");
    }
    for (int i = 0; i < 2; i++) {
        const struct ggml_tensor * t = i == 0 ? node->src[0] : node;
        if (tq_ggml_is_pqo(t->type) && t->nb[0] != ggml_type_size(t->type)) {
            return REFUSE("copying %s whose blocks do not lie side by side is not done on CUDA",
                          ggml_type_name(t->type));
        }
    }
    return true;
}

static bool attention_supported(const struct ggml_tensor * node) {
    const struct ggml_tensor * q = node->src[0];
    const struct ggml_tensor * k = node->src[1];
    const struct ggml_tensor * v = node->src[2];
    const struct ggml_tensor * mask = node->src[3];
    for (int i = 1; i < 3; i++) {
        const struct ggml_tensor * t = node->src[i];
        const struct ggml_tensor * cache = t->view_src ? t->view_src : t;
        if (cache->buffer && ggml_backend_buffer_is_host(cache->buffer)) {
            return REFUSE("a KV cache in the CPU's memory is read there, not copied to the device for every token");
        }
        if ((!is_blocks(t->type) && t->type != GGML_TYPE_F16) || t->nb[0] != ggml_type_size(t->type)) {
            return REFUSE(
                "K of %s with V of %s is not done on CUDA; beside a type of ours the other is one of ours, f16 or q8_0",
                ggml_type_name(k->type), ggml_type_name(v->type));
        }
    }
    if (q->type != GGML_TYPE_F32 || (mask && mask->type != GGML_TYPE_F16)) {
        return REFUSE("attention with q of %s and a mask of %s is not done on CUDA; f32 and f16 is",
                      ggml_type_name(q->type), mask ? ggml_type_name(mask->type) : "none");
    }
    if (q->nb[0] != sizeof(float) || (mask && mask->nb[0] != sizeof(ggml_fp16_t))) {
        return REFUSE("attention with a q or a mask whose rows do not lie in one piece is not done on CUDA");
    }
    const struct tq_attn a = attention(node, false);
    return tq_cuda_attn_supported(&a) == TQ_OK;
}

bool tq_ggml_cuda_supported(const struct ggml_tensor * node) {
    if (tq_cuda_device_ready() != TQ_OK) {
        return false;
    }
    switch (node->op) {
        case GGML_OP_SET_ROWS:
            return tail_supported(node) && rows_supported(node, node->src[0]->type);
        case GGML_OP_GET_ROWS:
            return rows_supported(node, node->type);
        case GGML_OP_FLASH_ATTN_EXT:
            return tail_supported(node) && attention_supported(node);
        default:
            return is_copy(node) && (tq_ggml_copies_tail(node) || copy_supported(node));
    }
}

/* ---- SET_ROWS ---- */

static void set_rows(const struct ggml_tensor * node, void * stream) {
    const tq_cuda_view src = view(node->src[0]);
    const tq_cuda_view dst = view(node);
    const tq_cuda_index ids = row_numbers(node->src[1]);
    const struct ggml_tensor * rows = node->src[3];
    const struct ggml_tensor * owner = node->src[4];

    check(tq_cuda_encode(&src, &ids, &dst, stream), node);
    if (!rows) {
        return;
    }
    tq_cuda_tail tail = {
        .data = rows->data,
        .owner = owner->data,
        .n_cells = node->ne[1] * node->ne[2] / owner->ne[1], /* of a stream; node may be all streams in one */
        .n_stream = owner->ne[1],
        .stride_row = rows->nb[1],
        .stride_stream = rows->nb[2],
        .owner_stride_stream = owner->nb[1],
    };
    tail.n_first = MIN(TQ_GGML_TAIL_FIRST, tail.n_cells);
    tail.n_recent = owner->ne[0] - tail.n_first;
    GGML_ASSERT(src.ne[0] == rows->ne[0]);
    check(tq_cuda_tail_encode(&src, &ids, TQ_MODE_SEARCH, &tail, stream), node);
}

/* ---- A batch's copy of the tail ---- */

static void copy_tail_rows(const struct ggml_tensor * node, void * stream) {
    const struct ggml_tensor * rows = node->src[1];
    const tq_cuda_view src = view(node->src[0]);
    const tq_cuda_view dst = view(node);
    const tq_cuda_tail tail = {
        .data = (uint16_t *) ((char *) rows->data + node->op_params[1] * (int64_t) rows->nb[2]),
        .n_recent = rows->ne[1],
        .stride_row = rows->nb[1],
        .stride_stream = rows->nb[2],
    };
    if (has_copy(node->ne[1] - rows->ne[1])) {
        check(tq_cuda_tail_batch_rows(&src, TQ_MODE_SEARCH, &tail, &dst, stream), node);
    }
}

static void copy_tail_index(const struct ggml_tensor * node, void * stream) {
    const struct ggml_tensor * owner = node->src[0];
    const struct ggml_tensor * cells = node->src[1];
    const tq_cuda_index ids = row_numbers(cells);
    tq_cuda_tail tail = {
        .owner = (int32_t *) ((char *) owner->data + node->op_params[1] * (int64_t) owner->nb[1]),
        .n_cells = node->op_params[2],
        .n_stream = node->ne[1],
        .owner_stride_stream = owner->nb[1],
    };
    tail.n_first = MIN(TQ_GGML_TAIL_FIRST, tail.n_cells);
    tail.n_recent = owner->ne[0] - tail.n_first;
    if (has_copy(cells->ne[0] / tail.n_stream)) {
        const int64_t base = node->op_params[1] * tail.n_cells;
        check(tq_cuda_tail_batch_index(&tail, &ids, base, node->data, node->nb[1], stream), node);
    }
}

/* ---- FLASH_ATTN_EXT ---- */

/* An equivalent node for upstream's kernels: K and V in blocks are replaced by f16 that lies in work. */
struct dense_attention {
    struct ggml_tensor node, k, v;
    bool one; /* V is a part of K (MLA) and is not decoded for itself */
    size_t work_bytes;
};

static void make_dense(const struct ggml_tensor * node, void * work, struct dense_attention * d) {
    const struct ggml_tensor * k = node->src[1];
    const struct ggml_tensor * v = node->src[2];

    *d = (struct dense_attention) { .node = *node, .k = *k, .v = *v };
    d->one = k->type == v->type && v->view_src && v->view_src == k->view_src && v->view_offs == k->view_offs &&
             v->ne[0] <= k->ne[0];
    for (int i = 1; i < 4; i++) {
        d->one = d->one && k->nb[i] == v->nb[i] && k->ne[i] == v->ne[i];
    }
    if (is_blocks(k->type)) {
        d->k = dense_like(k, work);
        d->work_bytes = GGML_PAD((size_t) d->k.ne[3] * d->k.nb[3], 128);
    }
    if (d->one) {
        for (int i = 0; i < 4; i++) {
            d->v.nb[i] = d->k.nb[i];
        }
        d->v.type = GGML_TYPE_F16;
        d->v.data = d->k.data;
        d->v.view_src = &d->k;
        d->v.view_offs = 0;
    } else if (is_blocks(v->type)) {
        d->v = dense_like(v, (char *) work + d->work_bytes);
        d->work_bytes += GGML_PAD((size_t) d->v.ne[3] * d->v.nb[3], 128);
    }
    d->node.src[1] = &d->k;
    d->node.src[2] = &d->v;
    for (int i = 5; i < 9; i++) {
        d->node.src[i] = NULL; /* the tail's rows are decoded, too */
    }
}

/* Whether upstream computes this node, on decoded K and V; d is then filled. */
static bool is_dense(const struct ggml_tensor * node, const struct tq_ggml_cuda_dense * dense, void * work,
                     struct dense_attention * d) {
    const struct ggml_tensor * q = node->src[0];
    if (q->ne[1] * (q->ne[2] / node->src[1]->ne[2]) <= TQ_GGML_CUDA_FUSED_VECTORS) {
        return false;
    }
    make_dense(node, work, d);
    return dense->supported(dense->device, &d->node);
}

/* x: the operand that t stands for. */
static void decode(const struct ggml_tensor * node, const struct ggml_tensor * t, const struct tq_attn_operand * x,
                   const struct ggml_tensor * to, void * stream) {
    const tq_cuda_view src = by_tokens(t);
    const tq_cuda_view dst = by_tokens(to);
    check(tq_ggml_is_pqo(t->type) ? tq_cuda_decode(&src, NULL, 0, &dst, stream) : tq_cuda_convert(&src, &dst, stream),
          node);
    if (x->tail.data) {
        check(tq_cuda_tail_decode(x, &dst, stream), node);
    }
}

static void attend(const struct ggml_tensor * node, const struct tq_ggml_cuda_dense * dense, void * work,
                   void * stream) {
    struct dense_attention d;
    const bool decoded = is_dense(node, dense, work, &d);
    const struct tq_attn a = attention(node, decoded);
    if (!decoded) {
        check(tq_cuda_attn(&a, work, stream), node);
        return;
    }
    if (is_blocks(node->src[1]->type)) {
        decode(node, node->src[1], &a.k, &d.k, stream);
    }
    if (is_blocks(node->src[2]->type) && !d.one) {
        decode(node, node->src[2], &a.v, &d.v, stream);
    }
    dense->compute(dense->context, &d.node);
}

/* ---- Nodes ---- */

static size_t work_bytes(const struct ggml_tensor * node, const struct tq_ggml_cuda_dense * dense) {
    struct dense_attention d;
    if (is_dense(node, dense, NULL, &d)) {
        return d.work_bytes;
    }
    const struct tq_attn a = attention(node, false);
    const size_t bytes = tq_cuda_attn_work_bytes(&a);
    check(bytes == (size_t) -1 ? TQ_E_ARGUMENT : TQ_OK, node);
    return bytes;
}

/* Where a node's result ends, and work begins. */
static size_t result_bytes(const struct ggml_tensor * node) {
    return GGML_PAD(ggml_nbytes(node), 128);
}

size_t tq_ggml_cuda_alloc_bytes(const struct ggml_tensor * node, const struct tq_ggml_cuda_dense * dense) {
    /* a node that is not supported is laid out, too: its memory is on another device, or the caller tells the user */
    if (node->op != GGML_OP_FLASH_ATTN_EXT || !tq_ggml_cuda_supported(node)) {
        return ggml_nbytes(node);
    }
    return result_bytes(node) + work_bytes(node, dense);
}

void tq_ggml_cuda_compute(struct ggml_tensor * node, const struct tq_ggml_cuda_dense * dense, void * stream) {
    const tq_cuda_view src = view(node->src[0]);
    const tq_cuda_view dst = view(node);
    switch (node->op) {
        case GGML_OP_SET_ROWS:
            set_rows(node, stream);
            break;
        case GGML_OP_GET_ROWS: {
            const tq_cuda_index ids = row_numbers(node->src[1]);
            check(tq_cuda_decode(&src, &ids, 0, &dst, stream), node);
        } break;
        case GGML_OP_FLASH_ATTN_EXT:
            attend(node, dense, (char *) node->data + result_bytes(node), stream);
            break;
        default:
            GGML_ASSERT(is_copy(node));
            if (tq_ggml_copies_tail(node)) {
                (node->op_params[0] == TQ_GGML_TAIL_ROWS ? copy_tail_rows : copy_tail_index)(node, stream);
                break;
            }
            check(tq_ggml_is_pqo(node->type) ? tq_cuda_encode(&src, NULL, &dst, stream)
                                             : tq_cuda_decode(&src, NULL, 0, &dst, stream),
                  node);
            break;
    }
}
