/* attention_plan.c: see attention_plan.h. */
#include "attention_plan.h"

#include "error.h"

#define TILED_VECTORS 64 /* query vectors that a tiled task aims at */
#define CHUNK_MIN 256    /* keys: a shorter range is not worth a partial result */

static int check_tail(const char * name, const tq_attn * args, const tq_attn_operand * x, const tqi_codec * codec) {
    if (x->tail.data == NULL) {
        return TQ_OK;
    }
    if (codec == NULL && x->decoder == NULL) {
        return tqi_fail(TQ_E_ARGUMENT,
                        "%s: a tail given beside type %d; only types of tqgguf and those with a decoder have one", name,
                        x->type);
    }
    if (x->tail.owner == NULL || x->tail.n_recent < 1 || x->tail.n_first < 0 || x->tail.n_recent > INT32_MAX ||
        x->tail.n_first > INT32_MAX) {
        return tqi_fail(TQ_E_ARGUMENT,
                        "%s: a tail with owner %s, n_recent = %lld, n_first = %lld given; it needs owners, at least 1 "
                        "recent row and at least 0 first ones",
                        name, x->tail.owner == NULL ? "null" : "given", (long long) x->tail.n_recent,
                        (long long) x->tail.n_first);
    }
    if (x->tail.n_own != 0 && (x->tail.n_own != args->n_q || args->q.n_stream != args->k.n_stream)) {
        return tqi_fail(TQ_E_ARGUMENT,
                        "%s: a tail with n_own = %lld given for %lld query rows in %lld streams, and %lld streams of "
                        "keys; a batch has a row for each query row, in as many streams",
                        name, (long long) x->tail.n_own, (long long) args->n_q, (long long) args->q.n_stream,
                        (long long) args->k.n_stream);
    }
    return TQ_OK;
}

static int check_operand(const char * name, const tq_attn_operand * x, const tqi_codec ** codec) {
    *codec = NULL;
    if (x->head_dim <= 0 || x->head_dim > TQ_MAX_HEAD_DIM || x->n_head <= 0 || x->n_head > TQ_MAX_HEADS ||
        x->n_stream <= 0 || x->n_stream > TQ_MAX_HEADS) {
        return tqi_fail(
            TQ_E_ARGUMENT,
            "%s: head_dim %lld, n_head %lld, n_stream %lld given; each must be positive, at most %d, %d, %d", name,
            (long long) x->head_dim, (long long) x->n_head, (long long) x->n_stream, TQ_MAX_HEAD_DIM, TQ_MAX_HEADS,
            TQ_MAX_HEADS);
    }
    if (x->decoder != NULL || x->type == TQ_TYPE_F32 || x->type == TQ_TYPE_F16) {
        return TQ_OK;
    }
    *codec = tqi_codec_get(x->type, x->mode);
    if (*codec == NULL) {
        return tqi_fail(TQ_E_ARGUMENT, "%s: type %d in mode %d needs a decoder", name, x->type, x->mode);
    }
    if (x->head_dim % TQ_BLOCK != 0) {
        return tqi_fail(TQ_E_ARGUMENT, "%s: head_dim = %lld given; %s needs a multiple of %d", name,
                        (long long) x->head_dim, tq_type_name(x->type), TQ_BLOCK);
    }
    return TQ_OK;
}

/* Checks the arguments and finds the codecs of K and V, NULL for types that are not of tqgguf. */
static int check_arguments(const tq_attn * args, int n_threads, const tqi_codec ** k_codec,
                           const tqi_codec ** v_codec) {
    const tqi_codec * q_codec;
    TQI_TRY(check_operand("q", &args->q, &q_codec));
    TQI_TRY(check_operand("k", &args->k, k_codec));
    TQI_TRY(check_operand("v", &args->v, v_codec));
    if (args->q.type != TQ_TYPE_F32 || args->q.decoder != NULL) {
        return tqi_fail(TQ_E_ARGUMENT, "q: type %d given; allowed is f32", args->q.type);
    }
    if (args->q.head_dim != args->k.head_dim || args->k.n_head != args->v.n_head ||
        args->q.n_head % args->k.n_head != 0 || args->k.n_stream != args->v.n_stream ||
        args->q.n_stream % args->k.n_stream != 0) {
        return tqi_fail(
            TQ_E_ARGUMENT,
            "q (%lld, %lld, %lld), k (%lld, %lld, %lld), v (.., %lld, %lld) given as (head_dim, n_head, "
            "n_stream); head_dim of q and k, heads and streams of k and v must be equal, and q's a multiple of them",
            (long long) args->q.head_dim, (long long) args->q.n_head, (long long) args->q.n_stream,
            (long long) args->k.head_dim, (long long) args->k.n_head, (long long) args->k.n_stream,
            (long long) args->v.n_head, (long long) args->v.n_stream);
    }
    if (args->n_q < 0 || args->n_kv < 0 || args->n_q > INT32_MAX || args->n_kv > INT32_MAX || n_threads <= 0 ||
        n_threads > 65536) {
        return tqi_fail(TQ_E_ARGUMENT,
                        "n_q = %lld, n_kv = %lld, n_threads = %d given; allowed are counts from 0 to 2^31 - 1 and 1 to "
                        "65536 threads",
                        (long long) args->n_q, (long long) args->n_kv, n_threads);
    }
    if (args->mask != NULL && (args->n_mask_head <= 0 || args->n_mask_stream <= 0)) {
        return tqi_fail(TQ_E_ARGUMENT, "n_mask_head = %lld, n_mask_stream = %lld given; both must be positive",
                        (long long) args->n_mask_head, (long long) args->n_mask_stream);
    }
    TQI_TRY(check_tail("k", args, &args->k, *k_codec));
    TQI_TRY(check_tail("v", args, &args->v, *v_codec));
    const tq_attn_tail *k = &args->k.tail, *v = &args->v.tail;
    if (k->data != NULL && v->data != NULL && (k->n_own > 0 || v->n_own > 0) &&
        (k->n_recent != v->n_recent || k->n_first != v->n_first || k->n_own != v->n_own)) {
        return tqi_fail(
            TQ_E_ARGUMENT,
            "tails of %lld, %lld, %lld and %lld, %lld, %lld recent, first and own rows given for K and V; in "
            "a batch both must have as many",
            (long long) k->n_recent, (long long) k->n_first, (long long) k->n_own, (long long) v->n_recent,
            (long long) v->n_first, (long long) v->n_own);
    }
    return check_tail("q", args, &args->q, NULL);
}

