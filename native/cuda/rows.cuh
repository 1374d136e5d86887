/* rows.cuh: kernels over tensors: encode, decode and transform, a team of eight threads per block of 32 values. */
#ifndef TQI_ROWS_CUH
#define TQI_ROWS_CUH

#include "layout.h"
#include "trellis.cuh"

#define TQI_ROW_THREADS 128

struct tqi_rows {
    tq_cuda_view src, dst;
    tq_cuda_index rows;
    tqi_codec codec;  /* of dst for encode, of src for decode */
    tqi_codec source; /* encode from another type of ours */
    int indexed;
    int source_is_pqo;
    int transformed;
    int64_t n_blocks;
};

struct tqi_place {
    int64_t i0, i1, i2, i3;
};

/* Where flat index i lies, innermost dimension first. Divisions of 64 bits take dozens of instructions, hence the first
 * case. */
TQI_HD tqi_place tqi_place_of(const tq_cuda_view & x, int64_t i) {
    tqi_place p;
    if ((i | x.ne[0] | x.ne[1] | x.ne[2]) >> 32 == 0) {
        const uint32_t n0 = (uint32_t) x.ne[0], n1 = (uint32_t) x.ne[1], n2 = (uint32_t) x.ne[2];
        const uint32_t row = (uint32_t) i / n0, plane = row / n1, cube = plane / n2;
        p.i0 = (uint32_t) i - row * n0;
        p.i1 = row - plane * n1;
        p.i2 = plane - cube * n2;
        p.i3 = cube;
    } else {
        const int64_t row = i / x.ne[0], plane = row / x.ne[1], cube = plane / x.ne[2];
        p.i0 = i - row * x.ne[0];
        p.i1 = row - plane * x.ne[1];
        p.i2 = plane - cube * x.ne[2];
        p.i3 = cube;
    }
    return p;
}

/* unit: the values that nb[0] steps over */
TQI_HD uint8_t * tqi_address(const tq_cuda_view & x, int unit, const tqi_place & p) {
    return (uint8_t *) x.data + p.i0 / unit * (int64_t) x.nb[0] + p.i1 * (int64_t) x.nb[1] + p.i2 * (int64_t) x.nb[2] +
           p.i3 * (int64_t) x.nb[3];
}

/* The row number that goes with row (i1, i2, i3); -1 if it is not one of n_rows. */
TQI_HD int64_t tqi_row_number(const tq_cuda_index & rows, const tqi_place & p, int64_t n_rows) {
    const uint8_t * at = (const uint8_t *) rows.data + p.i1 * (int64_t) rows.nb[0] +
                         p.i2 % rows.ne[1] * (int64_t) rows.nb[1] + p.i3 % rows.ne[2] * (int64_t) rows.nb[2];
    const int64_t n =
        rows.type == TQ_CUDA_TYPE_I64 ? *(const int64_t *) (const void *) at : *(const int32_t *) (const void *) at;
    return n >= 0 && n < n_rows ? n : -1;
}

TQI_HD float tqi_load_value(int type, const uint8_t * at) {
    switch (type) {
        case TQ_TYPE_F32:
            return *(const float *) (const void *) at;
        case TQ_TYPE_F16:
            return tqi_f16_to_f32(*(const uint16_t *) (const void *) at);
        default:
            return tqi_bf16_to_f32(*(const uint16_t *) (const void *) at);
    }
}

/* Value i of a block of q8_0: its product with the scale is one rounding, as the CPU's. */
TQI_HD float tqi_load_q8_0(const uint8_t * block, int i) {
    return tqi_f16_to_f32(*(const uint16_t *) (const void *) block) * (float) ((const int8_t *) block)[2 + i];
}

TQI_HD void tqi_store_value(int type, float x, uint8_t * at) {
    switch (type) {
        case TQ_TYPE_F32:
            *(float *) (void *) at = x;
            break;
        case TQ_TYPE_F16:
            *(uint16_t *) (void *) at = tqi_f32_to_f16(x);
            break;
        default:
            *(uint16_t *) (void *) at = tqi_f32_to_bf16(x);
            break;
    }
}

