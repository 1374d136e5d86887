/* tq_ggml_python.h: what Python asks of libggml-base besides policies, tails and the list of cache tensors. */
#ifndef TQ_GGML_PYTHON_H
#define TQ_GGML_PYTHON_H

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* cffi: begin */

/* The size of a struct that Python declares again, by its name in C: tq_ggml_cache_tensor, tq_ggml_layer_policy,
 * ggml_tensor, ggml_type_traits, ggml_threadpool_params. 0: another name. Where Python's struct has another size, its
 * declaration is not this library's, and must not be used. */
size_t tq_ggml_sizeof(const char * name);

/* Whether the bool at flag is set: a ggml_abort_callback that asks no interpreter. */
bool tq_ggml_is_set(void * flag);

/* cffi: end */

#ifdef __cplusplus
}
#endif

#endif /* TQ_GGML_PYTHON_H */
