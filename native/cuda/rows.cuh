/* rows.cuh: kernels over tensors: encode, decode and transform, a team of eight threads per block of 32 values. */
#ifndef TQ_ROWS_CUH
#define TQ_ROWS_CUH

#include "decode.cuh"
#include "trellis.cuh"

#define TQ_ROW_THREADS 128

struct tq_rows {
    tq_cuda_view src, dst;
    tq_cuda_index rows;
    tqi_codec codec;  /* of dst for encode, of src for decode */
    tqi_codec source; /* encode from another type of ours */
    int indexed;
    int source_ours;
    int transformed;
    int64_t n_blocks;
};

struct tq_place {
    int64_t i0, i1, i2, i3;
};

/* Where flat index i lies, innermost dimension first. Divisions of 64 bits take dozens of instructions, hence the first case. */
TQ_HD tq_place tq_place_of(const tq_cuda_view & x, int64_t i) {
    tq_place p;
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
TQ_HD uint8_t * tq_address(const tq_cuda_view & x, int unit, const tq_place & p) {
    return (uint8_t *) x.data + p.i0 / unit * (int64_t) x.nb[0] + p.i1 * (int64_t) x.nb[1] + p.i2 * (int64_t) x.nb[2] +
           p.i3 * (int64_t) x.nb[3];
}

/* The row number that goes with row (i1, i2, i3); -1 if it is not one of n_rows. */
TQ_HD int64_t tq_row_number(const tq_cuda_index & rows, const tq_place & p, int64_t n_rows) {
    const uint8_t * at = (const uint8_t *) rows.data + p.i1 * (int64_t) rows.nb[0] +
                         p.i2 % rows.ne[1] * (int64_t) rows.nb[1] + p.i3 % rows.ne[2] * (int64_t) rows.nb[2];
    const int64_t n =
        rows.type == TQ_CUDA_TYPE_I64 ? *(const int64_t *) (const void *) at : *(const int32_t *) (const void *) at;
    return n >= 0 && n < n_rows ? n : -1;
}

TQ_HD float tq_load_value(int type, const uint8_t * at) {
    switch (type) {
        case TQ_TYPE_F32:
            return *(const float *) (const void *) at;
        case TQ_TYPE_F16:
            return tq_f16_to_f32(*(const uint16_t *) (const void *) at);
        default:
            return tq_bf16_to_f32(*(const uint16_t *) (const void *) at);
    }
}

TQ_HD void tq_store_value(int type, float x, uint8_t * at) {
    switch (type) {
        case TQ_TYPE_F32:
            *(float *) (void *) at = x;
            break;
        case TQ_TYPE_F16:
            *(uint16_t *) (void *) at = tq_f32_to_f16(x);
            break;
        default:
            *(uint16_t *) (void *) at = tq_f32_to_bf16(x);
            break;
    }
}

/* Values l, l + 8, ... of the 32 from flat index i on; rows that are no whole blocks are looked up value by value. */
TQ_HD uint8_t * tq_value_address(const tq_cuda_view & x, const tq_place & p, int64_t i, int j) {
    if (x.ne[0] % TQ_BLOCK == 0) {
        return tq_address(x, 1, p) + j * (int64_t) x.nb[0];
    }
    return tq_address(x, 1, tq_place_of(x, i + j));
}

template <int BITS, int TRELLIS>
TQ_D void tq_encode_rows(const tq_rows & r, tq_tables * tables, tq_tables * source, tq_trellis_scratch * w,
                         int n_threads) {
    const int l = tq_thread() % TQ_TEAM;
    const int64_t b = (int64_t) tq_block_x() * (n_threads / TQ_TEAM) + tq_thread() / TQ_TEAM;
    const int64_t i = (b < r.n_blocks ? b : r.n_blocks - 1) * TQ_BLOCK;
    bool store = b < r.n_blocks;
    float v[TQ_VALUES];

    tq_fill_tables(r.codec, tables);
    const tq_place from = tq_place_of(r.src, i);
    if (r.source_ours) {
        tq_fill_tables(r.source, source);
        tq_decode_block(r.source, source, tq_address(r.src, TQ_BLOCK, from), 0, l, v);
    } else {
        TQ_UNROLL
        for (int m = 0; m < TQ_VALUES; ++m) {
            v[m] = tq_load_value(r.src.type, tq_value_address(r.src, from, i, l + TQ_TEAM * m));
        }
    }
    tq_place to = from;
    if (r.indexed) {
        to.i1 = tq_row_number(r.rows, from, r.dst.ne[1]);
        store = store && to.i1 >= 0;
    } else {
        to = tq_place_of(r.dst, i);
    }
    uint8_t * block = tq_address(r.dst, TQ_BLOCK, to);
    if (TRELLIS) {
        TQ_UNROLL
        for (int m = 0; m < TQ_VALUES; ++m) {
            v[m] = tq_sanitize(v[m]);
        }
        tq_transform(r.codec.signs == TQI_SIGNS_FIRST, v, l);
        tq_trellis_search(r.codec, tables, BITS, v, w, l, store, block);
    } else {
        tq_encode_block(r.codec, tables, BITS, v, l, store, block);
    }
}

TQ_D void tq_decode_rows(const tq_rows & r, tq_tables * tables) {
    const int l = tq_thread() % TQ_TEAM;
    const int64_t b = (int64_t) tq_block_x() * (TQ_ROW_THREADS / TQ_TEAM) + tq_thread() / TQ_TEAM;
    const int64_t i = (b < r.n_blocks ? b : r.n_blocks - 1) * TQ_BLOCK;
    const tq_place to = tq_place_of(r.dst, i);
    tq_place from = to;
    bool found = true;
    float v[TQ_VALUES];

    tq_fill_tables(r.codec, tables);
    if (r.indexed) {
        from.i1 = tq_row_number(r.rows, to, r.src.ne[1]);
        found = from.i1 >= 0;
        from.i1 = found ? from.i1 : 0;
    } else {
        from = tq_place_of(r.src, i);
    }
    tq_decode_block(r.codec, tables, tq_address(r.src, TQ_BLOCK, from), r.transformed, l, v);
    if (b < r.n_blocks) {
        TQ_UNROLL
        for (int m = 0; m < TQ_VALUES; ++m) {
            tq_store_value(r.dst.type, found ? v[m] : 0.0f, tq_value_address(r.dst, to, i, l + TQ_TEAM * m));
        }
    }
}

/* ---- Precise tails ---- */

#define TQ_TAIL_THREADS 128

struct tq_tail_writes {
    tq_cuda_view src;
    tq_cuda_index rows;
    tq_cuda_tail tail;
    int signs_first;
};

/* tq_tail_row, for tokens and rows below 2^31. */
TQ_HD int tq_tail_row_of(int64_t n_recent, int64_t n_first, int token) {
    return token < n_first ? (int) n_recent + token : (int) ((uint32_t) token % (uint32_t) n_recent);
}

/* The row of all streams' tails that row i of src goes to, and its cell in all streams; -1 if it goes nowhere. */
TQ_HD int tq_tail_target(const tq_tail_writes & w, int64_t i, int * cell) {
    const tq_place p = { 0, i, 0, 0 };
    *cell = (int) tq_row_number(w.rows, p, w.tail.n_cells * w.tail.n_stream);
    if (*cell < 0) {
        return -1;
    }
    const uint32_t stream = (uint32_t) *cell / (uint32_t) w.tail.n_cells,
                   token = (uint32_t) *cell - stream * (uint32_t) w.tail.n_cells;
    return (int) (stream * (uint32_t) (w.tail.n_recent + w.tail.n_first)) +
           tq_tail_row_of(w.tail.n_recent, w.tail.n_first, (int) token);
}

/* Values l, l + 8, ... of a block, transformed, to f16 as rows of a tail have it. */
TQ_D void tq_store_tail(int signs_first, float * v, int l, bool store, uint16_t * to) {
    TQ_UNROLL
    for (int m = 0; m < TQ_VALUES; ++m) {
        v[m] = tq_sanitize(v[m]);
    }
    tq_transform(signs_first, v, l);
    TQ_UNROLL
    for (int m = 0; m < TQ_VALUES; ++m) {
        if (store) {
            to[l + TQ_TEAM * m] = tq_f32_to_f16(tq_sanitize(v[m]));
        }
    }
}

/* A block of threads per row of src. It writes nothing if a later row goes to the same place: the order in which blocks run
 * then does not matter. */
TQ_D void tq_encode_tail(const tq_tail_writes & w) {
    const int64_t i = tq_block_x(), n = w.src.ne[1];
    const int l = tq_thread() % TQ_TEAM, n_blocks = (int) (w.src.ne[0] / TQ_BLOCK);
    int cell, other, later = 0;
    const int target = tq_tail_target(w, i, &cell);
    for (int64_t j = i + 1 + tq_thread(); target >= 0 && j < n && !later; j += TQ_TAIL_THREADS) {
        later = tq_tail_target(w, j, &other) == target;
    }
    if (tq_sync_or(later) || target < 0) {
        return;
    }
    const int n_row = (int) (w.tail.n_recent + w.tail.n_first), stream = target / n_row, row = target % n_row;
    uint16_t * to = (uint16_t *) (void *) ((uint8_t *) w.tail.data + stream * (int64_t) w.tail.stride_stream +
                                           row * (int64_t) w.tail.stride_row);
    TQ_NO_UNROLL
    for (int first = 0; first < n_blocks; first += TQ_TAIL_THREADS / TQ_TEAM) {
        const int b = first + tq_thread() / TQ_TEAM < n_blocks ? first + tq_thread() / TQ_TEAM : n_blocks - 1;
        const tq_place p = { b * TQ_BLOCK, i, 0, 0 };
        float v[TQ_VALUES];
        TQ_UNROLL
        for (int m = 0; m < TQ_VALUES; ++m) {
            v[m] = tq_load_value(w.src.type, tq_address(w.src, 1, p) + (l + TQ_TEAM * m) * (int64_t) w.src.nb[0]);
        }
        tq_store_tail(w.signs_first, v, l, first + tq_thread() / TQ_TEAM < n_blocks, to + b * TQ_BLOCK);
    }
    if (tq_thread() == 0) {
        int32_t * owner =
            (int32_t *) (void *) ((uint8_t *) w.tail.owner + stream * (int64_t) w.tail.owner_stride_stream);
        owner[row] = cell % (int) w.tail.n_cells + 1;
    }
}

struct tq_tail_reads {
    tq_attn_tail tail;
    tq_cuda_view dst;
    int signs_first;
};

/* A block of threads per row of a stream's tail. */
TQ_D void tq_decode_tail(const tq_tail_reads & r) {
    const int row = tq_block_x(), stream = tq_block_y(), l = tq_thread() % TQ_TEAM;
    const int32_t * owner = (const int32_t *) (const void *) ((const uint8_t *) r.tail.owner +
                                                              stream * (int64_t) r.tail.owner_stride_stream);
    const int token = owner[row] - 1, per_head = (int) (r.dst.ne[0] / TQ_BLOCK),
              n_blocks = per_head * (int) r.dst.ne[1];
    if (token < 0 || token >= r.dst.ne[2] || tq_tail_row_of(r.tail.n_recent, r.tail.n_first, token) != row) {
        return;
    }
    TQ_NO_UNROLL
    for (int first = 0; first < n_blocks; first += TQ_TAIL_THREADS / TQ_TEAM) {
        const bool store = first + tq_thread() / TQ_TEAM < n_blocks;
        const int b = store ? first + tq_thread() / TQ_TEAM : n_blocks - 1, head = b / per_head;
        const tq_place p = { b % per_head * TQ_BLOCK, head, token, stream };
        const uint8_t * from = (const uint8_t *) r.tail.data + stream * (int64_t) r.tail.stride_stream +
                               row * (int64_t) r.tail.stride_row + head * (int64_t) r.tail.stride_head + 2 * p.i0;
        float v[TQ_VALUES];
        TQ_UNROLL
        for (int m = 0; m < TQ_VALUES; ++m) {
            v[m] = tq_f16_to_f32(((const uint16_t *) (const void *) from)[l + TQ_TEAM * m]);
        }
        tq_inverse_transform(r.signs_first, v, l);
        TQ_UNROLL
        for (int m = 0; m < TQ_VALUES; ++m) {
            if (store) {
                tq_store_value(r.dst.type, v[m], tq_address(r.dst, 1, p) + (l + TQ_TEAM * m) * (int64_t) r.dst.nb[0]);
            }
        }
    }
}

/* ---- Transform ---- */

struct tq_vectors {
    const float * x;
    float * y;
    int64_t n_blocks;
    int signs_first;
};

TQ_D void tq_transform_rows(const tq_vectors & p) {
    const int l = tq_thread() % TQ_TEAM;
    const int64_t b = (int64_t) tq_block_x() * (TQ_ROW_THREADS / TQ_TEAM) + tq_thread() / TQ_TEAM;
    const float * x = p.x + (b < p.n_blocks ? b : p.n_blocks - 1) * TQ_BLOCK;
    float v[TQ_VALUES];
    TQ_UNROLL
    for (int m = 0; m < TQ_VALUES; ++m) {
        v[m] = x[l + TQ_TEAM * m];
    }
    tq_transform(p.signs_first, v, l);
    if (b < p.n_blocks) {
        TQ_UNROLL
        for (int m = 0; m < TQ_VALUES; ++m) {
            p.y[b * TQ_BLOCK + l + TQ_TEAM * m] = v[m];
        }
    }
}

#endif
