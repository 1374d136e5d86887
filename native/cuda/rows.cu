/* rows.cu: launches of encode, decode, transform, and of conversion between floats. Compiled with -fmad=false: see
 * encode.cuh. */
#include "rows.cuh"

/* ---- Kernels ---- */

template <int BITS> TQI_KERNEL(TQI_ROW_THREADS, 4) tqi_encode_kernel(TQI_PARAMETER tqi_rows r) {
    TQI_STATIC_SHARED tqi_tables tables[2];
    tqi_encode_rows<BITS, 0>(r, &tables[0], &tables[1], NULL, TQI_ROW_THREADS);
}

template <int BITS> TQI_KERNEL(TQI_TRELLIS_THREADS, 6) tqi_encode_trellis_kernel(TQI_PARAMETER tqi_rows r) {
    TQI_STATIC_SHARED tqi_tables tables[2];
    TQI_STATIC_SHARED tqi_trellis_scratch scratch;
    tqi_encode_rows<BITS, 1>(r, &tables[0], &tables[1], &scratch, TQI_TRELLIS_THREADS);
}

TQI_KERNEL(TQI_ROW_THREADS, 4) tqi_decode_kernel(TQI_PARAMETER tqi_rows r) {
    TQI_STATIC_SHARED tqi_tables tables;
    tqi_decode_rows(r, &tables);
}

TQI_KERNEL(TQI_TAIL_THREADS, 4) tqi_encode_tail_kernel(TQI_PARAMETER tqi_tail_writes w) {
    tqi_encode_tail(w);
}

TQI_KERNEL(TQI_TAIL_THREADS, 4) tqi_batch_rows_kernel(TQI_PARAMETER tqi_batch_rows w) {
    tqi_copy_batch_rows(w);
}

TQI_KERNEL(TQI_TAIL_THREADS, 4) tqi_batch_index_kernel(TQI_PARAMETER tqi_batch_index w) {
    tqi_find_batch_index(w);
}

TQI_KERNEL(TQI_TAIL_THREADS, 4) tqi_decode_tail_kernel(TQI_PARAMETER tqi_tail_reads r) {
    tqi_decode_tail(r);
}

TQI_KERNEL(TQI_ROW_THREADS, 4) tqi_transform_kernel(TQI_PARAMETER tqi_vectors p) {
    tqi_transform_rows(p);
}

struct tqi_conversion {
    tq_cuda_view src, dst;
    int64_t n;
};

TQI_KERNEL(TQI_ROW_THREADS, 4) tqi_convert_kernel(TQI_PARAMETER tqi_conversion c) {
    const int64_t i = (int64_t) tqi_block_x() * TQI_ROW_THREADS + tqi_thread();
    if (i < c.n) {
        const tqi_place from = tqi_place_of(c.src, i);
        const float x = c.src.type == TQ_CUDA_TYPE_Q8_0
                            ? tqi_load_q8_0(tqi_address(c.src, TQ_BLOCK, from), (int) (from.i0 % TQ_BLOCK))
                            : tqi_load_value(c.src.type, tqi_address(c.src, 1, from));
        tqi_store_value(c.dst.type, x, tqi_address(c.dst, 1, tqi_place_of(c.dst, i)));
    }
}

/* ---- Arguments ---- */

static int is_float(int type) {
    return type == TQ_TYPE_F32 || type == TQ_TYPE_F16 || type == TQ_CUDA_TYPE_BF16;
}

/* Blocks of a row lie side by side. */
static int check_blocks(const char * name, const tq_cuda_view * x, int bytes) {
    if (x->ne[0] % TQ_BLOCK != 0 || x->nb[0] != (size_t) bytes) {
        return tq_cuda_fail(TQ_E_ARGUMENT,
                            "%s: ne[0] = %lld, nb[0] = %zu given; blocks need a multiple of %d and %d bytes", name,
                            (long long) x->ne[0], x->nb[0], TQ_BLOCK, bytes);
    }
    return TQ_OK;
}

