/* attention_plan.cpp: checks the arguments of attention and decides on tiles and splits. Host code only. */
#include "attention_plan.h"

#include <initializer_list>

#define MAX_SPLITS 1024

/* ---- Arguments ---- */

static int grain_of(uintptr_t all) {
    return all % 16 == 0 ? 16 : all % 8 == 0 ? 8 : all % 4 == 0 ? 4 : 2;
}

/* How rows are copied into shared memory, and how far apart they lie there. all: what the copies' addresses are sums
 * of.
 *
 * Copies of 16 bytes if tokens begin at multiples of 16: then a head's row, whose 56 bytes, say, do not, is copied
 * together with its neighbours' bytes up to the next multiples. They lie in the same sectors anyway, and it takes 4
 * copies, not 7. The space for it follows from the strides alone: the work buffer's size depends on it, and may be
 * asked for before there is any data. Where a row is an odd multiple of four words, the eight rows that a warp reads
 * side by side for K, and the four pairs of rows for V, lie in different banks. */
static void plan_rows(const tq_attn_operand * x, uintptr_t all, tqi_operand * o) {
    /* A head's neighbours are in the tensor, too. */
    const bool inside = (size_t) x->n_head * x->stride_head <= x->stride_token;
    const bool wide = (x->stride_token | x->stride_stream) % 16 == 0 &&
                      (inside ? x->stride_head % 4 : x->stride_head % 16) == 0 && o->row_bytes % 4 == 0;
    int bytes = o->row_bytes;
    for (int64_t h = 0; wide && h < 16 && h < x->n_head; ++h) {
        const int needed = tqi_round_up((int) (h * o->stride_head % 16) + o->row_bytes, 16);
        bytes = needed > bytes ? needed : bytes;
    }
    const int widest = grain_of(x->stride_token | x->stride_head | x->stride_stream | (uintptr_t) o->row_bytes);
    const int step = wide ? 16 : widest < 4 ? 4 : widest;
    o->stride_shared = tqi_round_up(bytes, step);
    o->stride_shared += o->stride_shared / 4 % 8 == 0 ? step : 0;
    o->grain = wide && (uintptr_t) x->data % 16 == 0 ? 16 : grain_of(all) == 16 ? 8 : grain_of(all);
    o->wide = wide;
    o->units = (o->grain == 16 ? bytes : o->row_bytes) / o->grain;
}

static int check_operand(const char * name, const tq_attn_operand * x, tqi_operand * o) {
    memset(o, 0, sizeof *o);
    if (x->decoder != NULL) {
        return tq_cuda_fail(TQ_E_UNSUPPORTED, "%s: types that need a decoder are not supported on CUDA", name);
    }
    if (x->head_dim <= 0 || x->head_dim > TQ_MAX_HEAD_DIM || x->n_head <= 0 || x->n_head > TQ_MAX_HEADS ||
        x->n_stream <= 0 || x->n_stream > TQ_MAX_HEADS) {
        return tq_cuda_fail(
            TQ_E_ARGUMENT,
            "%s: head_dim %lld, n_head %lld, n_stream %lld given; each must be positive, at most %d, %d, %d", name,
            (long long) x->head_dim, (long long) x->n_head, (long long) x->n_stream, TQ_MAX_HEAD_DIM, TQ_MAX_HEADS,
            TQ_MAX_HEADS);
    }
    if (x->head_dim % TQ_BLOCK != 0) {
        return tq_cuda_fail(TQ_E_UNSUPPORTED, "%s: head_dim = %lld given; CUDA attention needs a multiple of %d", name,
                            (long long) x->head_dim, TQ_BLOCK);
    }
    o->type = x->type;
    o->n_blocks = (int) (x->head_dim / TQ_BLOCK);
    if (x->type == TQ_TYPE_F16 || x->type == TQ_CUDA_TYPE_Q8_0) {
        o->row_bytes = o->n_blocks * tqi_block_bytes_of(x->type);
    } else {
        const tqi_codec * codec = tqi_codec_get(x->type, x->mode);
        if (codec == NULL) {
            return tq_cuda_fail(
                TQ_E_UNSUPPORTED,
                "%s: type %d in mode %d given; CUDA attention takes pqo3, pqo4, pqt2 to pqt5, f16 and q8_0", name,
                x->type, x->mode);
        }
        o->is_pqo = 1;
        o->signs_first = codec->signs == TQI_SIGNS_FIRST;
        o->row_bytes = o->n_blocks * codec->block_bytes;
        memcpy(o->levels, codec->levels, sizeof o->levels);
    }
    const uintptr_t all =
        (uintptr_t) x->data | x->stride_token | x->stride_head | x->stride_stream | (uintptr_t) o->row_bytes;
    if (all % 2 != 0) {
        return tq_cuda_fail(TQ_E_ARGUMENT, "%s: data at %p, strides %zu, %zu, %zu; all must be even", name, x->data,
                            x->stride_token, x->stride_head, x->stride_stream);
    }
    o->data = (const uint8_t *) x->data;
    o->stride_token = (int64_t) x->stride_token;
    o->stride_head = (int64_t) x->stride_head;
    o->stride_stream = (int64_t) x->stride_stream;
    plan_rows(x, all, o);
    return TQ_OK;
}

