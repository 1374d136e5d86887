/* tq_ggml_cpu.c: our types on ggml's CPU backend (libggml-cpu): row functions and the operators SET_ROWS, DUP/CPY and
 * FLASH_ATTN_EXT, all of them a translation of ggml's tensors and threads into calls of libtqgguf. */
#include "tq_ggml_attention.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"
#define TQ_GGML_LIBRARY "libggml-cpu"
#include "tq_ggml_abi.h"
#include "tqgguf.h"

#include <math.h>
#include <string.h>

static_assert(GGML_MAX_DIMS == 4, "the loops below know four dimensions");

/* Blocks converted at once through a buffer on the stack. */
#define TQ_RUN 16

/* ---- Rows ---- */

#define VEC_DOT(name, NAME)                                                                                            \
    void tq_ggml_cpu_vec_dot_##name(int n, float * s, size_t bs, const void * blocks, size_t bx, const void * y,       \
                                    size_t by, int nrc) {                                                              \
        GGML_ASSERT(nrc == 1 && n % TQ_GGML_BLOCK == 0);                                                               \
        GGML_UNUSED(bs);                                                                                               \
        GGML_UNUSED(bx);                                                                                               \
        GGML_UNUSED(by);                                                                                               \
        *s = tq_dot((int) GGML_TYPE_##NAME, TQ_MODE_SEARCH, blocks, (const float *) y, n);                             \
    }
TQ_GGML_TYPES(VEC_DOT)

/* ---- Tensors as a sequence of blocks ---- */

/* This thread's share [*begin, *end) of n items. */
static void share(const struct ggml_compute_params * params, int64_t n, int64_t * begin, int64_t * end) {
    *begin = n * params->ith / params->nth;
    *end = n * (params->ith + 1) / params->nth;
}

/* Address of the element with flat index i, in ggml's order of dimensions. For a type of ours i must be a block's
 * first. */
static char * element(const struct ggml_tensor * t, int64_t i) {
    const int64_t i0 = i % t->ne[0];
    const int64_t i1 = i / t->ne[0] % t->ne[1];
    const int64_t i2 = i / (t->ne[0] * t->ne[1]) % t->ne[2];
    const int64_t i3 = i / (t->ne[0] * t->ne[1] * t->ne[2]);
    return (char *) t->data + i0 / ggml_blck_size(t->type) * (int64_t) t->nb[0] + i1 * (int64_t) t->nb[1] +
           i2 * (int64_t) t->nb[2] + i3 * (int64_t) t->nb[3];
}

/* How many values from flat index i on lie in one stretch of memory; at most n, at least one block or one element. */
static int64_t stretch(const struct ggml_tensor * t, int64_t i, int64_t n) {
    if (t->nb[0] != ggml_type_size(t->type)) {
        return ggml_blck_size(t->type);
    }
    return MIN(n, t->ne[0] - i % t->ne[0]);
}

static void load(const struct ggml_tensor * t, int64_t i, int64_t n, float * x) {
    for (int64_t done = 0; done < n;) {
        const int64_t m = stretch(t, i + done, n - done);
        const char * from = element(t, i + done);
        switch (t->type) {
            case GGML_TYPE_F32:
                memcpy(x + done, from, (size_t) m * sizeof(float));
                break;
            case GGML_TYPE_F16:
                ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) from, x + done, m);
                break;
            case GGML_TYPE_BF16:
                ggml_cpu_bf16_to_fp32((const ggml_bf16_t *) from, x + done, m);
                break;
            default:
                tq_ggml_decode(t->type, from, x + done, m);
                break;
        }
        done += m;
    }
}

static void store(const struct ggml_tensor * t, int64_t i, int64_t n, const float * x) {
    for (int64_t done = 0; done < n;) {
        const int64_t m = stretch(t, i + done, n - done);
        ggml_get_type_traits_cpu(t->type)->from_float(x + done, element(t, i + done), m);
        done += m;
    }
}

/* ---- SET_ROWS ---- */

bool tq_ggml_set_rows_used(const struct ggml_tensor * dst) {
    return tq_ggml_is_pqo(dst->type) || tq_ggml_writes_tail(dst);
}

