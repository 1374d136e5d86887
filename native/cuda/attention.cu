/* attention.cu: launches of attention. FMA is welcome here: attention has a tolerance, not bytes to match. */
#include "attention_warp.cuh"
#include "tail.cuh"

#if defined(__CUDACC__)
#    include <atomic>
#endif

/* ---- Kernels ---- */

/* For all pairs of types and all head sizes. */
template <int NT> TQ_KERNEL(TQ_ATTENTION_THREADS, TQ_ATTENTION_BLOCKS) tq_attend_kernel(TQ_PARAMETER tq_attention p) {
    TQ_SHARED(shared);
    tq_attend<NT>(p, shared);
}

/* For our types on both sides, those that the plan names, and DK = DV = 32 BLOCKS, 64 or 128. */
template <typename K, typename V, int NT, int BLOCKS>
TQ_KERNEL(TQ_ATTENTION_THREADS, TQ_ATTENTION_BLOCKS)
tq_attend_warp_kernel(TQ_PARAMETER tq_attention p) {
    TQ_SHARED(shared);
    tq_attend_by_warps<K, V, NT, BLOCKS>(p, shared);
}

TQ_KERNEL(TQ_TAIL_ATTENTION_THREADS, 4) tq_attend_tail_kernel(TQ_PARAMETER tq_attention p) {
    TQ_SHARED(shared);
    tq_attend_tail(p, shared);
}

TQ_KERNEL(TQ_MERGE_THREADS, 8) tq_merge_kernel(TQ_PARAMETER tq_attention p) {
    TQ_SHARED(shared);
    tq_merge_splits(p, shared);
}

typedef void (*tq_attention_kernel)(const tq_attention p);

template <int NT, int BLOCKS> static tq_attention_kernel kernel_of_types(const tq_attention & p) {
    if (p.k.type != p.v.type) {
        return tq_attend_warp_kernel<tq_pqo4, tq_pqo3, NT, BLOCKS>;
    }
    switch (p.k.type) {
        case TQ_TYPE_PQO3:
            return tq_attend_warp_kernel<tq_pqo3, tq_pqo3, NT, BLOCKS>;
        case TQ_TYPE_PQO4:
            return tq_attend_warp_kernel<tq_pqo4, tq_pqo4, NT, BLOCKS>;
        case TQ_TYPE_PQT3:
            return tq_attend_warp_kernel<tq_pqt3, tq_pqt3, NT, BLOCKS>;
        default:
            return tq_attend_warp_kernel<tq_pqt4, tq_pqt4, NT, BLOCKS>;
    }
}

template <int NT> static tq_attention_kernel kernel_of(const tq_attention & p) {
    if (p.blocks == 4) {
        return kernel_of_types<NT, 4>(p);
    }
    if (p.blocks == 2) {
        return kernel_of_types<NT, 2>(p);
    }
    return tq_attend_kernel<NT>;
}

/* ---- Devices ---- */