/* Values l, l + 8, ... of the 32 from flat index i on; rows that are no whole blocks are looked up value by value. */
TQI_HD uint8_t * tqi_value_address(const tq_cuda_view & x, const tqi_place & p, int64_t i, int j) {
    if (x.ne[0] % TQ_BLOCK == 0) {
        return tqi_address(x, 1, p) + j * (int64_t) x.nb[0];
    }
    return tqi_address(x, 1, tqi_place_of(x, i + j));
}

template <int BITS, int TRELLIS>
TQI_D void tqi_encode_rows(const tqi_rows & r, tqi_tables * tables, tqi_tables * source, tqi_trellis_scratch * w,
                           int n_threads) {
    const int l = tqi_thread() % TQI_TEAM;
    const int64_t b = (int64_t) tqi_block_x() * (n_threads / TQI_TEAM) + tqi_thread() / TQI_TEAM;
    const int64_t i = (b < r.n_blocks ? b : r.n_blocks - 1) * TQ_BLOCK;
    bool store = b < r.n_blocks;
    float v[TQI_VALUES];

    tqi_fill_tables(r.codec, tables);
    const tqi_place from = tqi_place_of(r.src, i);
    if (r.source_is_pqo) {
        tqi_fill_tables(r.source, source);
        tqi_decode_block(r.source, source, tqi_address(r.src, TQ_BLOCK, from), 0, l, v);
    } else {
        TQI_UNROLL
        for (int m = 0; m < TQI_VALUES; ++m) {
            v[m] = tqi_load_value(r.src.type, tqi_value_address(r.src, from, i, l + TQI_TEAM * m));
        }
    }
    tqi_place to = from;
    if (r.indexed) {
        to.i1 = tqi_row_number(r.rows, from, r.dst.ne[1]);
        store = store && to.i1 >= 0;
    } else {
        to = tqi_place_of(r.dst, i);
    }
    uint8_t * block = tqi_address(r.dst, TQ_BLOCK, to);
    if (TRELLIS) {
        TQI_UNROLL
        for (int m = 0; m < TQI_VALUES; ++m) {
            v[m] = tqi_sanitize(v[m]);
        }
        tqi_transform(r.codec.signs == TQI_SIGNS_FIRST, v, l);
        tqi_trellis_search(r.codec, tables, BITS, v, w, l, store, block);
    } else {
        tqi_encode_block(r.codec, tables, BITS, v, l, store, block);
    }
}

TQI_D void tqi_decode_rows(const tqi_rows & r, tqi_tables * tables) {
    const int l = tqi_thread() % TQI_TEAM;
    const int64_t b = (int64_t) tqi_block_x() * (TQI_ROW_THREADS / TQI_TEAM) + tqi_thread() / TQI_TEAM;
    const int64_t i = (b < r.n_blocks ? b : r.n_blocks - 1) * TQ_BLOCK;
    const tqi_place to = tqi_place_of(r.dst, i);
    tqi_place from = to;
    bool found = true;
    float v[TQI_VALUES];

    tqi_fill_tables(r.codec, tables);
    if (r.indexed) {
        from.i1 = tqi_row_number(r.rows, to, r.src.ne[1]);
        found = from.i1 >= 0;
        from.i1 = found ? from.i1 : 0;
    } else {
        from = tqi_place_of(r.src, i);
    }
    tqi_decode_block(r.codec, tables, tqi_address(r.src, TQ_BLOCK, from), r.transformed, l, v);
    if (b < r.n_blocks) {
        TQI_UNROLL
        for (int m = 0; m < TQI_VALUES; ++m) {
            tqi_store_value(r.dst.type, found ? v[m] : 0.0f, tqi_value_address(r.dst, to, i, l + TQI_TEAM * m));
        }
    }
}

/* ---- Precise tails ---- */