int tqi_plan_make(const tq_attn * args, int n_threads, tqi_plan * plan) {
    memset(plan, 0, sizeof *plan);
    TQI_TRY(check_arguments(args, n_threads, &plan->k_codec, &plan->v_codec));
    const size_t dk = (size_t) args->k.head_dim, dv = (size_t) args->v.head_dim;

    plan->group = (int) (args->q.n_head / args->k.n_head);
    if (args->n_q * plan->group <= TQI_MAX_FUSED) {
        plan->rows = args->n_q > 0 ? (int) args->n_q : 1;
    } else {
        plan->rows = plan->group <= TILED_VECTORS / 2 ? TILED_VECTORS / plan->group : 1;
        plan->rows = (int) min64(plan->rows, args->n_q > 0 ? args->n_q : 1);
    }
    plan->n_vec = plan->group * plan->rows;
    plan->fused = plan->k_codec != NULL && plan->v_codec != NULL && plan->n_vec <= TQI_MAX_FUSED;
    plan->n_col = plan->fused ? plan->n_vec : (plan->n_vec + TQI_LANES - 1) / TQI_LANES * TQI_LANES;
    plan->n_row_blocks = (args->n_q + plan->rows - 1) / plan->rows;

    /* cut the keys only as far as it takes to give every thread the same number of tasks */
    const int64_t whole = args->q.n_stream * args->k.n_head * plan->n_row_blocks;
    plan->n_chunks = 1;
    if (whole > 0 && whole % n_threads != 0 && whole < 8 * n_threads) {
        const int64_t most = (args->n_kv + CHUNK_MIN - 1) / CHUNK_MIN;
        plan->n_chunks = min64(n_threads, most > 0 ? most : 1);
    }
    plan->chunk = ((args->n_kv + plan->n_chunks - 1) / plan->n_chunks + TILE - 1) / TILE * TILE;
    plan->n_chunks = plan->chunk > 0 ? (args->n_kv + plan->chunk - 1) / plan->chunk : 1;
    plan->n_tasks = whole * plan->n_chunks;
    plan->partial = plan->n_chunks > 1 ? padded((size_t) plan->n_vec * (dv + 2)) : 0;

    const size_t n = (size_t) plan->n_col;
    plan->span = plan->fused ? (int) min64(args->k.n_head, MAX_SPAN) : 1;
    plan->query = plan->fused             ? TQI_QUERY_FLOATS(dk / TQ_BLOCK)
                  : plan->k_codec != NULL ? TQI_TILE_QUERY * (dk / TQ_BLOCK)
                                          : 0;
    plan->vectors = padded(dk * n) + padded(plan->query * n) + padded(dv * n) + 2 * padded(n);
    plan->scratch = (size_t) plan->span * plan->vectors + padded(TILE * n) + padded(n) + padded(dk > dv ? dk : dv);
    if (!plan->fused) {
        plan->scratch += padded(TILE * (dk > dv ? dk : dv));
    }
    return TQ_OK;
}

/* Makes room for any smaller number of threads, too: a thread pool may start fewer than it was sized for, and how keys
 * are cut depends on their number. */
size_t tq_attn_work_bytes(const tq_attn * args, int n_threads) {
    size_t most = 0;
    if (args == NULL) {
        tqi_fail(TQ_E_ARGUMENT, "null pointer given for the attention arguments");
        return 0;
    }
    for (int n = n_threads; n >= 1 || n == n_threads; --n) {
        tqi_plan p;
        if (tqi_plan_make(args, n, &p) != TQ_OK) {
            return 0;
        }
        const size_t n_floats = p.scratch * (size_t) n + p.partial * (size_t) p.n_tasks;
        most = n_floats > most ? n_floats : most;
    }
    return most * sizeof(float) + ALIGN;
}