/* The current device's limits, asked for once. */
static int limits_of(tqi_cuda_limits * limits) {
#if defined(__CUDACC__)
    enum { KNOWN = 64 };
    static std::atomic<int64_t> known[KNOWN]; /* 0, or all three packed: 16, 24 and 24 bits */
    int device = 0, n_sm = 0, per_block = 0, per_sm = 0;
    int status = tqi_cuda_check(cudaGetDevice(&device), "asking for the current CUDA device");
    int64_t packed = status == TQ_OK && device < KNOWN ? known[device].load(std::memory_order_relaxed) : 0;
    if (status == TQ_OK && packed == 0) {
        status = tqi_cuda_check(cudaDeviceGetAttribute(&n_sm, cudaDevAttrMultiProcessorCount, device),
                                "reading the device's attributes");
        if (status == TQ_OK) {
            status = tqi_cuda_check(cudaDeviceGetAttribute(&per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                                    "reading the device's attributes");
        }
        if (status == TQ_OK) {
            status =
                tqi_cuda_check(cudaDeviceGetAttribute(&per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
                               "reading the device's attributes");
        }
        packed = (int64_t) n_sm << 48 | (int64_t) per_block << 24 | per_sm;
        if (status == TQ_OK && device < KNOWN) {
            known[device].store(packed, std::memory_order_relaxed);
        }
    }
    limits->n_sm = (int) (packed >> 48);
    limits->shared_per_block = (size_t) (packed >> 24 & 0xffffff);
    limits->shared_per_sm = (size_t) (packed & 0xffffff);
    return status;
#else
    const char * shared = getenv("TQ_HOST_SHARED_KIB"); /* tests: devices with less of it */
    const char * n_sm = getenv("TQ_HOST_SM");
    limits->n_sm = n_sm != NULL ? atoi(n_sm) : 2;
    limits->shared_per_block = (size_t) (shared != NULL ? atoi(shared) : 227) * 1024;
    limits->shared_per_sm = limits->shared_per_block + 1024;
    return TQ_OK;
#endif
}

static int plan(const tq_attn * args, tq_attention * a) {
    tqi_cuda_limits limits;
    int status = tq_cuda_device_ready();
    status = status == TQ_OK ? limits_of(&limits) : status;
    return status == TQ_OK ? tqi_cuda_plan(args, limits, a) : status;
}

/* ---- Interface ---- */

extern "C" int tq_cuda_attn_supported(const tq_attn * args) {
    tq_attention a;
    return plan(args, &a);
}

extern "C" size_t tq_cuda_attn_work_bytes(const tq_attn * args) {
    tq_attention a;
    return plan(args, &a) == TQ_OK ? tqi_cuda_plan_work_bytes(a) : (size_t) -1;
}

extern "C" int tq_cuda_attn(const tq_attn * args, void * work, void * stream) {
    tq_attention a;
    int status = plan(args, &a);
    if (status != TQ_OK) {
        return status;
    }
    const size_t bytes = tqi_cuda_plan_work_bytes(a);
    if (a.n_vec == 0) {
        return TQ_OK;
    }
    if (a.q == NULL || a.out == NULL || (a.n_kv > 0 && (a.k.data == NULL || a.v.data == NULL))) {
        return tqi_cuda_fail(TQ_E_ARGUMENT, "null pointer given for q, k, v or out");
    }
    if ((args->k.tail.n_recent > 0 && (a.k.tail.data == NULL || a.k.tail.owner == NULL)) ||
        (args->v.tail.n_recent > 0 && (a.v.tail.data == NULL || a.v.tail.owner == NULL))) {
        return tqi_cuda_fail(TQ_E_ARGUMENT, "null pointer given for the rows or owners of a tail");
    }
    if (bytes > 0 && (work == NULL || (uintptr_t) work % 16 != 0)) {
        return tqi_cuda_fail(TQ_E_ARGUMENT, "%zu bytes of scratch needed at a multiple of 16; %p given", bytes, work);
    }
    const size_t n_parts = (size_t) a.n_stream * (size_t) a.n_head_kv * (size_t) a.n_vec * (size_t) a.n_parts;
    const unsigned n = (unsigned) (8 * a.n_tiles);
    a.stats = (float *) work;
    a.partials = a.n_parts > 1 ? a.stats + (2 * n_parts + 3) / 4 * 4 : NULL;
    const tq_grid grid = { (unsigned) (a.n_splits * a.n_head_kv), ((unsigned) a.n_vec + n - 1) / n,
                           (unsigned) a.n_stream };
    status = tq_launch(a.n_tiles == 1 ? kernel_of<1>(a) : kernel_of<2>(a), "attention", grid, TQ_ATTENTION_THREADS,
                       (size_t) a.shared_bytes, stream, a);
    if (status == TQ_OK && a.n_parts > a.n_splits) {
        const tq_grid tails = { (unsigned) ((a.n_parts - a.n_splits) * a.n_head_kv), ((unsigned) a.n_vec + 7) / 8,
                                (unsigned) a.n_stream };
        status = tq_launch(tq_attend_tail_kernel, "attention to a tail", tails, TQ_TAIL_ATTENTION_THREADS,
                           (size_t) a.tail_shared_bytes, stream, a);
    }
    if (status != TQ_OK || a.n_parts == 1) {
        return status;
    }
    const tq_grid vectors = { (unsigned) a.n_vec, (unsigned) a.n_head_kv, (unsigned) a.n_stream };
    return tq_launch(tq_merge_kernel, "merging attention", vectors, TQ_MERGE_THREADS,
                     (size_t) a.n_parts * sizeof(float), stream, a);
}