/* Checks one tensor; *codec is left NULL if it is of floats, or of q8_0, which is for conversion alone. */
static int check_view(const char * name, const tq_cuda_view * x, const tqi_codec ** codec, int64_t * n,
                      bool converted = false) {
    *codec = NULL;
    *n = 1;
    if (x == NULL) {
        return tq_cuda_fail(TQ_E_ARGUMENT, "null pointer given for %s", name);
    }
    for (int i = 0; i < 4; ++i) {
        if (x->ne[i] < 0 || x->ne[i] > INT64_MAX / 64 || (x->ne[i] > 0 && *n > INT64_MAX / 64 / x->ne[i])) {
            return tq_cuda_fail(TQ_E_ARGUMENT, "%s: ne[%d] = %lld given; allowed are counts from 0 on", name, i,
                                (long long) x->ne[i]);
        }
        *n *= x->ne[i];
    }
    size_t unit = x->type == TQ_TYPE_F32 ? 4 : 2;
    if (converted && x->type == TQ_CUDA_TYPE_Q8_0) {
        TQI_TRY(check_blocks(name, x, TQI_Q8_0_BYTES));
    } else if (!is_float(x->type)) {
        *codec = tqi_codec_get(x->type, x->mode);
        if (*codec == NULL) {
            return tq_cuda_fail(TQ_E_ARGUMENT,
                                "%s: type %d in mode %d given; allowed are f32, f16, bf16 and tqgguf's types", name,
                                x->type, x->mode);
        }
        TQI_TRY(check_blocks(name, x, (*codec)->block_bytes));
    }
    if (*n > 0 && x->data == NULL) {
        return tq_cuda_fail(TQ_E_ARGUMENT, "%s: null pointer given for its data", name);
    }
    if (((uintptr_t) x->data | x->nb[0] | x->nb[1] | x->nb[2] | x->nb[3]) % unit != 0) {
        return tq_cuda_fail(TQ_E_ARGUMENT, "%s: data at %p, strides %zu, %zu, %zu, %zu; all must be multiples of %zu",
                            name, x->data, x->nb[0], x->nb[1], x->nb[2], x->nb[3], unit);
    }
    return TQ_OK;
}

/* plain: the side whose rows are taken in turn; other: the side whose rows are numbered. */
static int check_rows(const tq_cuda_index * rows, const tq_cuda_view * plain, const tq_cuda_view * other) {
    if (rows->type != TQ_CUDA_TYPE_I32 && rows->type != TQ_CUDA_TYPE_I64) {
        return tq_cuda_fail(TQ_E_ARGUMENT, "rows: type %d given; allowed are i32 and i64", rows->type);
    }
    const size_t unit = rows->type == TQ_CUDA_TYPE_I64 ? 8 : 4;
    if (rows->data == NULL || ((uintptr_t) rows->data | rows->nb[0] | rows->nb[1] | rows->nb[2]) % unit != 0) {
        return tq_cuda_fail(TQ_E_ARGUMENT, "rows: data at %p, strides %zu, %zu, %zu; all must be multiples of %zu",
                            rows->data, rows->nb[0], rows->nb[1], rows->nb[2], unit);
    }
    if (rows->ne[0] < plain->ne[1] || rows->ne[1] <= 0 || rows->ne[2] <= 0 || plain->ne[0] != other->ne[0] ||
        plain->ne[2] > other->ne[2] || plain->ne[3] > other->ne[3]) {
        return tq_cuda_fail(TQ_E_ARGUMENT,
                            "rows: (%lld, %lld, %lld) of them for rows (%lld, %lld, %lld, %lld) and (%lld, %lld, %lld, "
                            "%lld); there must be one for each row, and the other dimensions must agree",
                            (long long) rows->ne[0], (long long) rows->ne[1], (long long) rows->ne[2],
                            (long long) plain->ne[0], (long long) plain->ne[1], (long long) plain->ne[2],
                            (long long) plain->ne[3], (long long) other->ne[0], (long long) other->ne[1],
                            (long long) other->ne[2], (long long) other->ne[3]);
    }
    return TQ_OK;
}

/* What encode and decode have in common: checks the views and fills r but for its codecs, which are NULL for floats.
 * plain, other: see check_rows. */
static int check_both(const tq_cuda_view * src, const tq_cuda_index * rows, const tq_cuda_view * dst, bool encode,
                      const tqi_codec ** from, const tqi_codec ** to, tqi_rows * r) {
    int64_t n_src, n_dst;
    memset(r, 0, sizeof *r);
    TQI_TRY(check_view("source", src, from, &n_src));
    TQI_TRY(check_view("target", dst, to, &n_dst));
    if (encode && *to == NULL) {
        return tq_cuda_fail(TQ_E_ARGUMENT, "target: type %d given; allowed are tqgguf's types", dst->type);
    }
    if (!encode && (*from == NULL || *to != NULL)) {
        return tq_cuda_fail(TQ_E_ARGUMENT, "types %d to %d given; decode goes from tqgguf's types to f32, f16 or bf16",
                            src->type, dst->type);
    }
    if (rows == NULL && n_src != n_dst) {
        return tq_cuda_fail(TQ_E_ARGUMENT, "%lld values given for %lld", (long long) n_src, (long long) n_dst);
    }
    if (rows != NULL) {
        TQI_TRY(check_rows(rows, encode ? src : dst, encode ? dst : src));
        r->rows = *rows;
    }
    r->src = *src;
    r->dst = *dst;
    r->n_blocks = (encode ? n_src : n_dst) / TQ_BLOCK;
    r->indexed = rows != NULL;
    return TQ_OK;
}

