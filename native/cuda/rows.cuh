/* rows.cuh: kernels over tensors: encode, decode and transform, a team of eight threads per block of 32 values. */
#ifndef TQ_ROWS_CUH
#define TQ_ROWS_CUH

#include "decode.cuh"
#include "trellis.cuh"

#define TQ_ROW_THREADS 128

struct tq_rows {
    tq_cuda_view  src, dst;
    tq_cuda_index rows;
    tqi_codec     codec;       /* of dst for encode, of src for decode */
    tqi_codec     source;      /* encode from another type of ours */
    int           indexed;
    int           source_ours;
    int           transformed;
    int64_t       n_blocks;
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
    const uint8_t * at = (const uint8_t *) rows.data + p.i1 * (int64_t) rows.nb[0] + p.i2 % rows.ne[1] * (int64_t) rows.nb[1] +
                         p.i3 % rows.ne[2] * (int64_t) rows.nb[2];
    const int64_t   n  = rows.type == TQ_CUDA_TYPE_I64 ? *(const int64_t *) (const void *) at : *(const int32_t *) (const void *) at;
    return n >= 0 && n < n_rows ? n : -1;
}

TQ_HD float tq_load_value(int type, const uint8_t * at) {
    switch (type) {
        case TQ_TYPE_F32: return *(const float *) (const void *) at;
        case TQ_TYPE_F16: return tq_f16_to_f32(*(const uint16_t *) (const void *) at);
        default:          return tq_bf16_to_f32(*(const uint16_t *) (const void *) at);
    }
}

TQ_HD void tq_store_value(int type, float x, uint8_t * at) {
    switch (type) {
        case TQ_TYPE_F32: *(float *) (void *) at = x; break;
        case TQ_TYPE_F16: *(uint16_t *) (void *) at = tq_f32_to_f16(x); break;
        default:          *(uint16_t *) (void *) at = tq_f32_to_bf16(x); break;
    }
}

/* Values l, l + 8, ... of the 32 from flat index i on; rows that are no whole blocks are looked up value by value. */
TQ_HD uint8_t * tq_value_address(const tq_cuda_view & x, const tq_place & p, int64_t i, int j) {
    if (x.ne[0] % TQ_BLOCK == 0) {
        return tq_address(x, 1, p) + j * (int64_t) x.nb[0];
    }
    return tq_address(x, 1, tq_place_of(x, i + j));
}

template <int BITS, int TRELLIS> TQ_D void tq_encode_rows(const tq_rows & r, tq_tables * tables, tq_tables * source, tq_trellis_scratch * w,
                                                          int n_threads) {
    const int     l     = tq_thread() % TQ_TEAM;
    const int64_t b     = (int64_t) tq_block_x() * (n_threads / TQ_TEAM) + tq_thread() / TQ_TEAM;
    const int64_t i     = (b < r.n_blocks ? b : r.n_blocks - 1) * TQ_BLOCK;
    bool          store = b < r.n_blocks;
    float         v[TQ_VALUES];

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
    const int      l     = tq_thread() % TQ_TEAM;
    const int64_t  b     = (int64_t) tq_block_x() * (TQ_ROW_THREADS / TQ_TEAM) + tq_thread() / TQ_TEAM;
    const int64_t  i     = (b < r.n_blocks ? b : r.n_blocks - 1) * TQ_BLOCK;
    const tq_place to    = tq_place_of(r.dst, i);
    tq_place       from  = to;
    bool           found = true;
    float          v[TQ_VALUES];

    tq_fill_tables(r.codec, tables);
    if (r.indexed) {
        from.i1 = tq_row_number(r.rows, to, r.src.ne[1]);
        found   = from.i1 >= 0;
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

struct tq_vectors {
    const float * x;
    float *       y;
    int64_t       n_blocks;
    int           signs_first;
};

TQ_D void tq_transform_rows(const tq_vectors & p) {
    const int     l = tq_thread() % TQ_TEAM;
    const int64_t b = (int64_t) tq_block_x() * (TQ_ROW_THREADS / TQ_TEAM) + tq_thread() / TQ_TEAM;
    const float * x = p.x + (b < p.n_blocks ? b : p.n_blocks - 1) * TQ_BLOCK;
    float         v[TQ_VALUES];
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
