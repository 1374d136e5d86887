/* attention.c: attention over a compressed cache without decompressing it.
 *
 * The block transform is orthonormal, so everything happens in its domain: q is transformed once, a score is
 * sum_blocks d <codebook[index], q'>, V is accumulated transformed, and the inverse transform runs once on the output
 * (online softmax: Milakov and Gimelshein, arXiv:1805.02867; tiles: Dao et al., arXiv:2205.14135).
 *
 * Work is cut into tasks: a stream, a KV head, a block of query rows, a range of keys. All query heads of the KV head
 * go together, so each K and V block is decoded once for the whole group. There are two ways through a task:
 *   fused  for at most TQI_MAX_FUSED query vectors and K and V both in types of tqgguf. Codebook values go from
 *          registers into the sums. Memory bounds this way, and a token's heads lie side by side in it, so up to
 *          MAX_SPAN KV heads take each tile in turn and the kernels prefetch the tile after it.
 *   tiled  for everything else. A tile of K, then of V, is decoded to f32 and multiplied, query vectors side by side.
 * If the keys were cut, phase 1 merges the partial results. Otherwise phase 0 has already written the output. */
#include "attention_rows.h"
#include "error.h"

#include <math.h>

/* What one task keeps while it goes through its keys. */
typedef struct {
    float * q;     /* fused: (n_vec, dk); tiled: (dk, n_col) */
    float * query; /* q as scores takes it, if K is of tqgguf */
    float * o;     /* fused: (n_vec, dv); tiled: (dv, n_col) */
    float * max;   /* (n_col) */
    float * sum;   /* (n_col) */
} vectors;

/* A thread's scratch. */
typedef struct {
    vectors x[MAX_SPAN]; /* (span) */
    float * s;           /* fused: (n_vec, TILE); tiled: (TILE, n_col) */
    float * factor;      /* (n_col) */
    float * row;         /* (max(dk, dv)) */
    float * tile;        /* tiled: (TILE, max(dk, dv)) */
} tqi_scratch;

static float * aligned(void * work) {
    const uintptr_t address = ((uintptr_t) work + ALIGN - 1) / ALIGN * ALIGN;
    return (float *) address; /* NOLINT: the caller's bytes, rounded up */
}

static float * take(float ** at, size_t n_floats) {
    float * taken = *at;
    *at += padded(n_floats);
    return taken;
}

static tqi_scratch carve(const tq_attn * args, const tqi_plan * plan, void * work, int thread) {
    const size_t dk = (size_t) args->k.head_dim, dv = (size_t) args->v.head_dim, n = (size_t) plan->n_col;
    float * at = aligned(work) + plan->scratch * (size_t) thread;
    tqi_scratch w;
    for (int i = 0; i < plan->span; ++i) {
        w.x[i].q = take(&at, dk * n);
        w.x[i].query = take(&at, plan->query * n);
        w.x[i].o = take(&at, dv * n);
        w.x[i].max = take(&at, n);
        w.x[i].sum = take(&at, n);
    }
    w.s = take(&at, TILE * n);
    w.factor = take(&at, n);
    w.row = take(&at, dk > dv ? dk : dv);
    w.tile = at;
    return w;
}

/* ALiBi: Press et al., arXiv:2108.12409, extended to head counts that are no power of two as llama.cpp does. */
static float slope_of(const tq_attn * args, int64_t head) {
    if (args->max_bias <= 0.0f) {
        return 1.0f;
    }
    int64_t n = 1;
    while (2 * n <= args->q.n_head) {
        n *= 2;
    }
    return head < n ? powf(powf(2.0f, -args->max_bias / (float) n), (float) (head + 1))
                    : powf(powf(2.0f, -args->max_bias / 2.0f / (float) n), (float) (2 * (head - n) + 1));
}