/* Rows count, not pointers: support is asked for before there is memory. */
static bool has_tail(const tq_attn_operand & x) {
    return x.tail.data != NULL || x.tail.n_recent != 0;
}

static int check_tail(const char * name, const tq_attn_operand * x, tqi_operand * o) {
    const tq_attn_tail & tail = x->tail;
    if (!has_tail(*x)) {
        return TQ_OK;
    }
    if (!o->is_pqo || tail.n_recent < 1 || tail.n_first < 0 || tail.n_recent > INT32_MAX / 2 ||
        tail.n_first > INT32_MAX / 2 ||
        ((uintptr_t) tail.data | tail.stride_row | tail.stride_head | tail.stride_stream) % 2 != 0 ||
        ((uintptr_t) tail.owner | tail.owner_stride_stream) % 4 != 0) {
        return tq_cuda_fail(
            TQ_E_ARGUMENT,
            "%s: a tail of %lld and %lld rows at %p, owners at %p, given beside type %d; it needs a type of "
            "tqgguf, at least 1 and 0 rows, even strides and owners at multiples of four",
            name, (long long) tail.n_recent, (long long) tail.n_first, tail.data, (const void *) tail.owner, x->type);
    }
    o->tail.data = (const uint8_t *) tail.data;
    o->tail.owner = tail.owner;
    o->tail.stride_row = (int64_t) tail.stride_row;
    o->tail.stride_head = (int64_t) tail.stride_head;
    o->tail.stride_stream = (int64_t) tail.stride_stream;
    o->tail.owner_stride = (int64_t) tail.owner_stride_stream / 4;
    return TQ_OK;
}

/* A batch's own rows: one for each query row. */
static int check_own(const tq_attn & args) {
    const tq_attn_operand &q = args.q, &k = args.k, &v = args.v;
    const int64_t n_own = has_tail(k) ? k.tail.n_own : has_tail(v) ? v.tail.n_own : 0;
    if (n_own != 0 && (n_own != args.n_q || q.n_stream != k.n_stream ||
                       (has_tail(k) && has_tail(v) && k.tail.n_own != v.tail.n_own))) {
        return tq_cuda_fail(TQ_E_ARGUMENT,
                            "tails with n_own = %lld (k) and %lld (v) given for %lld query rows in %lld streams, and "
                            "%lld streams of K and V; a batch has a row of its own for each query row",
                            (long long) k.tail.n_own, (long long) v.tail.n_own, (long long) args.n_q,
                            (long long) q.n_stream, (long long) k.n_stream);
    }
    return TQ_OK;
}

