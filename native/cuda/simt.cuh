/* simt.cuh: what the kernels need of the machine: thread indices, barriers, exchange within a warp, f16 arithmetic, the tensor
 * core's m16n8k16, copies into shared memory. With nvcc these are instructions; with a host compiler simt_host.h runs every
 * thread as a fibre, so that the kernels' own source is what the tests execute without a GPU. */
#ifndef TQ_SIMT_CUH
#define TQ_SIMT_CUH

#include "tq_cuda.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)

#    include <cuda_fp16.h>
#    include <cuda_runtime.h>

#    define TQ_HD __host__ __device__ __forceinline__ /* arithmetic: no thread in it */
#    define TQ_D __device__ __forceinline__           /* steps of a kernel: threads, warps */
#    if defined(__CUDA_ARCH__)
#        define TQ_UNROLL _Pragma("unroll")
#        define TQ_PRAGMA(text) _Pragma(#text)
#        define TQ_UNROLL_BY(n) TQ_PRAGMA(unroll(n))
#        define TQ_NO_UNROLL _Pragma("unroll 1")
#    else
#        define TQ_UNROLL
#        define TQ_UNROLL_BY(n)
#        define TQ_NO_UNROLL
#    endif
#    define TQ_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#    define TQ_KERNEL(threads, blocks) static __global__ void __launch_bounds__(threads, blocks)
#    define TQ_PARAMETER const __grid_constant__

TQ_D int tq_thread() {
    const int i = (int) threadIdx.x;
    __builtin_assume(i >= 0); /* divisions by powers of two are shifts then */
    return i;
}
/* x, in a register: nvcc computes what it knows how to compute anew in each round of a loop. */
TQ_D int tq_keep(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

TQ_D int tq_block_x() {
    return (int) blockIdx.x;
}
TQ_D int tq_block_y() {
    return (int) blockIdx.y;
}
TQ_D int tq_block_z() {
    return (int) blockIdx.z;
}

TQ_D void tq_sync() {
    __syncthreads();
}
TQ_D int tq_sync_or(int x) {
    return __syncthreads_or(x);
}
TQ_D void tq_sync_warp() {
    __syncwarp();
}
TQ_D bool tq_any_lane(bool x) {
    return __any_sync(0xffffffffu, x);
}
TQ_D uint32_t tq_which_lanes(bool x) {
    return __ballot_sync(0xffffffffu, x);
}

template <typename T> TQ_D T tq_exchange(T x, int mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask);
}
template <typename T> TQ_D T tq_lane(T x, int lane) {
    return __shfl_sync(0xffffffffu, x, lane);
}

TQ_D uint32_t tq_half2(float low, float high) {
    const __half2 h = __floats2half2_rn(low, high);
    uint32_t u;
    memcpy(&u, &h, sizeof u);
    return u;
}

TQ_D uint32_t tq_mul_half2(uint32_t a, uint32_t b) {
    __half2 x, y;
    memcpy(&x, &a, sizeof x);
    memcpy(&y, &b, sizeof y);
    x = __hmul2(x, y);
    memcpy(&a, &x, sizeof a);
    return a;
}

TQ_D float tq_half_to_float(uint16_t h) {
    return __half2float(__ushort_as_half(h));
}
TQ_D uint32_t tq_permute(uint32_t a, uint32_t b, uint32_t selector) {
    return __byte_perm(a, b, selector);
}
TQ_D uint32_t tq_funnel(uint32_t low, uint32_t high, int shift) {
    return __funnelshift_r(low, high, (unsigned) shift);
}
/* Two f16, each some finite number if it is infinite or NaN: the largest where the machine has an instruction for that, or 0. */
TQ_D uint32_t tq_finite_halves(uint32_t a) {
#    if __CUDA_ARCH__ >= 860
    const uint32_t largest = 0x7bff7bffu;
    asm("min.xorsign.abs.f16x2 %0, %0, %1;" : "+r"(a) : "r"(largest));
    return a;
#    else
    __half2 x;
    const uint32_t abs = a & 0x7fff7fffu, most = 0x7bff7bffu;
    __half2 y;
    memcpy(&x, &abs, sizeof x);
    memcpy(&y, &most, sizeof y);
    return a & __hle2_mask(x, y);
#    endif
}

/* 2^x to about 2^-22 of it; what is below 2^-126 is 0. */
TQ_D float tq_exp2(float x) {
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x));
    return x;
}
TQ_D uint32_t tq_multiply_high(uint32_t a, uint32_t b) {
    return __umulhi(a, b);
}

/* c += a b; a: 16 x 16, b: 16 x 8 f16, c: 16 x 8 f32. With g = lane / 4, t = lane % 4: a0 = (g, 2t..), a1 = (g + 8, 2t..),
 * a2 = (g, 2t + 8..), a3 = (g + 8, 2t + 8..), b0 = (2t.., g), b1 = (2t + 8.., g), c = (g, 2t), (g, 2t + 1), (g + 8, 2t),
 * (g + 8, 2t + 1). PTX ISA, "Matrix fragments for mma.m16n8k16". Turing has k8 only: two of them. */