/* ---- Launches ---- */

static void (*encode_kernel_of(const tqi_codec & codec))(const tqi_rows) {
    if (!codec.trellis) {
        return codec.bits == 3 ? tqi_encode_kernel<3> : tqi_encode_kernel<4>;
    }
    switch (codec.bits) {
        case 2:
            return tqi_encode_trellis_kernel<2>;
        case 3:
            return tqi_encode_trellis_kernel<3>;
        case 4:
            return tqi_encode_trellis_kernel<4>;
        default:
            return tqi_encode_trellis_kernel<5>;
    }
}

extern "C" int tq_cuda_encode(const tq_cuda_view * src, const tq_cuda_index * rows, const tq_cuda_view * dst,
                              void * stream) {
    const tqi_codec *from, *to;
    tqi_rows r;
    TQI_TRY(check_both(src, rows, dst, true, &from, &to, &r));
    r.codec = *to;
    r.source_is_pqo = from != NULL;
    if (from != NULL) {
        r.source = *from;
    }
    const int threads = to->trellis ? TQI_TRELLIS_THREADS : TQI_ROW_THREADS;
    return tqi_launch_each(encode_kernel_of(*to), "encode", r.n_blocks, threads / TQI_TEAM, threads, stream, r);
}

extern "C" int tq_cuda_decode(const tq_cuda_view * src, const tq_cuda_index * rows, int transformed,
                              const tq_cuda_view * dst, void * stream) {
    const tqi_codec *from, *to;
    tqi_rows r;
    TQI_TRY(check_both(src, rows, dst, false, &from, &to, &r));
    r.codec = *from;
    r.transformed = transformed;
    return tqi_launch_each(tqi_decode_kernel, "decode", r.n_blocks, TQI_ROW_THREADS / TQI_TEAM, TQI_ROW_THREADS, stream,
                           r);
}

/* Where only a tail's rows, or only its owners, are read: what stands for the others. */
static const int32_t none = 0;

/* What all need of a tail: of its rows, and of its owners. */
static int check_tail(const void * data, const void * owner, int64_t n_recent, int64_t n_first, size_t strides,
                      size_t owner_stride) {
    if (data == NULL || owner == NULL || n_recent < 1 || n_first < 0 || n_recent > INT32_MAX / 2 ||
        n_first > INT32_MAX / 2 || ((uintptr_t) data | strides) % 2 != 0 ||
        ((uintptr_t) owner | owner_stride) % 4 != 0) {
        return tq_cuda_fail(TQ_E_ARGUMENT,
                            "a tail of %lld and %lld rows at %p, owners at %p given; needed are at least 1 and 0, even "
                            "strides of the rows and multiples of four of the owners",
                            (long long) n_recent, (long long) n_first, data, owner);
    }
    return TQ_OK;
}

extern "C" int tq_cuda_tail_encode(const tq_cuda_view * src, const tq_cuda_index * rows, int mode,
                                   const tq_cuda_tail * tail, void * stream) {
    const tqi_codec *from, *codec = tqi_codec_get(TQ_TYPE_PQO3, mode);
    int64_t n_src;
    TQI_TRY(check_view("source", src, &from, &n_src));
    if (codec == NULL || from != NULL || rows == NULL || tail == NULL || src->ne[0] % TQ_BLOCK != 0 ||
        src->ne[2] != 1 || src->ne[3] != 1) {
        return tq_cuda_fail(
            TQ_E_ARGUMENT,
            "source of type %d, (%lld, %lld, %lld, %lld), mode %d given; a tail takes floats in one plane, "
            "rows of whole blocks",
            src->type, (long long) src->ne[0], (long long) src->ne[1], (long long) src->ne[2], (long long) src->ne[3],
            mode);
    }
    TQI_TRY(check_rows(rows, src, src));
    TQI_TRY(check_tail(tail->data, tail->owner, tail->n_recent, tail->n_first, tail->stride_row | tail->stride_stream,
                       tail->owner_stride_stream));
    if (tail->n_cells < 1 || tail->n_stream < 1 || tail->n_cells > INT32_MAX / 2 / tail->n_stream ||
        tail->n_recent + tail->n_first > INT32_MAX / 2 / tail->n_stream || src->ne[1] > INT32_MAX) {
        return tq_cuda_fail(TQ_E_ARGUMENT, "%lld rows into %lld streams of %lld cells given; a launch takes 2^30 cells",
                            (long long) src->ne[1], (long long) tail->n_stream, (long long) tail->n_cells);
    }
    if (n_src == 0) {
        return TQ_OK;
    }
    const tqi_tail_writes w = { *src, *rows, *tail, codec->signs == TQI_SIGNS_FIRST };
    const tqi_grid grid = { (unsigned) src->ne[1], 1, 1 };
    return tqi_launch(tqi_encode_tail_kernel, "encoding a tail", grid, TQI_TAIL_THREADS, 0, stream, w);
}

