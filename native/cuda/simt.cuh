/* simt.cuh: what kernels need of the machine, as CUDA's instructions: thread indices, barriers, exchange within a warp,
 * f16 arithmetic, the tensor core's m16n8k16, copies into shared memory, launches. emulated/simt.h has the same for the
 * CPU; where the tests' build includes it first, its include guard, which is this file's, leaves this file out. */
#ifndef TQI_SIMT
#define TQI_SIMT

#include "internal.h"

#include <cuda_fp16.h>
#include <cuda_runtime.h>

/* Steps of a kernel. */
#define TQI_D __device__ __forceinline__
#if defined(__CUDA_ARCH__)
#    define TQI_UNROLL _Pragma("unroll")
#    define TQI_PRAGMA(text) _Pragma(#text)
#    define TQI_UNROLL_BY(n) TQI_PRAGMA(unroll(n))
#    define TQI_NO_UNROLL _Pragma("unroll 1")
#else
#    define TQI_UNROLL
#    define TQI_UNROLL_BY(n)
#    define TQI_NO_UNROLL
#endif
#define TQI_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define TQI_STATIC_SHARED __shared__
#define TQI_KERNEL(threads, blocks) static __global__ void __launch_bounds__(threads, blocks)
#define TQI_PARAMETER const __grid_constant__

TQI_D int tqi_thread() {
    const int i = (int) threadIdx.x;
    __builtin_assume(i >= 0); /* divisions by powers of two are shifts then */
    return i;
}
/* x, in a register: nvcc computes what it knows how to compute anew in each round of a loop. */
TQI_D int tqi_keep(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

TQI_D int tqi_block_x() {
    return (int) blockIdx.x;
}
TQI_D int tqi_block_y() {
    return (int) blockIdx.y;
}
TQI_D int tqi_block_z() {
    return (int) blockIdx.z;
}

TQI_D void tqi_sync() {
    __syncthreads();
}
TQI_D int tqi_sync_or(int x) {
    return __syncthreads_or(x);
}
TQI_D void tqi_sync_warp() {
    __syncwarp();
}
/* A barrier for N warps side by side, apart from that of the block. */
template <int N> TQI_D void tqi_sync_warps() {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + tqi_thread() / (32 * N)), "n"(32 * N) : "memory");
}
TQI_D bool tqi_any_lane(bool x) {
    return __any_sync(0xffffffffu, x);
}
TQI_D uint32_t tqi_which_lanes(bool x) {
    return __ballot_sync(0xffffffffu, x);
}

template <typename T> TQI_D T tqi_exchange(T x, int mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask);
}
template <typename T> TQI_D T tqi_lane(T x, int lane) {
    return __shfl_sync(0xffffffffu, x, lane);
}

TQI_D uint32_t tqi_half2(float low, float high) {
    const __half2 h = __floats2half2_rn(low, high);
    uint32_t u;
    memcpy(&u, &h, sizeof u);
    return u;
}

TQI_D uint32_t tqi_add_half2(uint32_t a, uint32_t b) {
    __half2 x, y;
    memcpy(&x, &a, sizeof x);
    memcpy(&y, &b, sizeof y);
    x = __hadd2(x, y);
    memcpy(&a, &x, sizeof a);
    return a;
}

TQI_D uint32_t tqi_mul_half2(uint32_t a, uint32_t b) {
    __half2 x, y;
    memcpy(&x, &a, sizeof x);
    memcpy(&y, &b, sizeof y);
    x = __hmul2(x, y);
    memcpy(&a, &x, sizeof a);
    return a;
}

TQI_D float tqi_half_to_float(uint16_t h) {
    return __half2float(__ushort_as_half(h));
}
TQI_D uint32_t tqi_permute(uint32_t a, uint32_t b, uint32_t selector) {
    return __byte_perm(a, b, selector);
}
TQI_D uint32_t tqi_funnel(uint32_t low, uint32_t high, int shift) {
    return __funnelshift_r(low, high, (unsigned) shift);
}
/* Two f16, each some number of at most `most` if it is larger or NaN: that one where the machine has an instruction for
 * it, or 0. most: two f16, positive and finite. */
TQI_D uint32_t tqi_bounded_halves(uint32_t a, uint32_t most) {
#if __CUDA_ARCH__ >= 860
    asm("min.xorsign.abs.f16x2 %0, %0, %1;" : "+r"(a) : "r"(most));
    return a;
#else
    __half2 x;
    const uint32_t abs = a & 0x7fff7fffu;
    __half2 y;
    memcpy(&x, &abs, sizeof x);
    memcpy(&y, &most, sizeof y);
    return a & __hle2_mask(x, y);
#endif
}

