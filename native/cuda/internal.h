/* internal.h: what the files of this folder share: the codebooks, errors, and what the runtime tells of a device.
 *
 * Names: what tqgguf.h and tq_cuda.h declare begins with tq_ or TQ_. Everything else, here as in native/src, begins
 * with tqi_ or TQI_. */
#ifndef TQI_CUDA_INTERNAL_H
#define TQI_CUDA_INTERNAL_H

#include "tq_cuda.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Arithmetic for the host and the GPU: no threads in it. */
#if defined(__CUDACC__)
#    define TQI_HD __host__ __device__ __forceinline__
#else
#    define TQI_HD inline
#endif
#define TQI_INLINE static TQI_HD

extern "C" {
#include "../src/codebook.h"
#include "../src/error.h"
}

/* A launch's blocks of threads. */
struct tqi_grid {
    unsigned x, y, z;
};

/* What attention's plan must know of a device. */
struct tqi_cuda_limits {
    int n_sm;
    size_t shared_per_block, shared_per_sm;
};

/* The current device's limits. */
int tqi_cuda_limits_of(tqi_cuda_limits * limits);

/* Says that this build has no code for a device; returns TQ_E_UNSUPPORTED. */
int tqi_cuda_no_code(const char * name, int major, int minor);

#endif