/* Blocks of a stock type are those that upstream's loop writes: each depends on its own values alone. */
static void encode(enum ggml_type type, const float * x, void * blocks, int64_t n) {
    if (tq_ggml_is_pqo(type)) {
        tq_ggml_encode(type, x, blocks, n);
    } else {
        ggml_get_type_traits_cpu(type)->from_float(x, blocks, n);
    }
}

static int64_t row_number(const struct ggml_tensor * idx, int64_t i1, int64_t i2, int64_t i3) {
    const char * at = (const char *) idx->data + i1 * (int64_t) idx->nb[0] + i2 % idx->ne[1] * (int64_t) idx->nb[1] +
                      i3 % idx->ne[2] * (int64_t) idx->nb[2];
    return idx->type == GGML_TYPE_I64 ? *(const int64_t *) at : *(const int32_t *) at;
}

/* The same values for a row of the tail; of a stock type as a cache of f16 holds them. */
static void encode_tail(enum ggml_type type, const float * x, int64_t n, uint16_t * row) {
    if (!tq_ggml_is_pqo(type)) {
        ggml_cpu_fp32_to_fp16(x, row, n);
    } else if (tq_tail_encode((int) type, TQ_MODE_SEARCH, x, n, row) != TQ_OK) {
        GGML_ABORT("%s", tq_last_error());
    }
}

/* Writes the values of a token, a row of src, as a row of the tail beside a type. */
static void store_tail(enum ggml_type type, const struct ggml_tensor * src, int64_t token, uint16_t * to) {
    float x[TQ_RUN * TQ_GGML_BLOCK];
    for (int64_t j = 0; j < src->ne[0]; j += TQ_RUN * TQ_GGML_BLOCK) {
        const int64_t m = MIN(src->ne[0] - j, TQ_RUN * TQ_GGML_BLOCK);
        load(src, token * src->ne[0] + j, m, x);
        encode_tail(type, x, m, to + j);
    }
}

/* Writes the same rows into the tail that dst has, and makes them its owners. A row of the tail belongs to one thread,
 * which goes through its tokens in their order: the last one stays. */
static void set_tail(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_tensor * src = dst->src[0];
    const struct ggml_tensor * idx = dst->src[1];
    struct ggml_tensor * rows = dst->src[3];
    struct ggml_tensor * owner = dst->src[4];

    GGML_ASSERT(src->ne[2] == 1 && src->ne[3] == 1 && src->ne[0] == rows->ne[0]);

    const int64_t n = src->ne[1];
    const int64_t n_cells = dst->ne[1] * dst->ne[2] / owner->ne[1]; /* of a stream; dst may be all streams in one */
    const int64_t n_first = MIN(TQ_GGML_TAIL_FIRST, n_cells);
    const int64_t n_recent = owner->ne[0] - n_first;

    for (int64_t i = 0; i < n; i++) {
        const int64_t cell = row_number(idx, i, 0, 0);
        const int64_t stream = cell / n_cells;
        const int64_t token = cell % n_cells;
        const int64_t row = tq_tail_row(n_recent, n_first, token);
        if ((stream * owner->ne[0] + row) % params->nth != params->ith) {
            continue;
        }
        if (token >= n_first && i + n_recent < n && row_number(idx, i + n_recent, 0, 0) == cell + n_recent &&
            token + n_recent < n_cells) {
            continue; /* a later token takes the row */
        }
        uint16_t * to =
            (uint16_t *) ((char *) rows->data + row * (int64_t) rows->nb[1] + stream * (int64_t) rows->nb[2]);
        store_tail(dst->type, src, i, to);
        *(int32_t *) ((char *) owner->data + row * (int64_t) owner->nb[0] + stream * (int64_t) owner->nb[1]) =
            (int32_t) (token + 1);
    }
}

/* src0: (n_values, n_rows, ne2, ne3) values, src1: (n_rows, ne2 / r2, ne3 / r3) row numbers in dst; src3, src4: see
 * tq_ggml_tail.h */
