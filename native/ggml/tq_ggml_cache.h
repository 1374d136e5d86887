/* tq_ggml_cache.h: the tensors of the KV caches that llama.cpp made, so that a caller compares them with what it asked
 * for.
 *
 * The constructor of llama_kv_cache notes each K and V tensor it owns in a list of its thread, after it has allocated
 * them: type, size and buffer are the tensor's own. Every cache with a cell per token is a llama_kv_cache: plain, iswa
 * (first the layers with full attention, then those with a window), msa, dsa, dsv4 (raw, csa, hca, lid) and the
 * attention part of a hybrid memory.
 *
 * Not noted: a layer that uses the tensors of another layer, or of another context's cache; V of MLA, which has none;
 * the states of recurrent layers and of dsv4's compressors, which have no cells and are f32.
 *
 * Use, on one thread: tq_ggml_cache_list_begin(), llama_init_from_model(), tq_ggml_cache_list(NULL, 0) for the number,
 * tq_ggml_cache_list(to, n), tq_ggml_cache_list_end(). In libggml-base. */
#ifndef TQ_GGML_CACHE_H
#define TQ_GGML_CACHE_H

#include "ggml.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* cffi: begin */

struct tq_ggml_cache_tensor {
    char name[64];    /* llama.cpp's: cache_k_l3, cache_v_l3; the caches of one memory have a tag before k and v */
    char device[64];  /* the device its buffer belongs to, as the log says "layer 3: dev = CUDA0"; "CPU": host memory */
    int64_t n_embd;   /* values of a cell: n_head_kv * head_dim */
    int64_t n_cells;  /* cells of a stream */
    int64_t n_stream; /* 1, or one for each sequence (kv_unified = false) */
    int64_t bytes;    /* of the tensor, without its tail */
    int64_t n_mean;   /* values of the mean that is subtracted from each key; 0: none is */
    int64_t n_gain;   /* values of the gain that each key is multiplied by; 0: by none */
    uint64_t calibration_sum; /* of the mean and gain that are in the cache: tq_ggml_calibration_sum */
    int64_t tail_bytes;       /* of the tail's rows and owners, all streams; 0: it has no tail */
    int32_t layer;            /* number of the layer that owns it */
    int32_t side;             /* 0: K, 1: V */
    int32_t type;             /* enum ggml_type */
    int32_t tail_recent;      /* rows of the tail for the newest cells of a stream */
    int32_t tail_first;       /* rows of the tail for the first cells of a stream */
    int32_t rotated;          /* 1: it is rotated by a Hadamard matrix before it is stored; else 0 */
};

/* Empties the calling thread's list; from now on the caches that this thread makes are noted. */
void tq_ggml_cache_list_begin(void);

/* Copies the first n notes to to, in the order of their making, and returns how many there are. */
int32_t tq_ggml_cache_list(struct tq_ggml_cache_tensor * to, int32_t n);

/* Frees the calling thread's list; nothing is noted any more. */
void tq_ggml_cache_list_end(void);

/* ---- What else Python asks of libggml-base ---- */

/* The size of a struct that Python declares again, by its name in C: tq_ggml_cache_tensor, tq_ggml_layer_policy,
 * ggml_tensor, ggml_type_traits, ggml_threadpool_params. 0: another name. Where Python's struct has another size, its
 * declaration is not this library's, and must not be used. */
size_t tq_ggml_sizeof(const char * name);

/* Whether the bool at flag is set: a ggml_abort_callback that asks no interpreter. */
bool tq_ggml_is_set(void * flag);

/* cffi: end */

/* For the constructor: notes K or V of a layer, if the thread keeps a list. t: a cache tensor, or NULL, which is not
 * noted; rotated: by llama.cpp. */
void tq_ggml_cache_note(const struct ggml_tensor * t, uint32_t layer, int32_t side, bool rotated);

#ifdef __cplusplus
}
#endif

#endif /* TQ_GGML_CACHE_H */