static const uint16_t * mask_row(const tq_attn * args, int64_t stream, int64_t head, int64_t row) {
    const uint8_t * base = (const uint8_t *) args->mask;
    return (const uint16_t *) (const void *) (base + (size_t) row * args->mask_stride_row +
                                              (size_t) (head % args->n_mask_head) * args->mask_stride_head +
                                              (size_t) (stream % args->n_mask_stream) * args->mask_stride_stream);
}

#define F16_NEGATIVE_INFINITY 0xfc00u

/* Applies softcap and mask to n scores that lie stride floats apart; the scale is in q already. */
static void finish_scores(const tq_attn * args, float * s, int n, int stride, float slope, const uint16_t * mask) {
    if (args->softcap > 0.0f) {
        for (int t = 0; t < n; ++t) {
            s[t * stride] = args->softcap * tanhf(s[t * stride]);
        }
    }
    if (mask != NULL) { /* what is hidden does not count, whatever it is */
        for (int t = 0; t < n; ++t) {
            s[t * stride] =
                mask[t] == F16_NEGATIVE_INFINITY ? -INFINITY : s[t * stride] + slope * tqi_f16_to_f32(mask[t]);
        }
    }
}

/* Decodes n rows to f32, in the transformed domain for types of tqgguf: tile: (n, head_dim). */
static void decode_rows(const tqi_kernels * kernel, const tq_attn_operand * x, const tqi_codec * codec,
                        const uint8_t * rows, int n, float * tile) {
    for (int t = 0; t < n; ++t) {
        const uint8_t * row = rows + (size_t) t * x->stride_token;
        float * to = tile + (size_t) t * (size_t) x->head_dim;
        if (codec != NULL) {
            tqi_prefetch(row + TILE * x->stride_token, (size_t) (x->head_dim / TQ_BLOCK * codec->block_bytes));
            tqi_steps_of(kernel, codec)->unpack(codec, row, x->head_dim / TQ_BLOCK, to);
        } else if (x->decoder != NULL) {
            x->decoder(row, to, x->head_dim);
        } else if (x->type == TQ_TYPE_F32) {
            memcpy(to, row, (size_t) x->head_dim * sizeof(float));
        } else {
            kernel->widen((const uint16_t *) (const void *) row, x->head_dim, to);
        }
    }
}

static const uint8_t * operand_at(const tq_attn_operand * x, int64_t stream, int64_t head, int64_t token) {
    return (const uint8_t *) x->data + (size_t) stream * x->stride_stream + (size_t) head * x->stride_head +
           (size_t) token * x->stride_token;
}

/* Decodes the tokens of a tile, from t0 on, each from where it lies. */
static void decode_tile(const tqi_kernels * kernel, const tq_attn_operand * x, const tqi_codec * codec, int64_t stream,
                        int64_t head, int64_t t0, const runs * from, float * tile) {
    for (const run * r = from->r; r < from->r + from->n; ++r) {
        float * to = tile + (size_t) r->first * (size_t) x->head_dim;
        if (r->rows == NULL) {
            decode_rows(kernel, x, codec, operand_at(x, stream, head, t0 + r->first), r->n, to);
            continue;
        }
        for (int t = 0; t < r->n; ++t) {
            const uint8_t * row = r->rows + (size_t) head * x->tail.stride_head + (size_t) t * x->tail.stride_row;
            kernel->widen((const uint16_t *) (const void *) row, x->head_dim, to + (size_t) t * (size_t) x->head_dim);
        }
    }
}

/* One task's place. Query vector i is head head0 + i % group of row row0 + i / group. */
typedef struct {
    int64_t q_stream, kv_stream, kv_head, head0, row0, chunk;
    int n_vec; /* fewer than the plan's in the last row block */
} tqi_task;