extern "C" int tq_cuda_tail_batch_rows(const tq_cuda_view * src, int mode, const tq_cuda_tail * tail,
                                       const tq_cuda_view * dst, void * stream) {
    const tqi_codec *from, *to, *codec = tqi_codec_get(TQ_TYPE_PQO3, mode);
    int64_t n_src, n_dst;
    TQI_TRY(check_view("source", src, &from, &n_src));
    TQI_TRY(check_view("target", dst, &to, &n_dst));
    TQI_TRY(check_tail(tail->data, &none, tail->n_recent, tail->n_first, tail->stride_row | tail->stride_stream, 0));
    const int64_t n_own = dst->ne[1] - tail->n_recent - tail->n_first;
    if (codec == NULL || from != NULL || dst->type != TQ_TYPE_F16 || dst->nb[0] != 2 || src->ne[0] % TQ_BLOCK != 0 ||
        src->ne[0] != dst->ne[0] || src->ne[0] > INT32_MAX || src->ne[2] != 1 || src->ne[3] != 1 || n_own < 0 ||
        src->ne[1] != n_own * dst->ne[2] || dst->ne[1] > INT32_MAX || dst->ne[2] > 65535 || dst->ne[3] != 1) {
        return tq_cuda_fail(TQ_E_ARGUMENT,
                            "source (%lld, %lld), target of type %d (%lld, %lld, %lld), mode %d given for a tail of "
                            "%lld and %lld rows; a batch's copy is f16 and has them and a row for each row of source",
                            (long long) src->ne[0], (long long) src->ne[1], dst->type, (long long) dst->ne[0],
                            (long long) dst->ne[1], (long long) dst->ne[2], mode, (long long) tail->n_recent,
                            (long long) tail->n_first);
    }
    const tqi_batch_rows w = { *src, *dst, *tail, codec->signs == TQI_SIGNS_FIRST };
    const tqi_grid grid = { (unsigned) dst->ne[1], (unsigned) dst->ne[2], 1 };
    return n_dst == 0
               ? TQ_OK
               : tqi_launch(tqi_batch_rows_kernel, "copying a tail's rows", grid, TQI_TAIL_THREADS, 0, stream, w);
}

extern "C" int tq_cuda_tail_batch_index(const tq_cuda_tail * tail, const tq_cuda_index * rows, int64_t base,
                                        int32_t * index, size_t stride_stream, void * stream) {
    TQI_TRY(check_tail(&none, tail->owner, tail->n_recent, tail->n_first, 0, tail->owner_stride_stream));
    const int64_t n_own = tail->n_stream > 0 ? rows->ne[0] / tail->n_stream : 0, n_row = tail->n_recent + tail->n_first;
    const tq_cuda_view all = { NULL, TQ_TYPE_F32, 0, { 0, rows->ne[0], 0, 0 }, { 0, 0, 0, 0 } };
    TQI_TRY(check_rows(rows, &all, &all));
    if (tail->n_stream < 1 || tail->n_stream > 65535 || tail->n_cells < 1 || tail->n_cells > INT32_MAX ||
        n_own * tail->n_stream != rows->ne[0] || n_own > INT32_MAX / 4 || base < 0 || index == NULL ||
        ((uintptr_t) index | stride_stream) % 4 != 0) {
        return tq_cuda_fail(
            TQ_E_ARGUMENT,
            "%lld cells from %lld on, in %lld streams of %lld, and %p for the index given; streams have "
            "as many each, and integers lie at multiples of four",
            (long long) rows->ne[0], (long long) base, (long long) tail->n_stream, (long long) tail->n_cells,
            (void *) index);
    }
    const tqi_batch_index w = { *tail, *rows, base, (int) n_own, index, (int64_t) stride_stream };
    const tqi_grid grid = { (unsigned) ((n_row + n_own + TQI_TAIL_THREADS - 1) / TQI_TAIL_THREADS),
                            (unsigned) tail->n_stream, 1 };
    return tqi_launch(tqi_batch_index_kernel, "a batch's rows of a tail", grid, TQI_TAIL_THREADS, 0, stream, w);
}

