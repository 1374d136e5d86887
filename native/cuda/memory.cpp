/* memory.cu: device memory that several owners share, its export as DLPack tensors, and the order of streams. */
#include "simt.cuh"

#include <atomic>
#include <new>

struct tq_cuda_memory {
    void * data;
    void * stream; /* whose work it is allocated and freed among */
    int device;
    bool pooled; /* by cudaMallocAsync */
    std::atomic<int> owners;
    std::atomic<bool> elsewhere; /* work on other streams may be using it */
};

/* ---- Devices and streams ---- */

#if defined(__CUDACC__)

extern "C" int tq_cuda_device_swap(int i) {
    int before = 0;
    const int status = tqi_cuda_check(cudaGetDevice(&before), "asking for the current CUDA device");
    if (status != TQ_OK || before == i || i < 0) {
        return status != TQ_OK ? status : before;
    }
    const int set = tqi_cuda_check(cudaSetDevice(i), "selecting the CUDA device");
    return set != TQ_OK ? set : before;
}

extern "C" int tq_cuda_device_of(const void * data) {
    cudaPointerAttributes attributes;
    const int status = tqi_cuda_check(cudaPointerGetAttributes(&attributes, data), "asking where memory lies");
    if (status != TQ_OK) {
        return status;
    }
    if (attributes.type != cudaMemoryTypeDevice && attributes.type != cudaMemoryTypeManaged) {
        return tqi_cuda_fail(TQ_E_ARGUMENT, "%p given; it is no device memory", data);
    }
    return attributes.device;
}

extern "C" int tq_cuda_stream_wait(void * waiting, void * other) {
    cudaEvent_t event;
    if (waiting == other) {
        return TQ_OK;
    }
    int status = tqi_cuda_check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "ordering CUDA streams");
    if (status != TQ_OK) {
        return status;
    }
    status = tqi_cuda_check(cudaEventRecord(event, (cudaStream_t) other), "ordering CUDA streams");
    if (status == TQ_OK) {
        status = tqi_cuda_check(cudaStreamWaitEvent((cudaStream_t) waiting, event, 0), "ordering CUDA streams");
    }
    (void) cudaEventDestroy(event); /* which happens once it has come */
    return status;
}

static int allocate(size_t bytes, tq_cuda_memory * m) {
    int pools = 0;
    m->pooled = cudaDeviceGetAttribute(&pools, cudaDevAttrMemoryPoolsSupported, m->device) == cudaSuccess && pools;
    const cudaError_t error =
        m->pooled ? cudaMallocAsync(&m->data, bytes, (cudaStream_t) m->stream) : cudaMalloc(&m->data, bytes);
    if (error == cudaErrorMemoryAllocation) {
        size_t available = 0, total = 0;
        (void) cudaGetLastError();
        (void) cudaMemGetInfo(&available, &total);
        return tqi_cuda_fail(TQ_E_MEMORY, "CUDA device %d has no memory for %zu bytes; %zu of %zu are free", m->device,
                             bytes, available, total);
    }
    return tqi_cuda_check(error, "allocating device memory");
}

/* cudaFree waits for the device, cudaFreeAsync is itself work on the stream: neither takes memory from kernels still to run on
 * that stream. Other streams are not waited for by the latter, and may be gone by now, so the device is. */