void tq_ggml_set_rows(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_tensor * src = dst->src[0];
    const struct ggml_tensor * idx = dst->src[1];

    GGML_ASSERT(src->type == GGML_TYPE_F32 || src->type == GGML_TYPE_F16);
    GGML_ASSERT(idx->type == GGML_TYPE_I64 || idx->type == GGML_TYPE_I32);
    GGML_ASSERT(src->ne[0] == dst->ne[0] && src->ne[0] % TQ_GGML_BLOCK == 0);
    GGML_ASSERT(src->nb[0] == ggml_type_size(src->type) && dst->nb[0] == ggml_type_size(dst->type));

    const int64_t n_blocks = src->ne[0] / TQ_GGML_BLOCK;
    float x[TQ_RUN * TQ_GGML_BLOCK];
    int64_t begin;
    int64_t end;

    share(params, n_blocks * ggml_nrows(src), &begin, &end);
    for (int64_t b = begin; b < end;) {
        const int64_t row = b / n_blocks;
        const int64_t i0 = b % n_blocks;
        const int64_t i1 = row % src->ne[1];
        const int64_t i2 = row / src->ne[1] % src->ne[2];
        const int64_t i3 = row / (src->ne[1] * src->ne[2]);

        const int64_t to_row = row_number(idx, i1, i2, i3);
        GGML_ASSERT(to_row >= 0 && to_row < dst->ne[1]);

        const char * from = (const char *) src->data + i1 * (int64_t) src->nb[1] + i2 * (int64_t) src->nb[2] +
                            i3 * (int64_t) src->nb[3];
        char * to = (char *) dst->data + i0 * (int64_t) dst->nb[0] + to_row * (int64_t) dst->nb[1] +
                    i2 * (int64_t) dst->nb[2] + i3 * (int64_t) dst->nb[3];

        int64_t run = MIN(end - b, n_blocks - i0);
        if (src->type == GGML_TYPE_F32) {
            encode(dst->type, (const float *) from + i0 * TQ_GGML_BLOCK, to, run * TQ_GGML_BLOCK);
        } else {
            run = MIN(run, TQ_RUN);
            ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) from + i0 * TQ_GGML_BLOCK, x, run * TQ_GGML_BLOCK);
            encode(dst->type, x, to, run * TQ_GGML_BLOCK);
        }
        b += run;
    }
    if (dst->src[3]) {
        set_tail(params, dst);
    }
}

/* ---- DUP, CPY ---- */

/* src0: (n_values, n_own * n_stream) of a batch, src1: rows of the tail */
static void copy_tail_rows(const struct ggml_compute_params * params, const struct ggml_tensor * dst) {
    const struct ggml_tensor * src = dst->src[0];
    const struct ggml_tensor * rows = dst->src[1];
    const int64_t n_own = dst->ne[1] - rows->ne[1];
    int64_t begin;
    int64_t end;

    share(params, dst->ne[1] * dst->ne[2], &begin, &end);
    for (int64_t i = begin; i < end; i++) {
        const int64_t row = i % dst->ne[1];
        const int64_t stream = i / dst->ne[1];
        uint16_t * to = (uint16_t *) ((char *) dst->data + row * (int64_t) dst->nb[1] + stream * (int64_t) dst->nb[2]);
        if (row < rows->ne[1]) {
            memcpy(to,
                   (const char *) rows->data + row * (int64_t) rows->nb[1] +
                       (stream + dst->op_params[1]) * (int64_t) rows->nb[2],
                   dst->nb[1]);
            continue;
        }
        store_tail((enum ggml_type) dst->op_params[2], src, stream * n_own + row - rows->ne[1], to);
    }
}