/* KV heads count fastest, then chunks, row blocks, streams. */
static tqi_task task_of(const tq_attn * args, const tqi_plan * plan, int64_t index) {
    tqi_task t;
    t.kv_head = index % args->k.n_head;
    index /= args->k.n_head;
    t.chunk = index % plan->n_chunks;
    index /= plan->n_chunks;
    t.row0 = index % plan->n_row_blocks * plan->rows;
    t.q_stream = index / plan->n_row_blocks;
    t.kv_stream = t.q_stream / (args->q.n_stream / args->k.n_stream);
    t.head0 = t.kv_head * plan->group;
    t.n_vec = (int) min64(plan->rows, args->n_q - t.row0) * plan->group;
    return t;
}

/* What a tile's mask amounts to: most tiles are seen by all query vectors or by none. */
typedef enum { ALL_SEEN, NONE_SEEN, MIXED } visibility;

static visibility tile_visibility(const tq_attn * args, const tqi_plan * plan, const tqi_task * task, int64_t t0,
                                  int n) {
    if (args->mask == NULL) {
        return ALL_SEEN;
    }
    uint16_t any = 0, all_hidden = 1;
    for (int i = 0; i < task->n_vec; ++i) {
        if (args->n_mask_head == 1 && i % plan->group != 0) {
            continue; /* the heads of a group share this mask row */
        }
        const uint16_t * mask =
            mask_row(args, task->q_stream, task->head0 + i % plan->group, task->row0 + i / plan->group) + t0;
        uint16_t bits = 0, differ = 0;
        for (int j = 0; j < n; ++j) {
            bits |= mask[j];
            differ |= mask[j] ^ F16_NEGATIVE_INFINITY;
        }
        any |= bits;
        all_hidden &= differ == 0;
        if (any != 0 && !all_hidden) {
            return MIXED;
        }
    }
    return any == 0 ? ALL_SEEN : NONE_SEEN;
}

/* Makes of query vector i's scores of a part, which lie stride floats apart, what softmax takes. */
static void finish_vector(const tq_attn * args, const tqi_plan * plan, const tqi_task * task, const part * p,
                          visibility seen, int i, float * s, int stride) {
    const int64_t head = task->head0 + i % plan->group, row = task->row0 + i / plan->group;
    if (seen == MIXED || args->softcap > 0.0f) {
        const uint16_t * mask = seen == ALL_SEEN ? NULL : mask_row(args, task->q_stream, head, row) + p->t0;
        finish_scores(args, s, p->n, stride, slope_of(args, head), mask);
    }
    hide(p, row, s, stride);
}

/* Loads query vector i, scaled, and transformed if K is. */
static void load_vector(const tqi_kernels * kernel, const tq_attn * args, const tqi_plan * plan, const tqi_task * task,
                        int i, float * q) {
    memcpy(q, operand_at(&args->q, task->q_stream, task->head0 + i % plan->group, task->row0 + i / plan->group),
           (size_t) args->q.head_dim * sizeof(float));
    const float scale = args->softcap > 0.0f ? args->scale / args->softcap : args->scale;
    for (int64_t j = 0; j < args->q.head_dim; ++j) {
        q[j] *= scale;
    }
    if (plan->k_codec != NULL) {
        kernel->transform(plan->k_codec->signs, q, args->q.head_dim / TQ_BLOCK);
    }
}

/* Adds the sink and writes o / sum, back in the original domain, to the output. */
static void write_output(const tqi_kernels * kernel, const tq_attn * args, const tqi_plan * plan, const tqi_task * task,
                         int i, float max, float sum, float * o) {
    const int64_t head = task->head0 + i % plan->group;
    const int64_t row = task->row0 + i / plan->group;
    float factor = 1.0f;
    if (args->sinks != NULL) {
        const float sink = args->sinks[head];
        const float top = fmaxf(max, sink);
        factor = max == -INFINITY ? 0.0f : expf(max - top);
        sum = sum * factor + (sink == -INFINITY ? 0.0f : expf(sink - top));
    }
    factor = sum == 0.0f ? 0.0f : factor / sum;
    for (int64_t j = 0; j < args->v.head_dim; ++j) {
        o[j] *= factor;
    }
    if (plan->v_codec != NULL) {
        tqi_inverse_transform_blocks(kernel, plan->v_codec, o, args->v.head_dim / TQ_BLOCK);
    }
    uint8_t * out = (uint8_t *) args->out + (size_t) row * args->out_stride_row +
                    (size_t) head * args->out_stride_head + (size_t) task->q_stream * args->out_stride_stream;
    memcpy(out, o, (size_t) args->v.head_dim * sizeof(float));
}