static int check_shapes(const tq_attn & args) {
    const tq_attn_operand &q = args.q, &k = args.k, &v = args.v;
    if (v.head_dim > TQ_CUDA_MAX_HEAD_DIM_V) {
        return tq_cuda_fail(TQ_E_UNSUPPORTED, "v: head_dim = %lld given; CUDA attention takes up to %d",
                            (long long) v.head_dim, TQ_CUDA_MAX_HEAD_DIM_V);
    }
    if (q.head_dim != k.head_dim || q.n_head <= 0 || q.n_head > TQ_MAX_HEADS || k.n_head != v.n_head ||
        q.n_head % k.n_head != 0 || k.n_stream != v.n_stream || q.n_stream <= 0 || q.n_stream > TQ_MAX_HEADS ||
        q.n_stream % k.n_stream != 0) {
        return tq_cuda_fail(
            TQ_E_ARGUMENT,
            "q (%lld, %lld, %lld), k (%lld, %lld, %lld), v (.., %lld, %lld) given as (head_dim, n_head, "
            "n_stream); head_dim of q and k, heads and streams of k and v must be equal, and q's a multiple of them",
            (long long) q.head_dim, (long long) q.n_head, (long long) q.n_stream, (long long) k.head_dim,
            (long long) k.n_head, (long long) k.n_stream, (long long) v.n_head, (long long) v.n_stream);
    }
    const int64_t group = q.n_head / k.n_head;
    if (args.n_q < 0 || args.n_kv < 0 || args.n_kv > INT32_MAX - TQI_MAX_TILE || args.n_q * group > 8 * 65535) {
        return tq_cuda_fail(TQ_E_ARGUMENT, "n_q = %lld, n_kv = %lld given; allowed are counts from 0 to %d and %d",
                            (long long) args.n_q, (long long) args.n_kv, (int) (8 * 65535 / group),
                            INT32_MAX - TQI_MAX_TILE);
    }
    return TQ_OK;
}

/* q, the mask and the output: their addresses and strides. */
static int check_plain(const tq_attn & args) {
    const tq_attn_operand & q = args.q;
    if (q.type != TQ_TYPE_F32 || q.decoder != NULL ||
        ((uintptr_t) q.data | q.stride_token | q.stride_head | q.stride_stream) % 4 != 0) {
        return tq_cuda_fail(TQ_E_ARGUMENT,
                            "q: type %d at %p, strides %zu, %zu, %zu given; it must be f32, at multiples of four",
                            q.type, q.data, q.stride_token, q.stride_head, q.stride_stream);
    }
    const uintptr_t mask =
        (uintptr_t) args.mask | args.mask_stride_row | args.mask_stride_head | args.mask_stride_stream;
    if (args.mask != NULL && (args.n_mask_head <= 0 || args.n_mask_stream <= 0 || args.n_mask_head > INT32_MAX ||
                              args.n_mask_stream > INT32_MAX || mask % 2 != 0)) {
        return tq_cuda_fail(TQ_E_ARGUMENT,
                            "mask: n_mask_head = %lld, n_mask_stream = %lld, strides %zu, %zu, %zu given; counts must "
                            "be positive and strides even",
                            (long long) args.n_mask_head, (long long) args.n_mask_stream, args.mask_stride_row,
                            args.mask_stride_head, args.mask_stride_stream);
    }
    if (((uintptr_t) args.out | args.out_stride_row | args.out_stride_head | args.out_stride_stream) % 4 != 0) {
        return tq_cuda_fail(TQ_E_ARGUMENT, "out: at %p, strides %zu, %zu, %zu given; all must be multiples of four",
                            (const void *) args.out, args.out_stride_row, args.out_stride_head, args.out_stride_stream);
    }
    return TQ_OK;
}

/* Checks all arguments; fills a's operands. */
static int check(const tq_attn * args, tqi_attention * a) {
    if (args == NULL) {
        return tq_cuda_fail(TQ_E_ARGUMENT, "null pointer given for the attention arguments");
    }
    TQI_TRY(check_operand("k", &args->k, &a->k));
    TQI_TRY(check_operand("v", &args->v, &a->v));
    TQI_TRY(check_tail("k", &args->k, &a->k));
    TQI_TRY(check_tail("v", &args->v, &a->v));
    if (!a->k.is_pqo && !a->v.is_pqo) {
        return tq_cuda_fail(TQ_E_UNSUPPORTED, "k and v are of types %d and %d; at least one must be of tqgguf's",
                            args->k.type, args->v.type);
    }
    TQI_TRY(check_shapes(*args));
    TQI_TRY(check_own(*args));
    return check_plain(*args);
}

