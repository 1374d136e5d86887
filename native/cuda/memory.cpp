/* memory.cpp: device memory that several owners share, and its export as DLPack tensors. */
#include "memory.h"

#include <new>

/* ---- Owners ---- */

extern "C" int tq_cuda_memory_new(int device, size_t bytes, void * stream, tq_cuda_memory ** memory, void ** data) {
    tq_cuda_memory * m = new (std::nothrow) tq_cuda_memory(device, stream);
    if (m == NULL) {
        return tq_cuda_fail(TQ_E_MEMORY, "no host memory for a record of device memory");
    }
    const int status = tqi_cuda_memory_allocate(bytes > 0 ? bytes : 1, m);
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
        tqi_cuda_memory_release(memory);
        delete memory;
    }
}

extern "C" void tq_cuda_memory_elsewhere(tq_cuda_memory * memory) {
    memory->elsewhere = true;
}

/* ---- DLPack ---- */

/* A managed tensor of either layout, and what it points to. */
template <typename Managed> struct tqi_export {
    Managed managed;
    tq_cuda_memory * memory;
    int64_t shape[TQ_CUDA_MAX_DIMS], strides[TQ_CUDA_MAX_DIMS];
};

/* May be called by any thread, without Python's lock, after the cache and the library's Python objects are gone. */
template <typename Managed> static void delete_export(Managed * managed) {
    tqi_export<Managed> * e = (tqi_export<Managed> *) managed->context;
    tq_cuda_memory_free(e->memory);
    delete e;
}

template <typename Managed>
static Managed * new_export(tq_cuda_memory * memory, int type, int n_dims, const int64_t * shape) {
    tqi_export<Managed> * e = new (std::nothrow) tqi_export<Managed>;
    if (e == NULL) {
        (void) tq_cuda_fail(TQ_E_MEMORY, "no host memory for a DLPack tensor");
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
        (void) tq_cuda_fail(TQ_E_ARGUMENT, "%d dimensions given; allowed are 0 to %d", n_dims, TQ_CUDA_MAX_DIMS);
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
