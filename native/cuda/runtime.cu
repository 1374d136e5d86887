/* runtime.cu: error messages and devices. */
#include "simt.cuh"

#include <stdarg.h>
#include <stdio.h>

#if defined(__CUDACC__)
#    include <atomic>
#else
#    include <map>
#    include <mutex>
#    include <sys/mman.h>
#    include <unistd.h>
#    include <utility>
#endif

static thread_local char message[512];

#define NO_CODE                                                                                                        \
    "%s has compute capability %d.%d, for which this build has no code: build with CMAKE_CUDA_ARCHITECTURES=%d%d "     \
    "(make cuda CUDA_ARCHITECTURES=...)"

extern "C" int tqi_cuda_fail(int status, const char * format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    return status;
}

extern "C" const char * tq_cuda_last_error(void) {
    return message;
}

extern "C" int tq_cuda_abi_version(void) {
    return 1000 * TQ_ABI_VERSION + TQ_CUDA_ABI_VERSION;
}

#if defined(__CUDACC__)

extern "C" int tq_cuda_emulated(void) {
    return 0;
}

static __global__ void tq_probe_kernel() {}

extern "C" int tq_cuda_device_ready(void) {
    enum { KNOWN = 64 };
    static std::atomic<bool> ready[KNOWN];
    cudaFuncAttributes attributes;
    cudaDeviceProp prop;
    int device = 0;
    int status = tqi_cuda_check(cudaGetDevice(&device), "asking for the current CUDA device");
    if (status != TQ_OK || (device < KNOWN && ready[device].load(std::memory_order_relaxed))) {
        return status;
    }
    const cudaError_t error = cudaFuncGetAttributes(&attributes, tq_probe_kernel);
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
        error == cudaErrorInvalidKernelImage) {
        (void) cudaGetLastError();
        status = tqi_cuda_check(cudaGetDeviceProperties(&prop, device), "reading the CUDA device's properties");
        return status != TQ_OK ? status
                               : tqi_cuda_fail(TQ_E_UNSUPPORTED, NO_CODE, prop.name, prop.major, prop.minor, prop.major,
                                               prop.minor);
    }
    status = tqi_cuda_check(
        error, "loading the kernels"); /* an exclusive device in use, PTX newer than the driver, a lost device */
    if (status != TQ_OK) {
        return status;
    }
    if (device < KNOWN) {
        ready[device].store(true, std::memory_order_relaxed);
    }
    return TQ_OK;
}

extern "C" int tq_cuda_device_count(void) {
    int n = 0;
    const int status = tqi_cuda_check(cudaGetDeviceCount(&n), "looking for CUDA devices");
    return status == TQ_OK ? n : status;
}

extern "C" int tq_cuda_device_use(int i, tq_cuda_device * device) {
    cudaDeviceProp prop;
    const int n = tq_cuda_device_count();
    if (n < 0) {
        return n;
    }
    if (i < 0 || i >= n) {
        return tqi_cuda_fail(TQ_E_ARGUMENT, "CUDA device %d given; there are %d", i, n);
    }
    int status = tqi_cuda_check(cudaSetDevice(i), "selecting the CUDA device");
    if (status == TQ_OK) {
        status = tqi_cuda_check(cudaGetDeviceProperties(&prop, i), "reading the CUDA device's properties");
    }
    if (status == TQ_OK) {
        status = tq_cuda_device_ready();
    }
    if (status != TQ_OK) {
        return status;
    }
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

extern "C" int tq_cuda_synchronize(void * stream) {
    return tqi_cuda_check(cudaStreamSynchronize((cudaStream_t) stream), "waiting for the CUDA stream");
}

#else

tq_host_machine tq_host;

extern "C" int tq_cuda_emulated(void) {
    return 1;
}

/* Environment variables for tests: a driver's refusal in its words, a device that nothing was compiled for, bytes of memory. */
extern "C" int tq_cuda_device_ready(void) {
    return getenv("TQ_HOST_NO_CODE") != NULL ? tqi_cuda_fail(TQ_E_UNSUPPORTED, NO_CODE, "emulated", 9, 0, 9, 0) : TQ_OK;
}

extern "C" int tq_cuda_device_count(void) {
    const char * refusal = getenv("TQ_HOST_NO_DRIVER");
    return refusal != NULL ? tqi_cuda_fail(TQ_E_UNSUPPORTED, "looking for CUDA devices: %s", refusal) : 1;
}

extern "C" int tq_cuda_device_use(int i, tq_cuda_device * device) {
    const int n = tq_cuda_device_count();
    if (n < 0) {
        return n;
    }
    if (i != 0) {
        return tqi_cuda_fail(TQ_E_ARGUMENT, "CUDA device %d given; there is 1", i);
    }
    if (tq_cuda_device_ready() != TQ_OK) {
        return TQ_E_UNSUPPORTED;
    }
    if (device != NULL) {
        memset(device, 0, sizeof *device);
        snprintf(device->name, sizeof device->name, "emulated");
        device->cc = 90;
        device->n_sm = 2;
        device->shared_per_block = 227 * 1024;
        device->shared_per_sm = 228 * 1024;
    }
    return TQ_OK;
}

/* Memory that ends, but for less than 16 bytes, where a page begins that cannot be touched: kernels that read beyond an array
 * end the process, as they may or may not on a GPU. */
static std::map<void *, std::pair<void *, size_t>> & allocations =
    *new std::map<void *, std::pair<void *, size_t>>; /* outlives exit */
static size_t mapped;
static std::mutex allocations_lock;

extern "C" int tq_cuda_alloc(size_t bytes, void ** data) {
    const std::lock_guard<std::mutex> lock(allocations_lock);
    const char * const limit = getenv("TQ_HOST_MEMORY");
    if (limit != NULL && mapped + bytes > strtoull(limit, NULL, 10)) {
        return tqi_cuda_fail(TQ_E_MEMORY, "CUDA device 0 has no memory for %zu bytes; %zu are in use", bytes, mapped);
    }
    const size_t page = (size_t) sysconf(_SC_PAGESIZE), used = (bytes + 15) / 16 * 16,
                 pages = (used + page - 1) / page * page;
    void * const base = mmap(NULL, pages + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED || mprotect((uint8_t *) base + pages, page, PROT_NONE) != 0) {
        return tqi_cuda_fail(TQ_E_MEMORY, "allocating %zu bytes failed", bytes);
    }
    *data = (uint8_t *) base + pages - used;
    allocations[*data] = { base, pages + page };
    mapped += pages + page;
    return TQ_OK;
}

extern "C" int tq_cuda_free(void * data) {
    const std::lock_guard<std::mutex> lock(allocations_lock);
    const auto found = allocations.find(data);
    if (data != NULL && found == allocations.end()) {
        return tqi_cuda_fail(TQ_E_ARGUMENT, "%p given to free; it was not allocated", data);
    }
    if (data != NULL) {
        munmap(found->second.first, found->second.second);
        mapped -= found->second.second;
        allocations.erase(found);
    }
    return TQ_OK;
}

extern "C" int tq_cuda_copy(const void * from, size_t bytes, int, void *, void * to) {
    memcpy(to, from, bytes);
    return TQ_OK;
}

extern "C" int tq_cuda_synchronize(void *) {
    return TQ_OK;
}

#endif