static void release(tq_cuda_memory * m) {
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

#else

extern "C" int tq_cuda_device_swap(int i) {
    return i <= 0 ? 0 : tqi_cuda_fail(TQ_E_ARGUMENT, "CUDA device %d given; there is 1", i);
}

extern "C" int tq_cuda_device_of(const void * data) {
    return data != NULL ? 0 : tqi_cuda_fail(TQ_E_ARGUMENT, "%p given; it is no device memory", data);
}

extern "C" int tq_cuda_stream_wait(void *, void *) {
    return TQ_OK;
}

static int allocate(size_t bytes, tq_cuda_memory * m) {
    return tq_cuda_alloc(bytes, &m->data);
}

static void release(tq_cuda_memory * m) {
    (void) tq_cuda_free(m->data);
}

#endif

/* ---- Memory ---- */

extern "C" int tq_cuda_memory_new(int device, size_t bytes, void * stream, tq_cuda_memory ** memory, void ** data) {
    tq_cuda_memory * m = new (std::nothrow) tq_cuda_memory;
    if (m == NULL) {
        return tqi_cuda_fail(TQ_E_MEMORY, "no host memory for a record of device memory");
    }
    m->data = NULL;
    m->stream = stream;
    m->device = device;
    m->pooled = false;
    m->owners = 1;
    m->elsewhere = false;
    const int status = allocate(bytes > 0 ? bytes : 1, m);
    if (status != TQ_OK) {
        delete m;
        return status;
    }
    *memory = m;
    *data = m->data;
    return TQ_OK;
}

extern "C" void tq_cuda_memory_free(tq_cuda_memory * memory) {
    if (memory != NULL && --memory->owners == 0) {
        release(memory);
        delete memory;
    }
}

extern "C" void tq_cuda_memory_elsewhere(tq_cuda_memory * memory) {
    memory->elsewhere = true;
}

/* ---- DLPack ---- */

/* A managed tensor of either layout, and what it points to. */
template <typename Managed> struct tq_export {
    Managed managed;
    tq_cuda_memory * memory;
    int64_t shape[TQ_CUDA_MAX_DIMS], strides[TQ_CUDA_MAX_DIMS];
};

/* May be called by any thread, without Python's lock, after the cache and the library's Python objects are gone. */
template <typename Managed> static void delete_export(Managed * managed) {
    tq_export<Managed> * e = (tq_export<Managed> *) managed->context;
    tq_cuda_memory_free(e->memory);
    delete e;
}

template <typename Managed>
static Managed * new_export(tq_cuda_memory * memory, int type, int n_dims, const int64_t * shape) {
    tq_export<Managed> * e = new (std::nothrow) tq_export<Managed>;
    if (e == NULL) {
        (void) tqi_cuda_fail(TQ_E_MEMORY, "no host memory for a DLPack tensor");
        return NULL;
    }
    memset(e, 0, sizeof *e);
    e->memory = memory;
    e->managed.context = e;
    e->managed.deleter = delete_export<Managed>;
    tq_dlpack_tensor & t = e->managed.tensor;
    t.data = memory->data;
    t.device_type = tq_cuda_emulated() ? TQ_DLPACK_CPU : TQ_DLPACK_CUDA;
    t.device_id = memory->device;
    t.n_dims = n_dims;
    t.code = type == TQ_CUDA_TYPE_BF16 ? TQ_DLPACK_BFLOAT : TQ_DLPACK_FLOAT;
    t.bits = type == TQ_TYPE_F32 ? 32 : 16;
    t.lanes = 1;
    t.shape = e->shape;
    t.strides = e->strides;
    int64_t stride = 1;
    for (int i = n_dims - 1; i >= 0; --i) {
        e->shape[i] = shape[i];
        e->strides[i] = stride;
        stride *= shape[i];
    }
    ++memory->owners;
    return &e->managed;
}

extern "C" void * tq_cuda_memory_export(tq_cuda_memory * memory, int type, int n_dims, const int64_t * shape,
                                        int versioned) {
    if (n_dims < 0 || n_dims > TQ_CUDA_MAX_DIMS) {
        (void) tqi_cuda_fail(TQ_E_ARGUMENT, "%d dimensions given; allowed are 0 to %d", n_dims, TQ_CUDA_MAX_DIMS);
        return NULL;
    }
    if (!versioned) {
        return new_export<tq_dlpack_managed>(memory, type, n_dims, shape);
    }
    tq_dlpack_versioned * managed = new_export<tq_dlpack_versioned>(memory, type, n_dims, shape);
    if (managed != NULL) {
        managed->major = 1;
    }
    return managed;
}

/* ---- Capsules ---- */

static int (*capsule_is_valid)(void *, const char *);
static void * (*capsule_pointer)(void *, const char *);

extern "C" void tq_cuda_capsule_api(void * is_valid, void * pointer) {
    memcpy(&capsule_is_valid, &is_valid, sizeof is_valid);
    memcpy(&capsule_pointer, &pointer, sizeof pointer);
}

extern "C" const char * tq_cuda_capsule_name(int versioned) {
    return versioned ? "dltensor_versioned" : "dltensor";
}

extern "C" void tq_cuda_capsule_free(void * capsule) {
    if (capsule_is_valid(capsule, tq_cuda_capsule_name(0))) {
        tq_dlpack_managed * managed = (tq_dlpack_managed *) capsule_pointer(capsule, tq_cuda_capsule_name(0));
        managed->deleter(managed);
    } else if (capsule_is_valid(capsule, tq_cuda_capsule_name(1))) {
        tq_dlpack_versioned * managed = (tq_dlpack_versioned *) capsule_pointer(capsule, tq_cuda_capsule_name(1));
        managed->deleter(managed);
    }
}