extern "C" int tq_cuda_tail_decode(const tq_attn_operand * x, const tq_cuda_view * dst, void * stream) {
    const tqi_codec *to, *codec = x == NULL ? NULL : tqi_codec_get(x->type, x->mode);
    int64_t n_dst;
    TQI_TRY(check_view("target", dst, &to, &n_dst));
    if (codec == NULL || to != NULL || dst->ne[0] != x->head_dim || dst->ne[1] != x->n_head ||
        dst->ne[3] != x->n_stream || x->head_dim % TQ_BLOCK != 0 || dst->ne[0] * dst->ne[1] > INT32_MAX / 2 ||
        dst->ne[3] > 65535) {
        return tq_cuda_fail(TQ_E_ARGUMENT,
                            "target of type %d, (%lld, %lld, .., %lld) given for a tail of another type or shape",
                            dst->type, (long long) dst->ne[0], (long long) dst->ne[1], (long long) dst->ne[3]);
    }
    const tq_attn_tail & tail = x->tail;
    TQI_TRY(check_tail(tail.data, tail.owner, tail.n_recent, tail.n_first,
                       tail.stride_row | tail.stride_head | tail.stride_stream, tail.owner_stride_stream));
    if (n_dst == 0) {
        return TQ_OK;
    }
    const tqi_tail_reads r = { tail, *dst, codec->signs == TQI_SIGNS_FIRST };
    const tqi_grid grid = { (unsigned) (tail.n_recent + tail.n_first), (unsigned) dst->ne[3], 1 };
    return tqi_launch(tqi_decode_tail_kernel, "decoding a tail", grid, TQI_TAIL_THREADS, 0, stream, r);
}

extern "C" int tq_cuda_transform(const float * x, int64_t n, int mode, int inverse, float * y, void * stream) {
    const tqi_codec * codec = tqi_codec_get(TQ_TYPE_PQO3, mode);
    if (codec == NULL || n < 0 || n % TQ_BLOCK != 0 || (n > 0 && (x == NULL || y == NULL))) {
        return tq_cuda_fail(
            TQ_E_ARGUMENT,
            "%lld values at %p, mode %d given; needed are a multiple of %d, a pointer, a mode of tq_mode",
            (long long) n, (const void *) x, mode, TQ_BLOCK);
    }
    const int signs_first = codec->signs == TQI_SIGNS_FIRST;
    const tqi_vectors p = { x, y, n / TQ_BLOCK, inverse ? !signs_first : signs_first };
    return tqi_launch_each(tqi_transform_kernel, "transform", p.n_blocks, TQI_ROW_THREADS / TQI_TEAM, TQI_ROW_THREADS,
                           stream, p);
}

/* What attention needs of a q in f16, and of K or V in q8_0. */
extern "C" int tq_cuda_convert(const tq_cuda_view * src, const tq_cuda_view * dst, void * stream) {
    const tqi_codec *from, *to;
    int64_t n_src, n_dst;
    TQI_TRY(check_view("source", src, &from, &n_src, true));
    TQI_TRY(check_view("target", dst, &to, &n_dst));
    if (from != NULL || to != NULL) {
        return tq_cuda_fail(TQ_E_ARGUMENT, "types %d to %d given; both must be f32, f16 or bf16, or the first q8_0",
                            src->type, dst->type);
    }
    for (int i = 0; i < 4; ++i) {
        if (src->ne[i] != dst->ne[i]) {
            return tq_cuda_fail(TQ_E_ARGUMENT, "ne[%d] is %lld and %lld; shapes must be equal", i,
                                (long long) src->ne[i], (long long) dst->ne[i]);
        }
    }
    const tqi_conversion c = { *src, *dst, n_src };
    return tqi_launch_each(tqi_convert_kernel, "convert", n_src, TQI_ROW_THREADS, TQI_ROW_THREADS, stream, c);
}
