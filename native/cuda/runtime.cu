/* runtime.cu: devices, streams and device memory, by CUDA's runtime. */
#include "memory.h"
#include "simt.cuh"

#include <stdio.h>

#include <utility>

/* ---- Devices ---- */

extern "C" int tq_cuda_emulated(void) {
    return 0;
}

static __global__ void tqi_probe_kernel() {}

extern "C" int tq_cuda_device_ready(void) {
    enum { KNOWN = 64 };
    static std::atomic<bool> ready[KNOWN];
    cudaFuncAttributes attributes;
    cudaDeviceProp prop;
    int device = 0;
    TQI_TRY(tqi_cuda_check(cudaGetDevice(&device), "asking for the current CUDA device"));
    if (device < KNOWN && ready[device].load(std::memory_order_relaxed)) {
        return TQ_OK;
    }
    const cudaError_t error = cudaFuncGetAttributes(&attributes, tqi_probe_kernel);
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
        error == cudaErrorInvalidKernelImage) {
        (void) cudaGetLastError();
        TQI_TRY(tqi_cuda_check(cudaGetDeviceProperties(&prop, device), "reading the CUDA device's properties"));
        return tqi_cuda_no_code(prop.name, prop.major, prop.minor);
    }
    /* an exclusive device in use, PTX newer than the driver, a lost device */
    TQI_TRY(tqi_cuda_check(error, "loading the kernels"));
    if (device < KNOWN) {
        ready[device].store(true, std::memory_order_relaxed);
    }
    return TQ_OK;
}

extern "C" int tq_cuda_device_count(void) {
    int n = 0;
    TQI_TRY(tqi_cuda_check(cudaGetDeviceCount(&n), "looking for CUDA devices"));
    return n;
}

extern "C" int tq_cuda_device_use(int i, tq_cuda_device * device) {
    cudaDeviceProp prop;
    const int n = tq_cuda_device_count();
    if (n < 0) {
        return n;
    }
    if (i < 0 || i >= n) {
        return tq_cuda_fail(TQ_E_ARGUMENT, "CUDA device %d given; there are %d", i, n);
    }
    TQI_TRY(tqi_cuda_check(cudaSetDevice(i), "selecting the CUDA device"));
    TQI_TRY(tqi_cuda_check(cudaGetDeviceProperties(&prop, i), "reading the CUDA device's properties"));
    TQI_TRY(tq_cuda_device_ready());
    if (device != NULL) {
        memset(device, 0, sizeof *device);
        snprintf(device->name, sizeof device->name, "%.127s", prop.name);
        device->cc = 10 * prop.major + prop.minor;
        device->n_sm = prop.multiProcessorCount;
        device->shared_per_block = prop.sharedMemPerBlockOptin;
        device->shared_per_sm = prop.sharedMemPerMultiprocessor;
        device->total_bytes = prop.totalGlobalMem;
    }
    return TQ_OK;
}

extern "C" int tq_cuda_device_swap(int i) {
    int before = 0;
    TQI_TRY(tqi_cuda_check(cudaGetDevice(&before), "asking for the current CUDA device"));
    if (before != i && i >= 0) {
        TQI_TRY(tqi_cuda_check(cudaSetDevice(i), "selecting the CUDA device"));
    }
    return before;
}

extern "C" int tq_cuda_device_of(const void * data) {
    cudaPointerAttributes attributes;
    TQI_TRY(tqi_cuda_check(cudaPointerGetAttributes(&attributes, data), "asking where memory lies"));
    if (attributes.type != cudaMemoryTypeDevice && attributes.type != cudaMemoryTypeManaged) {
        return tq_cuda_fail(TQ_E_ARGUMENT, "%p given; it is no device memory", data);
    }
    return attributes.device;
}

