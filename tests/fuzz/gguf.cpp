// gguf.cpp: llama.cpp's own GGUF parser with our types registered, on any bytes: it refuses them or gives a context whose sizes fit.
//
// It is upstream's code (ggml/src/gguf.cpp); what the patches add to it are types whose traits it asks for.
#include "gguf.h"
#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <cstdlib>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size);

static void silent(enum ggml_log_level, const char *, void *) {}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    static bool first = true;
    if (first) {
        ggml_log_set(silent, nullptr);
        first = false;
    }
    ggml_context * tensors = nullptr;
    gguf_init_params params = { /*no_alloc =*/true, /*ctx =*/nullptr };
    gguf_context * gguf = gguf_init_from_buffer(data, size, params);
    if (gguf == nullptr) {
        return 0;
    }
    // A shape with a zero among sizes whose product is beyond 64 bits ends the process here; tqgguf.gguf.header refuses it before.
    bool empty = false;
    for (int64_t i = 0; i < gguf_get_n_tensors(gguf); ++i) {
        empty |= gguf_get_tensor_size(gguf, i) == 0;
    }
    gguf_free(gguf);
    params.ctx = &tensors;
    if (empty || (gguf = gguf_init_from_buffer(data, size, params)) == nullptr) {
        return 0;
    }
    ggml_tensor * tensor = ggml_get_first_tensor(tensors);  // not by name: ggml's end at a zero, GGUF's may hold some
    for (int64_t i = 0; i < gguf_get_n_tensors(gguf); ++i, tensor = ggml_get_next_tensor(tensors, tensor)) {
        if (tensor == nullptr || ggml_nbytes(tensor) != gguf_get_tensor_size(gguf, i) ||
            tensor->ne[0] % ggml_blck_size(tensor->type) != 0) {
            abort();
        }
    }
    gguf_free(gguf);
    ggml_free(tensors);
    return 0;
}
