/* attention.cu: launches of attention. FMA is welcome here: attention has a tolerance, not bytes to match. */
#include "attention_kernels.cuh"
#include "tail.cuh"

/* ---- Kernels ---- */

/* For all pairs of types and all head sizes. */
template <int NT>
TQI_KERNEL(TQI_ATTENTION_THREADS, TQI_ATTENTION_BLOCKS)
tqi_attend_kernel(TQI_PARAMETER tqi_attention p) {
    TQI_SHARED(shared);
    tqi_attend<NT>(p, shared);
}

TQI_KERNEL(TQI_TAIL_ATTENTION_THREADS, 4) tqi_attend_tail_kernel(TQI_PARAMETER tqi_attention p) {
    TQI_SHARED(shared);
    tqi_attend_tail(p, shared);
}

TQI_KERNEL(TQI_MERGE_THREADS, 8) tqi_merge_kernel(TQI_PARAMETER tqi_attention p) {
    TQI_SHARED(shared);
    tqi_merge_splits(p, shared);
}

static tqi_attention_kernel kernel_of(const tqi_attention & p) {
    if (p.blocks == 0) {
        return p.n_tiles == 1 ? tqi_attend_kernel<1> : tqi_attend_kernel<2>;
    }
    if (p.k.type == p.v.type) {
        return tqi_kernel_of_one_type(p);
    }
    if (p.k.is_pqo && p.v.is_pqo) {
        return tqi_kernel_of_pair(p);
    }
    const int stock = p.k.is_pqo ? p.v.type : p.k.type;
    return stock == TQ_TYPE_F16 ? tqi_kernel_beside_f16(p) : tqi_kernel_beside_q8_0(p);
}

/* ---- Interface ---- */

static int plan(const tq_attn * args, tqi_attention * a) {
    tqi_cuda_limits limits;
    TQI_TRY(tq_cuda_device_ready());
    TQI_TRY(tqi_cuda_limits_of(&limits));
    return tqi_cuda_plan(args, limits, a);
}

extern "C" int tq_cuda_attn_supported(const tq_attn * args) {
    tqi_attention a;
    return plan(args, &a);
}

extern "C" size_t tq_cuda_attn_work_bytes(const tq_attn * args) {
    tqi_attention a;
    return plan(args, &a) == TQ_OK ? tqi_cuda_plan_work_bytes(a) : (size_t) -1;
}

extern "C" int tq_cuda_attn(const tq_attn * args, void * work, void * stream) {
    tqi_attention a;
    TQI_TRY(plan(args, &a));
    const size_t bytes = tqi_cuda_plan_work_bytes(a);
    if (a.n_vec == 0) {
        return TQ_OK;
    }
    if (a.q == NULL || a.out == NULL || (a.n_kv > 0 && (a.k.data == NULL || a.v.data == NULL))) {
        return tq_cuda_fail(TQ_E_ARGUMENT, "null pointer given for q, k, v or out");
    }
    if ((args->k.tail.n_recent > 0 && (a.k.tail.data == NULL || a.k.tail.owner == NULL)) ||
        (args->v.tail.n_recent > 0 && (a.v.tail.data == NULL || a.v.tail.owner == NULL))) {
        return tq_cuda_fail(TQ_E_ARGUMENT, "null pointer given for the rows or owners of a tail");
    }
    if (bytes > 0 && (work == NULL || (uintptr_t) work % 16 != 0)) {
        return tq_cuda_fail(TQ_E_ARGUMENT, "%zu bytes of scratch needed at a multiple of 16; %p given", bytes, work);
    }
    const unsigned n = (unsigned) (8 * a.n_tiles);
    a.stats = (float *) work;
    a.partials = a.n_parts > 1 ? a.stats + tqi_cuda_plan_partials_at(a) : NULL;
    const tqi_grid grid = { (unsigned) (a.n_splits * a.n_head_kv), ((unsigned) a.n_vec + n - 1) / n,
                            (unsigned) a.n_stream };
    TQI_TRY(tqi_launch(kernel_of(a), "attention", grid, TQI_ATTENTION_THREADS, (size_t) a.shared_bytes, stream, a));
    if (a.n_parts > a.n_splits) {
        const tqi_grid tails = { (unsigned) ((a.n_parts - a.n_splits) * a.n_head_kv), ((unsigned) a.n_vec + 7) / 8,
                                 (unsigned) a.n_stream };
        TQI_TRY(tqi_launch(tqi_attend_tail_kernel, "attention to a tail", tails, TQI_TAIL_ATTENTION_THREADS,
                           (size_t) tqi_tail_shared_bytes(TQ_BLOCK * a.k.n_blocks), stream, a));
    }
    if (a.n_parts == 1) {
        return TQ_OK;
    }
    const tqi_grid vectors = { (unsigned) a.n_vec, (unsigned) a.n_head_kv, (unsigned) a.n_stream };
    return tqi_launch(tqi_merge_kernel, "merging attention", vectors, TQI_MERGE_THREADS,
                      (size_t) a.n_parts * sizeof(float), stream, a);
}