int tqi_cuda_limits_of(tqi_cuda_limits * limits) {
    enum { KNOWN = 64 };
    static std::atomic<int64_t> known[KNOWN]; /* 0, or all three packed: 16, 24 and 24 bits */
    int device = 0, n_sm = 0, per_block = 0, per_sm = 0;
    TQI_TRY(tqi_cuda_check(cudaGetDevice(&device), "asking for the current CUDA device"));
    int64_t packed = device < KNOWN ? known[device].load(std::memory_order_relaxed) : 0;
    if (packed == 0) {
        const std::pair<cudaDeviceAttr, int *> wanted[] = {
            { cudaDevAttrMultiProcessorCount, &n_sm },
            { cudaDevAttrMaxSharedMemoryPerBlockOptin, &per_block },
            { cudaDevAttrMaxSharedMemoryPerMultiprocessor, &per_sm },
        };
        for (int i = 0; i < 3; ++i) {
            TQI_TRY(tqi_cuda_check(cudaDeviceGetAttribute(wanted[i].second, wanted[i].first, device),
                                   "reading the device's attributes"));
        }
        packed = (int64_t) n_sm << 48 | (int64_t) per_block << 24 | per_sm;
        if (device < KNOWN) {
            known[device].store(packed, std::memory_order_relaxed);
        }
    }
    limits->n_sm = (int) (packed >> 48);
    limits->shared_per_block = (size_t) (packed >> 24 & 0xffffff);
    limits->shared_per_sm = (size_t) (packed & 0xffffff);
    return TQ_OK;
}

/* ---- Streams ---- */

extern "C" int tq_cuda_synchronize(void * stream) {
    return tqi_cuda_check(cudaStreamSynchronize((cudaStream_t) stream), "waiting for the CUDA stream");
}

extern "C" int tq_cuda_stream_wait(void * waiting, void * other) {
    cudaEvent_t event;
    if (waiting == other) {
        return TQ_OK;
    }
    TQI_TRY(tqi_cuda_check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "ordering CUDA streams"));
    int status = tqi_cuda_check(cudaEventRecord(event, (cudaStream_t) other), "ordering CUDA streams");
    if (status == TQ_OK) {
        status = tqi_cuda_check(cudaStreamWaitEvent((cudaStream_t) waiting, event, 0), "ordering CUDA streams");
    }
    (void) cudaEventDestroy(event); /* which happens once it has come */
    return status;
}

/* ---- Memory ---- */

extern "C" int tq_cuda_alloc(size_t bytes, void ** data) {
    return tqi_cuda_check(cudaMalloc(data, bytes > 0 ? bytes : 1), "allocating device memory");
}

extern "C" int tq_cuda_free(void * data) {
    return tqi_cuda_check(cudaFree(data), "freeing device memory");
}

extern "C" int tq_cuda_copy(const void * from, size_t bytes, int kind, void * stream, void * to) {
    const int status =
        tqi_cuda_check(cudaMemcpyAsync(to, from, bytes, (cudaMemcpyKind) kind, (cudaStream_t) stream), "copying");
    return status == TQ_OK && kind != 3 ? tq_cuda_synchronize(stream) : status;
}

int tqi_cuda_memory_allocate(size_t bytes, tq_cuda_memory * m) {
    int pools = 0;
    m->pooled = cudaDeviceGetAttribute(&pools, cudaDevAttrMemoryPoolsSupported, m->device) == cudaSuccess && pools;
    const cudaError_t error =
        m->pooled ? cudaMallocAsync(&m->data, bytes, (cudaStream_t) m->stream) : cudaMalloc(&m->data, bytes);
    if (error == cudaErrorMemoryAllocation) {
        size_t available = 0, total = 0;
        (void) cudaGetLastError();
        (void) cudaMemGetInfo(&available, &total);
        return tq_cuda_fail(TQ_E_MEMORY, "CUDA device %d has no memory for %zu bytes; %zu of %zu are free", m->device,
                            bytes, available, total);
    }
    return tqi_cuda_check(error, "allocating device memory");
}

/* cudaFree waits for the device, cudaFreeAsync is itself work on the stream: neither takes memory from kernels still to
 * run on that stream. Other streams are not waited for by the latter, and may be gone by now, so the device is. */
void tqi_cuda_memory_release(tq_cuda_memory * m) {
    const int before = tq_cuda_device_swap(m->device);
    if (!m->pooled) {
        (void) cudaFree(m->data);
    } else if (m->elsewhere) {
        (void) cudaDeviceSynchronize();
        (void) cudaFree(m->data);
    } else {
        (void) cudaFreeAsync(m->data, (cudaStream_t) m->stream);
    }
    (void) cudaGetLastError();
    if (before >= 0) {
        (void) tq_cuda_device_swap(before);
    }
}