/* What kernels read of the arguments as it is. */
static void take_arguments(const tq_attn & args, tqi_attention * a) {
    const tq_attn_operand &q = args.q, &k = args.k;
    a->q = (const uint8_t *) q.data;
    a->q_stride_row = (int64_t) q.stride_token;
    a->q_stride_head = (int64_t) q.stride_head;
    a->q_stride_stream = (int64_t) q.stride_stream;
    a->mask = (const uint8_t *) args.mask;
    a->mask_stride_row = (int64_t) args.mask_stride_row;
    a->mask_stride_head = (int64_t) args.mask_stride_head;
    a->mask_stride_stream = (int64_t) args.mask_stride_stream;
    a->n_mask_head = (int) args.n_mask_head;
    a->n_mask_stream = (int) args.n_mask_stream;
    a->sinks = args.sinks;
    a->out = (uint8_t *) args.out;
    a->out_stride_row = (int64_t) args.out_stride_row;
    a->out_stride_head = (int64_t) args.out_stride_head;
    a->out_stride_stream = (int64_t) args.out_stride_stream;
    a->scale = args.softcap > 0.0f ? args.scale / args.softcap : args.scale;
    a->softcap = args.softcap;
    a->max_bias = args.max_bias;
    a->n_kv = (int) args.n_kv;
    a->n_head = (int) q.n_head;
    a->n_head_kv = (int) k.n_head;
    a->n_stream = (int) q.n_stream;
    a->group = (int) (q.n_head / k.n_head);
    a->n_vec = (int) (a->group * args.n_q);
    a->streams_per_kv = (int) (q.n_stream / k.n_stream);
    a->heads_inverse = tqi_reciprocal_of(a->n_head_kv);
    a->group_inverse = tqi_reciprocal_of(a->group);
    a->n_tiles = a->n_vec <= 8 ? 1 : 2;
    a->n_own = (int) (has_tail(k) ? k.tail.n_own : has_tail(args.v) ? args.v.tail.n_own : 0);
}

/* ---- Tiles ---- */

static bool same_table(const tqi_operand & k, const tqi_operand & v) {
    return k.type == v.type && memcmp(k.levels, v.levels, sizeof k.levels) == 0;
}

/* Whether tqi_warp_stride leaves room for what is copied of a row by each of a team's warps. */
static bool fits_stage(const tqi_operand & x, int n_head, int team) {
    const int bytes = x.row_bytes / team;
    bool fits = true;
    for (int i = 0; x.wide && i < 16 * team; ++i) { /* beyond 16 heads leads are the same again */
        const int64_t begin = i / team * x.stride_head + i % team * bytes;
        fits = fits && (i / team >= n_head || (int) (begin % 16) + bytes <= 16 * tqi_wide_units(bytes));
    }
    return fits;
}

/* The number of blocks that a kernel is made for, or 0. One type in two modes would need two tables. A batch's own rows
 * of the tail, which some query rows read and others do not, are left to the other kernel: looking for them would take
 * a warp 70 to 110 instructions more for every tile of any call. */
static int fixed_blocks(const tqi_attention & a) {
    const bool pair = tqi_has_warp_kernel(a.k.type, a.v.type) && (a.k.type != a.v.type || same_table(a.k, a.v));
    const int n = a.k.n_blocks, team = tqi_team_of(n, a.n_tiles);
    const bool made = n == 2 || n == 4 || n == 8 || n == 16;
    return pair && made && a.n_own == 0 && a.v.n_blocks == n && fits_stage(a.k, a.n_head_kv, team) &&
                   fits_stage(a.v, a.n_head_kv, team)
               ? n
               : 0;
}

/* Shared memory where each warp has its own stages. */
static void lay_out_warps(tqi_attention * a, int n_stages) {
    const int blocks = a->blocks / a->team;
    a->tile = tqi_warp_step(a->team);
    a->n_stages = n_stages;
    a->shared_bytes = tqi_warp_shared_bytes(tqi_warp_layout_of(a->k.type, a->v.type, blocks, a->n_tiles, a->team),
                                            blocks, a->team, n_stages);
}

