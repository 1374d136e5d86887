/* tq_ggml_python.c: see tq_ggml_python.h. */
#include "tq_ggml_python.h"

#include "tq_ggml_cache.h"
#include "tq_ggml_policy.h"

#include <string.h>

#define SIZE_OF(type) { #type, sizeof(struct type) }

size_t tq_ggml_sizeof(const char * name) {
    static const struct {
        const char * name;
        size_t size;
    } sizes[] = {
        SIZE_OF(tq_ggml_cache_tensor), SIZE_OF(tq_ggml_layer_policy),   SIZE_OF(ggml_tensor),
        SIZE_OF(ggml_type_traits),     SIZE_OF(ggml_threadpool_params),
    };
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        if (strcmp(sizes[i].name, name) == 0) {
            return sizes[i].size;
        }
    }
    return 0;
}

bool tq_ggml_is_set(void * flag) {
    return *(const volatile bool *) flag;
}
