/* memory.h: the record of device memory that memory.cpp counts the owners of and the runtime allocates. */
#ifndef TQI_CUDA_MEMORY_H
#define TQI_CUDA_MEMORY_H

#include "internal.h"

#include <atomic>

struct tq_cuda_memory {
    void * data = NULL;
    void * stream; /* whose work it is allocated and freed among */
    int device;
    bool pooled = false; /* by cudaMallocAsync */
    std::atomic<int> owners{ 1 };
    std::atomic<bool> elsewhere{ false }; /* work on other streams may be using it */

    tq_cuda_memory(int device, void * stream) : stream(stream), device(device) {}
};

/* Sets m->data, allocated in the order of m->stream's work. */
int tqi_cuda_memory_allocate(size_t bytes, tq_cuda_memory * m);
void tqi_cuda_memory_release(tq_cuda_memory * m);

#endif