/* Shared memory for a choice of tile and stages. */
static void lay_out_block(tqi_attention * a, int tile, int n_stages) {
    const int n = 8 * a->n_tiles;
    int end = 0;
    const auto take = [&end](int bytes) {
        const int at = end;
        end += tqi_round_up(bytes, 16);
        return at;
    };
    a->tile = tile;
    a->n_stages = n_stages;
    a->one_table = same_table(a->k, a->v);
    take(tqi_table_bytes(a->k.type));
    a->at.v_table = a->one_table ? 0 : take(tqi_table_bytes(a->v.type));
    a->at.q = take(a->n_tiles * a->k.n_blocks * TQI_FRAGMENTS_BYTES);
    a->at.scores = take(n * tqi_scores_stride(tile) * 4);
    a->at.weights = take(n * tqi_weights_stride(tile) * 2);
    for (int * vectors : { &a->at.factors, &a->at.max, &a->at.sum, &a->at.scale, &a->at.slope }) {
        *vectors = take(n * 4);
    }
    a->at.stages = end;
    /* Unaligned reads go up to 8 bytes beyond a row. */
    a->at.v_in_stage = tqi_round_up(tile * a->k.stride_shared + 16, 16);
    a->at.stage_bytes = a->at.v_in_stage + tqi_round_up(tile * a->v.stride_shared + 16, 16);
    const int stages = n_stages * a->at.stage_bytes, sums = n * tqi_sum_stride(a->v.n_blocks) * 4;
    a->shared_bytes = end + (stages > sums ? stages : sums);
}

/* Blocks of threads that take all keys of their query vectors. */
static int64_t whole_blocks(const tqi_attention & a) {
    const int n = 8 * a.n_tiles;
    return (int64_t) a.n_stream * a.n_head_kv * ((a.n_vec + n - 1) / n);
}

/* Chooses a kernel, tiles and stages. Large tiles have fewer barriers per key, two stages hide the memory's latency;
 * both matter less than a second block of threads on the multiprocessor. Few keys: small tiles, so that more
 * multiprocessors have work. */
static bool choose_tiles(const tqi_cuda_limits & limits, tqi_attention * a) {
    static const int choices[][2] = { { 128, 2 }, { 64, 2 }, { 128, 1 }, { 64, 1 }, { 32, 1 } };
    const auto fits = [&](int wanted) {
        const size_t bytes = (size_t) a->shared_bytes;
        return bytes <= limits.shared_per_block && (size_t) wanted * (bytes + 1024) <= limits.shared_per_sm;
    };
    a->blocks = fixed_blocks(*a);
    a->team = tqi_team_of(a->blocks, a->n_tiles);
    for (int wanted = 2; a->blocks > 0 && wanted > 0; --wanted) {
        for (int n_stages = 3; n_stages > 1; --n_stages) {
            lay_out_warps(a, n_stages);
            if (fits(wanted)) {
                return true;
            }
        }
    }
    a->blocks = 0;
    const int first = whole_blocks(*a) * ((a->n_kv + 127) / 128) < limits.n_sm ? 1 : 0;
    for (int wanted = 2; wanted > 0; --wanted) {
        for (int i = first; i < 5; ++i) {
            lay_out_block(a, choices[i][0], choices[i][1]);
            if (fits(wanted)) {
                return true;
            }
        }
    }
    return false;
}

/* How threads share the copies of K and V. */
static void plan_copies(tqi_attention * a) {
    const int grain = a->k.grain < a->v.grain ? a->k.grain : a->v.grain;
    const int threads = a->blocks > 0 ? 32 : TQI_ATTENTION_THREADS;
    for (tqi_operand * x : { &a->k, &a->v }) {
        x->part_bytes = x->row_bytes;
        if (a->blocks > 0) { /* one kind of copy for both */
            x->part_bytes = x->row_bytes / a->team;
            x->stride_shared = tqi_warp_stride(x->type, a->blocks / a->team);
            x->grain = grain;
            x->units = grain == 16 ? tqi_wide_units(x->part_bytes) : x->part_bytes / grain;
        }
        x->rows_on = x->units < threads ? threads / x->units : 1;
        x->step = x->rows_on * x->stride_token;
        x->step_shared = x->rows_on * x->stride_shared;
        x->step_tile = a->tile * x->stride_token;
        x->units_inverse = (uint32_t) (((1ull << 32) + (unsigned) x->units - 1) / (unsigned) x->units);
    }
    const uintptr_t mask =
        (uintptr_t) a->mask | (uintptr_t) (a->mask_stride_row | a->mask_stride_head | a->mask_stride_stream);
    a->wide = grain == 16 && (a->mask == NULL || mask % 16 == 0);
}