/* src0: owners of the tail, src1: (n_own * n_stream) cells of all streams */
static void copy_tail_index(const struct ggml_compute_params * params, const struct ggml_tensor * dst) {
    const struct ggml_tensor * owner = dst->src[0];
    const struct ggml_tensor * idx = dst->src[1];
    const int64_t n_own = idx->ne[0] / dst->ne[1];
    const int64_t n_cells = dst->op_params[2];
    const int64_t n_first = MIN(TQ_GGML_TAIL_FIRST, n_cells);

    for (int64_t s = params->ith; s < dst->ne[1]; s += params->nth) {
        const int64_t stream = s + dst->op_params[1];
        tq_tail_batch(owner->ne[0] - n_first, n_first,
                      (const int32_t *) ((const char *) owner->data + stream * (int64_t) owner->nb[1]),
                      (const int64_t *) idx->data + s * n_own, stream * n_cells, n_own,
                      (int32_t *) ((char *) dst->data + s * (int64_t) dst->nb[1]));
    }
}

/* A run of a view of the cache, with what its tail holds of it. */
typedef struct {
    char * blocks;
    uint16_t * row; /* NULL: the token owns none */
} cache_run;

/* Values of a view (n_values, n_head_kv, n_cells * n_stream) of the cache, from flat index i on. */
static cache_run run_at(const struct ggml_tensor * view, const struct ggml_tensor * rows,
                        const struct ggml_tensor * owner, int64_t i) {
    const struct ggml_tensor * cache = view->view_src;
    const int64_t n_cells = view->ne[2] / owner->ne[1];
    const int64_t n_first = MIN(TQ_GGML_TAIL_FIRST, n_cells);
    const int64_t token = i / (view->ne[0] * view->ne[1]);
    const int64_t stream = token / n_cells;
    const int64_t cell = token % n_cells;
    const int64_t row = tq_tail_row(owner->ne[0] - n_first, n_first, cell);
    char * blocks = element(view, i);
    const int64_t value = (blocks - (char *) cache->data) % (int64_t) cache->nb[1] /
                          (int64_t) ggml_type_size(cache->type) * ggml_blck_size(cache->type);
    const char * owners = (const char *) owner->data + stream * (int64_t) owner->nb[1];
    char * at = (char *) rows->data + row * (int64_t) rows->nb[1] + stream * (int64_t) rows->nb[2];
    return (cache_run) { blocks, ((const int32_t *) owners)[row] == cell + 1 ? (uint16_t *) at + value : NULL };
}

static void decode_run(enum ggml_type type, cache_run run, int64_t n, float * x) {
    if (!run.row) {
        ggml_get_type_traits(type)->to_float(run.blocks, x, n);
    } else if (!tq_ggml_is_pqo(type)) {
        ggml_cpu_fp16_to_fp32(run.row, x, n);
    } else if (tq_tail_decode((int) type, TQ_MODE_SEARCH, run.row, n, x) != TQ_OK) {
        GGML_ABORT("%s", tq_last_error());
    }
}

/* The two copies of a context shift: src3, src4: the tail's rows and owners */
static void copy_with_tail(const struct ggml_compute_params * params, const struct ggml_tensor * dst) {
    const struct ggml_tensor * src = dst->src[0];
    const bool reads = src->type != GGML_TYPE_F32;
    const struct ggml_tensor * view = reads ? src : dst;
    const struct ggml_tensor * other = reads ? dst : src;
    int64_t begin;
    int64_t end;

    GGML_ASSERT(ggml_is_contiguous(other) && other->type == GGML_TYPE_F32 && view->ne[3] == 1);
    share(params, ggml_nelements(view) / TQ_GGML_BLOCK, &begin, &end);
    for (int64_t i = begin * TQ_GGML_BLOCK; i < end * TQ_GGML_BLOCK;) {
        const int64_t n = stretch(view, i, MIN(end * TQ_GGML_BLOCK - i, TQ_RUN * TQ_GGML_BLOCK));
        const cache_run run = run_at(view, dst->src[3], dst->src[4], i);
        float * values = (float *) other->data + i;
        if (reads) {
            decode_run(view->type, run, n, values);
        } else {
            encode(view->type, values, run.blocks, n);
            if (run.row) {
                encode_tail(view->type, values, n, run.row);
            }
        }
        i += n;
    }
}