/* Hands a finished vector on: to the output, or to the task's partial results (max, sum, o) per vector. */
static void put_result(const tqi_kernels * kernel, const tq_attn * args, const tqi_plan * plan, const tqi_task * task,
                       int i, float max, float sum, float * o, float * partial) {
    if (partial == NULL) {
        write_output(kernel, args, plan, task, i, max, sum, o);
        return;
    }
    partial += (size_t) i * (size_t) (args->v.head_dim + 2);
    partial[0] = max;
    partial[1] = sum;
    memcpy(partial + 2, o, (size_t) args->v.head_dim * sizeof(float));
}

/* One task's share of a tile. */
static void fused_tile(const tqi_kernels * kernel, const tq_attn * args, const tqi_plan * plan, const tqi_task * task,
                       const vectors * own, float * s, const part * p, visibility seen, const runs * k,
                       const runs * v) {
    const int64_t t0 = p->t0;
    const int n = p->n;
    const int dk = (int) args->k.head_dim, dv = (int) args->v.head_dim;
    for (const run * r = k->r; r < k->r + k->n; ++r) {
        if (r->rows == NULL) {
            tqi_steps_of(kernel, plan->k_codec)
                ->scores(plan->k_codec, operand_at(&args->k, task->kv_stream, task->kv_head, t0 + r->first),
                         args->k.stride_token, r->n, own->query, task->n_vec, dk / TQ_BLOCK, s + r->first, TILE);
        } else {
            kernel->scores_f16(r->rows + (size_t) task->kv_head * args->k.tail.stride_head, args->k.tail.stride_row,
                               r->n, own->q, task->n_vec, dk, s + r->first, TILE);
        }
    }
    for (int i = 0; i < task->n_vec; ++i) {
        finish_vector(args, plan, task, p, seen, i, s + i * TILE, 1);
        const float factor = kernel->softmax_row(s + i * TILE, n, &own->max[i], &own->sum[i]);
        if (factor != 1.0f) {
            for (int j = 0; j < dv; ++j) {
                own->o[i * dv + j] *= factor;
            }
        }
    }
    for (const run * r = v->r; r < v->r + v->n; ++r) {
        if (r->rows == NULL) {
            tqi_steps_of(kernel, plan->v_codec)
                ->accumulate(plan->v_codec, operand_at(&args->v, task->kv_stream, task->kv_head, t0 + r->first),
                             args->v.stride_token, r->n, s + r->first, TILE, task->n_vec, dv / TQ_BLOCK, own->o);
        } else {
            kernel->accumulate_f16(r->rows + (size_t) task->kv_head * args->v.tail.stride_head, args->v.tail.stride_row,
                                   r->n, s + r->first, TILE, task->n_vec, dv, own->o);
        }
    }
}

