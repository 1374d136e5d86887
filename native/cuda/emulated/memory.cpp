/* memory.cpp: emulated device memory. It ends, but for less than 16 bytes, where a page begins that cannot be touched:
 * kernels that read beyond an array end the process, as they may or may not on a GPU. TQ_HOST_MEMORY in the environment
 * limits it, in bytes. */
#include "../memory.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <map>
#include <mutex>
#include <utility>

struct mapping {
    void * base;
    size_t bytes;
};

static std::map<void *, mapping> & allocations = *new std::map<void *, mapping>; /* outlives exit */
static size_t mapped;
static std::mutex allocations_lock;

extern "C" int tq_cuda_alloc(size_t bytes, void ** data) {
    const std::lock_guard<std::mutex> lock(allocations_lock);
    const char * const limit = getenv("TQ_HOST_MEMORY");
    if (limit != NULL && mapped + bytes > strtoull(limit, NULL, 10)) {
        return tq_cuda_fail(TQ_E_MEMORY, "CUDA device 0 has no memory for %zu bytes; %zu are in use", bytes, mapped);
    }
    const size_t page = (size_t) sysconf(_SC_PAGESIZE), used = (bytes + 15) / 16 * 16,
                 pages = (used + page - 1) / page * page;
    void * const base = mmap(NULL, pages + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED || mprotect((uint8_t *) base + pages, page, PROT_NONE) != 0) {
        return tq_cuda_fail(TQ_E_MEMORY, "allocating %zu bytes failed", bytes);
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
        return tq_cuda_fail(TQ_E_ARGUMENT, "%p given to free; it was not allocated", data);
    }
    if (data != NULL) {
        munmap(found->second.base, found->second.bytes);
        mapped -= found->second.bytes;
        allocations.erase(found);
    }
    return TQ_OK;
}

extern "C" int tq_cuda_copy(const void * from, size_t bytes, int, void *, void * to) {
    memcpy(to, from, bytes);
    return TQ_OK;
}

int tqi_cuda_memory_allocate(size_t bytes, tq_cuda_memory * m) {
    return tq_cuda_alloc(bytes, &m->data);
}

void tqi_cuda_memory_release(tq_cuda_memory * m) {
    (void) tq_cuda_free(m->data);
}