/* 2^x to about 2^-22 of it; what is below 2^-126 is 0. */
TQI_D float tqi_exp2(float x) {
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x));
    return x;
}
TQI_D uint32_t tqi_multiply_high(uint32_t a, uint32_t b) {
    return __umulhi(a, b);
}

/* c += a b; a: 16 x 16, b: 16 x 8 f16, c: 16 x 8 f32. With g = lane / 4, t = lane % 4: a0 = (g, 2t..), a1 = (g + 8,
 * 2t..), a2 = (g, 2t + 8..), a3 = (g + 8, 2t + 8..), b0 = (2t.., g), b1 = (2t + 8.., g), c = (g, 2t), (g, 2t + 1), (g +
 * 8, 2t), (g + 8, 2t + 1). PTX ISA, "Matrix fragments for mma.m16n8k16". Turing has k8 only: two of them. */
TQI_D void tqi_mma(float * c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a2), "r"(a3), "r"(b1));
#endif
}

/* Transposes 8 x 8 f16: before and after, lane i has row i / 4 and of it columns 2 (i % 4) and one more. */
TQI_D uint32_t tqi_transpose(uint32_t x) {
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(x));
    return x;
}

/* Bits of a where mask has ones, of b elsewhere: one instruction, which nvcc finds in no way to write it in C. */
TQI_D uint32_t tqi_select(uint32_t mask, uint32_t a, uint32_t b) {
    asm("lop3.b32 %0, %0, %1, %2, 0xca;" : "+r"(mask) : "r"(a), "r"(b));
    return mask;
}

/* Starts to copy BYTES = 4, 8 or 16 bytes to OFFSET bytes behind to in shared memory; two bytes, and all of them on
 * Turing, which cannot start and go on, are copied. Assembly, too, where C would do: nvcc would go on with a second
 * copy of from. */
template <int BYTES, int OFFSET = 0> TQI_D void tqi_copy_async(void * to, const void * from) {
#if __CUDA_ARCH__ >= 800
    const bool begin = BYTES > 2;
#else
    const bool begin = false;
#endif
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
        TQI_UNROLL
        for (int i = 0; i < BYTES / 4; ++i) {
            ((uint32_t *) to)[OFFSET / 4 + i] = ((const uint32_t *) from)[i];
        }
    }
}

/* Ends a group of copies; waits until at most N groups are unfinished. */
TQI_D void tqi_copy_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int N> TQI_D void tqi_copy_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

/* ---- Launching ---- */

/* TQ_OK, or a message with what the runtime says of it. */
inline int tqi_cuda_check(cudaError_t error, const char * what) {
    if (error == cudaSuccess) {
        return TQ_OK;
    }
    (void) cudaGetLastError();
    const int status = error == cudaErrorMemoryAllocation                                         ? TQ_E_MEMORY
                       : error == cudaErrorInvalidValue || error == cudaErrorInvalidConfiguration ? TQ_E_ARGUMENT
                                                                                                  : TQ_E_UNSUPPORTED;
    return tq_cuda_fail(status, "%s: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error));
}

/* More than 48 KiB of dynamic shared memory must be allowed first. Always as much as the device has, never what this
 * launch takes: the limit is the kernel's, and a thread that lowered it would make another's larger launch, or a
 * graph's, fail. */
inline int tqi_cuda_allow_shared(const void * kernel, size_t shared, const char * name) {
    int device = 0, most = 0;
    if (shared <= 48 * 1024) {
        return TQ_OK;
    }
    TQI_TRY(tqi_cuda_check(cudaGetDevice(&device), name));
    TQI_TRY(tqi_cuda_check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), name));
    return tqi_cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), name);
}

/* kernel: without static shared memory if it is given more than 48 KiB. */
template <typename P>
int tqi_launch(void (*kernel)(P), const char * name, tqi_grid grid, int threads, size_t shared, void * stream,
               const P & parameter) {
    TQI_TRY(tqi_cuda_allow_shared((const void *) kernel, shared, name));
    kernel<<<dim3(grid.x, grid.y, grid.z), (unsigned) threads, shared, (cudaStream_t) stream>>>(parameter);
    return tqi_cuda_check(cudaGetLastError(), name);
}

#endif