bool tq_ggml_dup_used(const struct ggml_tensor * dst) {
    if (tq_ggml_copies_tail(dst) || dst->src[3]) {
        return true;
    }
    const enum ggml_type from = dst->src[0]->type;
    const enum ggml_type to = dst->type;
    return from != to && (tq_ggml_is_pqo(from) || tq_ggml_is_pqo(to)) &&
           (tq_ggml_is_pqo(from) || tq_ggml_is_float(from)) && (tq_ggml_is_pqo(to) || tq_ggml_is_float(to));
}

void tq_ggml_dup(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_tensor * src = dst->src[0];

    if (tq_ggml_copies_tail(dst)) {
        if (dst->op_params[0] == TQ_GGML_TAIL_ROWS) {
            copy_tail_rows(params, dst);
        } else {
            copy_tail_index(params, dst);
        }
        return;
    }

    GGML_ASSERT(ggml_nelements(src) == ggml_nelements(dst));
    if (dst->src[3]) {
        copy_with_tail(params, dst);
        return;
    }

    const int64_t n = ggml_nelements(dst) / TQ_GGML_BLOCK;
    float x[TQ_RUN * TQ_GGML_BLOCK];
    int64_t begin;
    int64_t end;

    share(params, n, &begin, &end);
    for (int64_t b = begin; b < end; b += TQ_RUN) {
        const int64_t m = MIN(end - b, TQ_RUN) * TQ_GGML_BLOCK;
        load(src, b * TQ_GGML_BLOCK, m, x);
        store(dst, b * TQ_GGML_BLOCK, m, x);
    }
}

/* ---- MUL_MAT that mixes blocks ---- */

bool tq_ggml_mix_used(const struct ggml_tensor * dst) {
    return ggml_get_op_params_i32(dst, 1) == TQ_GGML_HINT_MIX;
}

void tq_ggml_mix(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_tensor * src = dst->src[1];
    const int64_t n = src->ne[0];
    const float scale = 1.0f / sqrtf((float) (n / TQ_GGML_BLOCK));
    int64_t begin;
    int64_t end;

    GGML_ASSERT(src->type == GGML_TYPE_F32 && ggml_is_contiguous(src) && ggml_is_contiguous(dst));
    share(params, ggml_nrows(src), &begin, &end);
    for (int64_t r = begin; r < end; r++) {
        const float * x = (const float *) src->data + r * n;
        float * y = (float *) dst->data + r * n;
        for (int64_t i = 0; i < n; i += 2 * TQ_GGML_BLOCK) {
            for (int64_t j = i; j < i + TQ_GGML_BLOCK; j++) {
                y[j] = (x[j] + x[j + TQ_GGML_BLOCK]) * scale;
                y[j + TQ_GGML_BLOCK] = (x[j] - x[j + TQ_GGML_BLOCK]) * scale;
            }
        }
        for (int64_t step = 2 * TQ_GGML_BLOCK; step < n; step *= 2) {
            for (int64_t i = 0; i < n; i += 2 * step) {
                for (int64_t j = i; j < i + step; j++) {
                    const float sum = y[j] + y[j + step];
                    y[j + step] = y[j] - y[j + step];
                    y[j] = sum;
                }
            }
        }
    }
}

/* ---- FLASH_ATTN_EXT ---- */

bool tq_ggml_flash_attn_ext_used(const struct ggml_tensor * dst) {
    return tq_ggml_attends(dst);
}

size_t tq_ggml_flash_attn_ext_work_size(const struct ggml_tensor * dst, int n_tasks) {
    if (!tq_ggml_flash_attn_ext_used(dst)) {
        return 0;
    }
    const struct tq_attn a = tq_ggml_attention(dst);
    const size_t bytes = tq_attn_work_bytes(&a, n_tasks);
    if (bytes == 0) {
        GGML_ABORT("%s", tq_last_error());
    }
    return bytes;
}

void tq_ggml_flash_attn_ext(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct tq_attn a = tq_ggml_attention(dst);

    for (int phase = 0; phase < 2; phase++) {
        if (phase == 1) {
            ggml_barrier(params->threadpool);
        }
        if (tq_attn_compute(&a, phase, params->ith, params->nth, params->wdata) != TQ_OK) {
            GGML_ABORT("%s", tq_last_error());
        }
    }
}