#define TQI_TAIL_THREADS 128

struct tqi_tail_writes {
    tq_cuda_view src;
    tq_cuda_index rows;
    tq_cuda_tail tail;
    int signs_first;
};

/* The row of all streams' tails that row i of src goes to, and its cell in all streams; -1 if it goes nowhere. */
TQI_HD int tqi_tail_target(const tqi_tail_writes & w, int64_t i, int * cell) {
    const tqi_place p = { 0, i, 0, 0 };
    *cell = (int) tqi_row_number(w.rows, p, w.tail.n_cells * w.tail.n_stream);
    if (*cell < 0) {
        return -1;
    }
    const uint32_t stream = (uint32_t) *cell / (uint32_t) w.tail.n_cells,
                   token = (uint32_t) *cell - stream * (uint32_t) w.tail.n_cells;
    return (int) (stream * (uint32_t) (w.tail.n_recent + w.tail.n_first)) +
           tqi_tail_row_of(w.tail.n_recent, w.tail.n_first, (int) token);
}

/* Values l, l + 8, ... of a block, transformed, to f16 as rows of a tail have it. */
TQI_D void tqi_store_tail(int signs_first, float * v, int l, bool store, uint16_t * to) {
    TQI_UNROLL
    for (int m = 0; m < TQI_VALUES; ++m) {
        v[m] = tqi_sanitize(v[m]);
    }
    tqi_transform(signs_first, v, l);
    TQI_UNROLL
    for (int m = 0; m < TQI_VALUES; ++m) {
        if (store) {
            to[l + TQI_TEAM * m] = tqi_f32_to_f16(tqi_sanitize(v[m]));
        }
    }
}

/* Row i of src, (n_values, n_rows), as a row of a tail; all threads of a block, of which the last may have nothing to
 * do. */
TQI_D void tqi_encode_tail_row(const tq_cuda_view & src, int signs_first, int64_t i, uint16_t * to) {
    const int l = tqi_thread() % TQI_TEAM, n_blocks = (int) (src.ne[0] / TQ_BLOCK);
    TQI_NO_UNROLL
    for (int first = 0; first < n_blocks; first += TQI_TAIL_THREADS / TQI_TEAM) {
        const int b = first + tqi_thread() / TQI_TEAM < n_blocks ? first + tqi_thread() / TQI_TEAM : n_blocks - 1;
        const tqi_place p = { b * TQ_BLOCK, i, 0, 0 };
        float v[TQI_VALUES];
        TQI_UNROLL
        for (int m = 0; m < TQI_VALUES; ++m) {
            v[m] = tqi_load_value(src.type, tqi_address(src, 1, p) + (l + TQI_TEAM * m) * (int64_t) src.nb[0]);
        }
        tqi_store_tail(signs_first, v, l, first + tqi_thread() / TQI_TEAM < n_blocks, to + b * TQ_BLOCK);
    }
}

/* A block of threads per row of src. It writes nothing if a later row goes to the same place: the order in which blocks
 * run then does not matter. */
TQI_D void tqi_encode_tail(const tqi_tail_writes & w) {
    const int64_t i = tqi_block_x(), n = w.src.ne[1];
    int cell, other, later = 0;
    const int target = tqi_tail_target(w, i, &cell);
    for (int64_t j = i + 1 + tqi_thread(); target >= 0 && j < n && !later; j += TQI_TAIL_THREADS) {
        later = tqi_tail_target(w, j, &other) == target;
    }
    if (tqi_sync_or(later) || target < 0) {
        return;
    }
    const int n_row = (int) (w.tail.n_recent + w.tail.n_first), stream = target / n_row, row = target % n_row;
    uint16_t * to = (uint16_t *) (void *) ((uint8_t *) w.tail.data + stream * (int64_t) w.tail.stride_stream +
                                           row * (int64_t) w.tail.stride_row);
    tqi_encode_tail_row(w.src, w.signs_first, i, to);
    if (tqi_thread() == 0) {
        int32_t * owner =
            (int32_t *) (void *) ((uint8_t *) w.tail.owner + stream * (int64_t) w.tail.owner_stride_stream);
        owner[row] = cell % (int) w.tail.n_cells + 1;
    }
}