/* Runs n tasks that differ only in their KV heads. */
static void run_fused(const tqi_kernels * kernel, const tq_attn * args, const tqi_plan * plan, const tqi_task * tasks,
                      int n_tasks, const tqi_scratch * scratch, float * partials) {
    const int dk = (int) args->k.head_dim, dv = (int) args->v.head_dim;
    for (int h = 0; h < n_tasks; ++h) {
        for (int i = 0; i < tasks[h].n_vec; ++i) {
            float * q = scratch->x[h].q + i * dk;
            load_vector(kernel, args, plan, &tasks[h], i, q);
            tqi_steps_of(kernel, plan->k_codec)
                ->load_query(plan->k_codec, q, dk / TQ_BLOCK, scratch->x[h].query + (size_t) i * plan->query);
            scratch->x[h].max[i] = -INFINITY;
            scratch->x[h].sum[i] = 0.0f;
        }
        memset(scratch->x[h].o, 0, (size_t) (tasks[h].n_vec * dv) * sizeof(float));
    }
    const int64_t end = min64(args->n_kv, (tasks[0].chunk + 1) * plan->chunk);
    for (int64_t t0 = tasks[0].chunk * plan->chunk; t0 < end; t0 += TILE) {
        visibility seen = ALL_SEEN;
        part p = { .t0 = t0, .n = (int) min64(TILE, end - t0) };
        do {
            runs k, v;
            find_runs(&args->k, tasks[0].kv_stream, tasks[0].row0, tasks[0].row0 + plan->rows, &p, &k);
            find_runs(&args->v, tasks[0].kv_stream, tasks[0].row0, tasks[0].row0 + plan->rows, &p, &v);
            for (int h = 0; h < n_tasks; ++h) {
                if (h == 0 || args->n_mask_head > 1) {
                    seen = tile_visibility(args, plan, &tasks[h], p.t0, p.n);
                }
                if (seen != NONE_SEEN) {
                    fused_tile(kernel, args, plan, &tasks[h], &scratch->x[h], scratch->s, &p, seen, &k, &v);
                }
            }
        } while (once_more(&p));
    }
    for (int h = 0; h < n_tasks; ++h) {
        const vectors * own = &scratch->x[h];
        for (int i = 0; i < tasks[h].n_vec; ++i) {
            put_result(kernel, args, plan, &tasks[h], i, own->max[i], own->sum[i], own->o + i * dv,
                       partials != NULL ? partials + (size_t) h * plan->partial : NULL);
        }
    }
}

/* Zeroes the rows of V that none of the task's vectors sees: they may hold infinities, which a weight of 0 does not
 * cancel. */
static void drop_unseen(const tq_attn * args, const tqi_plan * plan, const tqi_task * task, int64_t t0, int n,
                        float * v) {
    uint8_t seen[TILE] = { 0 };
    for (int i = 0; i < task->n_vec; ++i) {
        const uint16_t * mask =
            mask_row(args, task->q_stream, task->head0 + i % plan->group, task->row0 + i / plan->group) + t0;
        for (int j = 0; j < n; ++j) {
            seen[j] |= mask[j] != F16_NEGATIVE_INFINITY;
        }
    }
    for (int j = 0; j < n; ++j) {
        if (!seen[j]) {
            memset(v + (size_t) j * (size_t) args->v.head_dim, 0, (size_t) args->v.head_dim * sizeof(float));
        }
    }
}

/* The steps for a tile whose rows all lie in blocks, if the kernel has them; NULL otherwise. */
static const tqi_tiles * tiles_of(const tqi_kernels * kernel, const tqi_codec * codec, const runs * from) {
    const int in_blocks = codec != NULL && (from == NULL || (from->n == 1 && from->r[0].rows == NULL));
    return in_blocks ? tqi_steps_of(kernel, codec)->tiles : NULL;
}