TQ_D void tq_mma(float * c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
#    if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#    else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a2), "r"(a3), "r"(b1));
#    endif
}

/* Transposes 8 x 8 f16: before and after, lane i has row i / 4 and of it columns 2 (i % 4) and one more. */
TQ_D uint32_t tq_transpose(uint32_t x) {
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(x));
    return x;
}

/* Bits of a where mask has ones, of b elsewhere: one instruction, which nvcc finds in no way to write it in C. */
TQ_D uint32_t tq_select(uint32_t mask, uint32_t a, uint32_t b) {
    asm("lop3.b32 %0, %0, %1, %2, 0xca;" : "+r"(mask) : "r"(a), "r"(b));
    return mask;
}

/* Starts to copy BYTES = 4, 8 or 16 bytes to OFFSET bytes behind to in shared memory; two bytes, and all of them on Turing, which
 * cannot start and go on, are copied. Assembly, too, where C would do: nvcc would go on with a second copy of from. */
template <int BYTES, int OFFSET = 0> TQ_D void tq_copy_async(void * to, const void * from) {
#    if __CUDA_ARCH__ >= 800
    const bool begin = BYTES > 2;
#    else
    const bool begin = false;
#    endif
    [[maybe_unused]] const unsigned address = (unsigned) __cvta_generic_to_shared(to);
    if constexpr (begin && BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0 + %2], [%1], 16;" ::"r"(address), "l"(from), "n"(OFFSET)
                     : "memory");
    } else if constexpr (begin) {
        asm volatile("cp.async.ca.shared.global [%0 + %3], [%1], %2;" ::"r"(address), "l"(from), "n"(BYTES), "n"(OFFSET)
                     : "memory");
    } else if constexpr (BYTES == 2) {
        asm volatile("{ .reg .b16 x; ld.global.b16 x, [%1]; st.shared.b16 [%0 + %2], x; }" ::"r"(address), "l"(from),
                     "n"(OFFSET)
                     : "memory");
    } else {
        TQ_UNROLL
        for (int i = 0; i < BYTES / 4; ++i) {
            ((uint32_t *) to)[OFFSET / 4 + i] = ((const uint32_t *) from)[i];
        }
    }
}

/* Ends a group of copies; waits until at most N groups are unfinished. */
TQ_D void tq_copy_commit() {
#    if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#    endif
}

template <int N> TQ_D void tq_copy_wait() {
#    if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#    endif
}

#else
#    include "simt_host.h"
#endif

#define TQ_LOG2_E 1.4426950408889634f

/* e^x to about 2^-20 of it, for x <= 0. */
TQ_D float tq_exp(float x) {
    return tq_exp2(x * TQ_LOG2_E);
}

/* ---- Launching ---- */

extern "C" int tqi_cuda_fail(int status, const char * format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 2, 3)))
#endif
    ;

struct tq_grid {
    unsigned x, y, z;
};

#if defined(__CUDACC__)

/* TQ_OK, or a message with what the runtime says of it. */
inline int tqi_cuda_check(cudaError_t error, const char * what) {
    if (error == cudaSuccess) {
        return TQ_OK;
    }
    (void) cudaGetLastError();
    const int status = error == cudaErrorMemoryAllocation                                         ? TQ_E_MEMORY
                       : error == cudaErrorInvalidValue || error == cudaErrorInvalidConfiguration ? TQ_E_ARGUMENT
                                                                                                  : TQ_E_UNSUPPORTED;
    return tqi_cuda_fail(status, "%s: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error));
}

/* More than 48 KiB of dynamic shared memory must be allowed first. Always as much as the device has, never what this launch
 * takes: the limit is the kernel's, and a thread that lowered it would make another's larger launch, or a graph's, fail. */
inline int tqi_cuda_allow_shared(const void * kernel, size_t shared, const char * name) {
    int device = 0, most = 0;
    if (shared <= 48 * 1024) {
        return TQ_OK;
    }
    int status = tqi_cuda_check(cudaGetDevice(&device), name);
    status = status != TQ_OK
                 ? status
                 : tqi_cuda_check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), name);
    return status != TQ_OK
               ? status
               : tqi_cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), name);
}

/* kernel: without static shared memory if it is given more than 48 KiB. */
template <typename P>
int tq_launch(void (*kernel)(P), const char * name, tq_grid grid, int threads, size_t shared, void * stream,
              const P & parameter) {
    const int status = tqi_cuda_allow_shared((const void *) kernel, shared, name);
    if (status != TQ_OK) {
        return status;
    }
    kernel<<<dim3(grid.x, grid.y, grid.z), (unsigned) threads, shared, (cudaStream_t) stream>>>(parameter);
    return tqi_cuda_check(cudaGetLastError(), name);
}

#else

template <typename P>
int tq_launch(void (*kernel)(P), const char *, tq_grid grid, int threads, size_t shared, void *, const P & parameter) {
    tq_host_run(grid.x, grid.y, grid.z, threads, shared, [&] { kernel(parameter); });
    return TQ_OK;
}

#endif

#endif