/* The rows that a batch reads: those from before it, and one for each of its tokens. */
struct tqi_batch_rows {
    tq_cuda_view src; /* (n_values, n_own * n_stream) */
    tq_cuda_view dst; /* f16, (n_values, n_row + n_own, n_stream) */
    tq_cuda_tail tail;
    int signs_first;
};

/* A block of threads per row of dst. */
TQI_D void tqi_copy_batch_rows(const tqi_batch_rows & w) {
    const int row = tqi_block_x(), stream = tqi_block_y(), n_row = (int) (w.tail.n_recent + w.tail.n_first);
    const tqi_place p = { 0, row, stream, 0 };
    uint16_t * to = (uint16_t *) (void *) tqi_address(w.dst, 1, p);
    if (row >= n_row) {
        const int64_t n_own = w.dst.ne[1] - n_row;
        tqi_encode_tail_row(w.src, w.signs_first, stream * n_own + row - n_row, to);
        return;
    }
    const uint16_t * from =
        (const uint16_t *) (const void *) ((const uint8_t *) w.tail.data + stream * (int64_t) w.tail.stride_stream +
                                           row * (int64_t) w.tail.stride_row);
    for (int i = tqi_thread(); i < w.dst.ne[0]; i += TQI_TAIL_THREADS) {
        to[i] = from[i];
    }
}

/* tq_tail_batch's integers, for the streams of a batch. */
struct tqi_batch_index {
    tq_cuda_tail tail;
    tq_cuda_index rows; /* (n_own * n_stream): cells of all streams */
    int64_t base;       /* the first of the batch's first stream */
    int n_own;
    int32_t * index;
    int64_t stride_stream; /* of index, in bytes */
};

/* The cell that token i of a stream's batch goes to; what is out of range stays so. */
TQI_HD int tqi_batch_cell(const tqi_batch_index & w, int stream, int i) {
    const tqi_place p = { 0, (int64_t) stream * w.n_own + i, 0, 0 };
    return (int) (tqi_row_number(w.rows, p, INT32_MAX) - w.base - stream * w.tail.n_cells);
}

/* A thread per row of the copy, the batch's own included. */
TQI_D void tqi_find_batch_index(const tqi_batch_index & w) {
    const int stream = tqi_block_y(), e = tqi_block_x() * TQI_TAIL_THREADS + tqi_thread(), n_own = w.n_own;
    const int n_row = (int) (w.tail.n_recent + w.tail.n_first), n = n_row + n_own, own = e - n_row;
    int32_t * owners = (int32_t *) (void *) ((uint8_t *) w.index + stream * w.stride_stream);
    const int32_t * before = (const int32_t *) (const void *) ((const uint8_t *) w.tail.owner +
                                                               stream * (int64_t) w.tail.owner_stride_stream);
    if (e >= n) {
        return;
    }
    const int cell = own >= 0 ? tqi_batch_cell(w, stream, own) : 0;
    const int row = own >= 0 ? tqi_tail_row_of(w.tail.n_recent, w.tail.n_first, cell) : e;
    int until = n_own, rank = 0;
    for (int i = n_own - 1; i >= 0; --i) {
        const int other = tqi_batch_cell(w, stream, i);
        until = i > own && tqi_tail_row_of(w.tail.n_recent, w.tail.n_first, other) == row ? i : until;
        rank += other < cell || (other == cell && i < own);
    }
    owners[e] = own >= 0 ? cell + 1 : before[e];
    owners[n + e] = until;
    if (own >= 0) {
        owners[2 * n + rank] = own;
    }
}

struct tqi_tail_reads {
    tq_attn_tail tail;
    tq_cuda_view dst;
    int signs_first;
};