/* One task's share of a tile. */
static void tiled_part(const tqi_kernels * kernel, const tq_attn * args, const tqi_plan * plan, const tqi_task * task,
                       const tqi_scratch * scratch, part * p) {
    const int dk = (int) args->k.head_dim, dv = (int) args->v.head_dim, n_col = plan->n_col;
    const int64_t row1 = task->row0 + plan->rows;
    const vectors * own = &scratch->x[0];
    const visibility seen = tile_visibility(args, plan, task, p->t0, p->n);
    if (seen == NONE_SEEN) {
        return;
    }
    runs k, v;
    find_runs(&args->k, task->kv_stream, task->row0, row1, p, &k);
    find_runs(&args->v, task->kv_stream, task->row0, row1, p, &v);
    const tqi_tiles * tiles = tiles_of(kernel, plan->k_codec, &k);
    if (tiles != NULL) {
        tiles->scores(plan->k_codec, operand_at(&args->k, task->kv_stream, task->kv_head, p->t0), args->k.stride_token,
                      p->n, own->query, dk / TQ_BLOCK, n_col, scratch->s);
    } else {
        decode_tile(kernel, &args->k, plan->k_codec, task->kv_stream, task->kv_head, p->t0, &k, scratch->tile);
        kernel->gemm(scratch->tile, dk, 1, own->q, p->n, dk, n_col, 0, scratch->s);
    }
    for (int i = 0; i < task->n_vec; ++i) {
        finish_vector(args, plan, task, p, seen, i, scratch->s + i, n_col);
    }
    for (int i = task->n_vec; i < n_col; ++i) { /* columns that are no vectors see nothing */
        for (int t = 0; t < p->n; ++t) {
            scratch->s[t * n_col + i] = -INFINITY;
        }
    }
    kernel->softmax_columns(scratch->s, p->n, n_col, own->max, own->sum, scratch->factor);
    tiles = tiles_of(kernel, plan->v_codec, &v);
    if (tiles != NULL) {
        tiles->accumulate(plan->v_codec, operand_at(&args->v, task->kv_stream, task->kv_head, p->t0),
                          args->v.stride_token, p->n, scratch->s, scratch->factor, dv / TQ_BLOCK, n_col, own->o);
        return;
    }
    for (int j = 0; j < dv; ++j) {
        for (int i = 0; i < n_col; ++i) {
            own->o[j * n_col + i] *= scratch->factor[i];
        }
    }
    decode_tile(kernel, &args->v, plan->v_codec, task->kv_stream, task->kv_head, p->t0, &v, scratch->tile);
    if (seen == MIXED && plan->v_codec == NULL) {
        drop_unseen(args, plan, task, p->t0, p->n, scratch->tile);
    }
    kernel->gemm(scratch->tile, 1, dv, scratch->s, dv, p->n, n_col, 1, own->o);
}

static void run_tiled(const tqi_kernels * kernel, const tq_attn * args, const tqi_plan * plan, const tqi_task * task,
                      const tqi_scratch * scratch, float * partial) {
    const int dk = (int) args->k.head_dim, dv = (int) args->v.head_dim, n_col = plan->n_col;
    const vectors * own = &scratch->x[0];
    memset(own->q, 0, (size_t) dk * (size_t) n_col * sizeof(float));
    memset(own->o, 0, (size_t) dv * (size_t) n_col * sizeof(float));
    for (int i = 0; i < n_col; ++i) {
        own->max[i] = -INFINITY;
        own->sum[i] = 0.0f;
    }
    for (int i = 0; i < task->n_vec; ++i) {
        load_vector(kernel, args, plan, task, i, scratch->row);
        for (int j = 0; j < dk; ++j) {
            own->q[j * n_col + i] = scratch->row[j];
        }
    }
    const tqi_tiles * tiles = tiles_of(kernel, plan->k_codec, NULL);
    if (tiles != NULL) {
        tiles->load_queries(plan->k_codec, own->q, dk / TQ_BLOCK, n_col, own->query);
    }
    const int64_t end = min64(args->n_kv, (task->chunk + 1) * plan->chunk);
    for (int64_t t0 = task->chunk * plan->chunk; t0 < end; t0 += TILE) {
        part p = { .t0 = t0, .n = (int) min64(TILE, end - t0) };
        do {
            tiled_part(kernel, args, plan, task, scratch, &p);
        } while (once_more(&p));
    }
    for (int i = 0; i < task->n_vec; ++i) {
        for (int j = 0; j < dv; ++j) {
            scratch->row[j] = own->o[j * n_col + i];
        }
        put_result(kernel, args, plan, task, i, own->max[i], own->sum[i], scratch->row, partial);
    }
}

/* Merges the partial results of one task's chunks; first is its task of chunk 0, the others follow n_head tasks
 * apart. */