/* Ranges of keys: one wave of blocks, and whole tiles. */
static void plan_splits(const tqi_cuda_limits & limits, tqi_attention * a) {
    const int64_t whole = whole_blocks(*a), tiles = a->n_kv > 0 ? (a->n_kv + a->tile - 1) / a->tile : 1;
    int64_t per_sm = (int64_t) (limits.shared_per_sm / ((size_t) a->shared_bytes + 1024));
    per_sm = per_sm < 1 ? 1 : per_sm > TQI_ATTENTION_BLOCKS ? TQI_ATTENTION_BLOCKS : per_sm;
    int64_t splits = whole > 0 ? limits.n_sm * per_sm / whole : 1;
    splits = splits < 1 ? 1 : splits > tiles ? tiles : splits;
    splits = splits > MAX_SPLITS ? MAX_SPLITS : splits;
    const int64_t each = (tiles + splits - 1) / splits;
    a->split = (int) (each * a->tile);
    a->n_splits = (int) ((tiles + each - 1) / each);
}

/* Both operands' tails, whose rows hold the same tokens unless one of them was disowned. */
static int plan_tails(const tq_attn_operand & k, const tq_attn_operand & v, tqi_attention * a) {
    const tq_attn_tail & tail = has_tail(k) ? k.tail : v.tail;
    a->n_parts = a->n_splits;
    if (!has_tail(k) && !has_tail(v)) {
        return TQ_OK;
    }
    const int64_t n = (tail.n_recent + tail.n_first + tail.n_own + TQI_TAIL_SLOTS - 1) / TQI_TAIL_SLOTS + a->n_splits;
    if ((has_tail(k) && has_tail(v) && (k.tail.n_recent != v.tail.n_recent || k.tail.n_first != v.tail.n_first)) ||
        n > 8192 || tqi_tail_shared_bytes((int) k.head_dim) > 48 * 1024) {
        return tq_cuda_fail(
            TQ_E_UNSUPPORTED,
            "tails of %lld and %lld rows (k), %lld and %lld (v), given for head_dim = %lld; on CUDA they "
            "are of one size, at most 200000, and head_dim at most 1024",
            (long long) k.tail.n_recent, (long long) k.tail.n_first, (long long) v.tail.n_recent,
            (long long) v.tail.n_first, (long long) k.head_dim);
    }
    a->n_recent = (int) tail.n_recent;
    a->n_first = (int) tail.n_first;
    a->recent_inverse = tqi_reciprocal_of(a->n_recent);
    a->n_parts = (int) n;
    return TQ_OK;
}

/* ---- The plan ---- */

int tqi_cuda_plan(const tq_attn * args, const tqi_cuda_limits & limits, tqi_attention * a) {
    memset(a, 0, sizeof *a);
    TQI_TRY(check(args, a));
    take_arguments(*args, a);
    if (!choose_tiles(limits, a)) {
        return tq_cuda_fail(
            TQ_E_UNSUPPORTED,
            "head_dim %lld and %lld of types %d and %d need %d bytes of shared memory; this device has %zu",
            (long long) args->k.head_dim, (long long) args->v.head_dim, args->k.type, args->v.type, a->shared_bytes,
            limits.shared_per_block);
    }
    plan_copies(a);
    plan_splits(limits, a);
    TQI_TRY(plan_tails(args->k, args->v, a));
    if ((int64_t) a->n_parts * a->n_head_kv > INT32_MAX || a->n_stream > 65535) {
        return tq_cuda_fail(TQ_E_ARGUMENT, "%d streams of %d KV heads in %d ranges given; a launch takes fewer",
                            a->n_stream, a->n_head_kv, a->n_parts);
    }
    return TQ_OK;
}

static size_t all_parts(const tqi_attention & a) {
    return (size_t) a.n_stream * (size_t) a.n_head_kv * (size_t) a.n_vec * (size_t) a.n_parts;
}

size_t tqi_cuda_plan_partials_at(const tqi_attention & a) {
    return (2 * all_parts(a) + 3) / 4 * 4;
}

size_t tqi_cuda_plan_work_bytes(const tqi_attention & a) {
    const size_t n_values = all_parts(a) * (size_t) (a.v.n_blocks * TQ_BLOCK);
    return a.n_parts == 1 ? 0 : (tqi_cuda_plan_partials_at(a) + n_values) * sizeof(float);
}