/* A block of threads per row of a stream's tail. */
TQI_D void tqi_decode_tail(const tqi_tail_reads & r) {
    const int row = tqi_block_x(), stream = tqi_block_y(), l = tqi_thread() % TQI_TEAM;
    const int32_t * owner = (const int32_t *) (const void *) ((const uint8_t *) r.tail.owner +
                                                              stream * (int64_t) r.tail.owner_stride_stream);
    const int token = owner[row] - 1, per_head = (int) (r.dst.ne[0] / TQ_BLOCK),
              n_blocks = per_head * (int) r.dst.ne[1];
    if (token < 0 || token >= r.dst.ne[2] || tqi_tail_row_of(r.tail.n_recent, r.tail.n_first, token) != row) {
        return;
    }
    TQI_NO_UNROLL
    for (int first = 0; first < n_blocks; first += TQI_TAIL_THREADS / TQI_TEAM) {
        const bool store = first + tqi_thread() / TQI_TEAM < n_blocks;
        const int b = store ? first + tqi_thread() / TQI_TEAM : n_blocks - 1, head = b / per_head;
        const tqi_place p = { b % per_head * TQ_BLOCK, head, token, stream };
        const uint8_t * from = (const uint8_t *) r.tail.data + stream * (int64_t) r.tail.stride_stream +
                               row * (int64_t) r.tail.stride_row + head * (int64_t) r.tail.stride_head + 2 * p.i0;
        float v[TQI_VALUES];
        TQI_UNROLL
        for (int m = 0; m < TQI_VALUES; ++m) {
            v[m] = tqi_f16_to_f32(((const uint16_t *) (const void *) from)[l + TQI_TEAM * m]);
        }
        tqi_inverse_transform(r.signs_first, v, l);
        TQI_UNROLL
        for (int m = 0; m < TQI_VALUES; ++m) {
            if (store) {
                tqi_store_value(r.dst.type, v[m],
                                tqi_address(r.dst, 1, p) + (l + TQI_TEAM * m) * (int64_t) r.dst.nb[0]);
            }
        }
    }
}

/* ---- Transform ---- */

struct tqi_vectors {
    const float * x;
    float * y;
    int64_t n_blocks;
    int signs_first;
};

TQI_D void tqi_transform_rows(const tqi_vectors & p) {
    const int l = tqi_thread() % TQI_TEAM;
    const int64_t b = (int64_t) tqi_block_x() * (TQI_ROW_THREADS / TQI_TEAM) + tqi_thread() / TQI_TEAM;
    const float * x = p.x + (b < p.n_blocks ? b : p.n_blocks - 1) * TQ_BLOCK;
    float v[TQI_VALUES];
    TQI_UNROLL
    for (int m = 0; m < TQI_VALUES; ++m) {
        v[m] = x[l + TQI_TEAM * m];
    }
    tqi_transform(p.signs_first, v, l);
    if (b < p.n_blocks) {
        TQI_UNROLL
        for (int m = 0; m < TQI_VALUES; ++m) {
            p.y[b * TQ_BLOCK + l + TQI_TEAM * m] = v[m];
        }
    }
}

/* ---- Launching ---- */

/* Launches as many blocks of threads as n blocks of values, or n values, need: each takes per_block. */
template <typename P>
int tqi_launch_each(void (*kernel)(P), const char * name, int64_t n, int per_block, int threads, void * stream,
                    const P & parameter) {
    const int64_t n_blocks = n / per_block + (n % per_block != 0);
    if (n_blocks > INT32_MAX) {
        return tq_cuda_fail(TQ_E_ARGUMENT, "%s: %lld blocks or values given; one launch takes %lld", name,
                            (long long) n, (long long) INT32_MAX * per_block);
    }
    const tqi_grid grid = { (unsigned) n_blocks, 1, 1 };
    return n == 0 ? TQ_OK : tqi_launch(kernel, name, grid, threads, 0, stream, parameter);
}

#endif