static void merge_chunks(const tqi_kernels * kernel, const tq_attn * args, const tqi_plan * plan, int64_t first,
                         const float * partials, float * o) {
    const tqi_task t = task_of(args, plan, first);
    const size_t dv = (size_t) args->v.head_dim;
    const size_t next = (size_t) args->k.n_head * plan->partial;
    for (int i = 0; i < t.n_vec; ++i) {
        const float * at = partials + (size_t) first * plan->partial + (size_t) i * (dv + 2);
        float max = -INFINITY, sum = 0.0f;
        for (int64_t c = 0; c < plan->n_chunks; ++c) {
            max = fmaxf(max, at[(size_t) c * next]);
        }
        memset(o, 0, dv * sizeof(float));
        for (int64_t c = 0; c < plan->n_chunks; ++c) {
            const float * found = at + (size_t) c * next;
            if (found[0] == -INFINITY && found[1] == 0.0f) {
                continue; /* no key seen */
            }
            const float factor = expf(found[0] - max);
            sum += factor * found[1];
            for (size_t j = 0; j < dv; ++j) {
                o[j] += factor * found[2 + j];
            }
        }
        write_output(kernel, args, plan, &t, i, max, sum, o);
    }
}

/* This thread's share of the tasks. Tasks of neighbouring KV heads go through the keys together. */
static void run_tasks(const tqi_kernels * kernel, const tq_attn * args, const tqi_plan * plan, int thread,
                      int n_threads, const tqi_scratch * scratch, float * partials) {
    const int64_t end = plan->n_tasks * (thread + 1) / n_threads;
    for (int64_t i = plan->n_tasks * thread / n_threads; i < end;) {
        tqi_task tasks[MAX_SPAN];
        const int n = (int) min64(min64(plan->span, end - i), args->k.n_head - i % args->k.n_head);
        tasks[0] = task_of(args, plan, i);
        for (int h = 1; h < n; ++h) {
            tasks[h] = task_of(args, plan, i + h);
        }
        float * partial = plan->partial > 0 ? partials + (size_t) i * plan->partial : NULL;
        if (plan->fused) {
            run_fused(kernel, args, plan, tasks, n, scratch, partial);
        } else {
            run_tiled(kernel, args, plan, tasks, scratch, partial);
        }
        i += n;
    }
}

int tq_attn_compute(const tq_attn * args, int phase, int thread, int n_threads, void * work) {
    tqi_plan plan;
    if (args == NULL || work == NULL) {
        return tqi_fail(TQ_E_ARGUMENT, "null pointer given for the attention arguments or the scratch");
    }
    TQI_TRY(tqi_plan_make(args, n_threads, &plan));
    if (thread < 0 || thread >= n_threads || phase < 0 || phase > 1) {
        return tqi_fail(TQ_E_ARGUMENT, "phase %d of thread %d of %d given; phases are 0 and 1, threads from 0 to %d",
                        phase, thread, n_threads, n_threads - 1);
    }
    if (args->n_q > 0 && (args->q.data == NULL || args->out == NULL ||
                          (args->n_kv > 0 && (args->k.data == NULL || args->v.data == NULL)))) {
        return tqi_fail(TQ_E_ARGUMENT, "null pointer given for q, k, v or out");
    }
    const tqi_kernels * kernel = tqi_active();
    const tqi_scratch scratch = carve(args, &plan, work, thread);
    float * partials = aligned(work) + plan.scratch * (size_t) n_threads;
    if (phase == 0) {
        run_tasks(kernel, args, &plan, thread, n_threads, &scratch, partials);
    } else if (plan.partial > 0) {
        const int64_t n = plan.n_tasks / plan.n_chunks, n_head = args->k.n_head;
        for (int64_t i = n * thread / n_threads; i < n * (thread + 1) / n_threads; ++i) {
            merge_chunks(kernel, args, &plan, i / n_head * n_head * plan.n_chunks + i % n_head, partials, scratch.row);
        }
    }
    return TQ_OK;
}
