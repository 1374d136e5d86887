/* tq_ggml.h: what llama.cpp calls. The patches in patches/ include this header and call these functions and macros;
 * everything behind them is libtqgguf (native/include/tqgguf.h).
 *
 * tq_ggml_types.c becomes a part of libggml-base, and tq_ggml_cpu.c of libggml-cpu, which calls libggml-base. libllama
 * and the command-line tools include the headers beside this one, whose functions are in libggml-base, too. */
#ifndef TQ_GGML_H
#define TQ_GGML_H

#include "ggml.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

#define TQ_GGML_BLOCK 32 /* values per block */
#define TQ_GGML_PQO3_BYTES 14
#define TQ_GGML_PQO4_BYTES 18
#define TQ_GGML_PQT3_BYTES 14
#define TQ_GGML_PQT4_BYTES 18
#define TQ_GGML_PQT2_BYTES 10
#define TQ_GGML_PQT5_BYTES 22

/* The types of tqgguf are neighbours. */
static inline bool tq_ggml_is_pqo(enum ggml_type type) {
    return type >= GGML_TYPE_PQO3 && type <= GGML_TYPE_PQT5;
}

/* Nodes that are ours, whatever the types: they write or read a cache that has a precise tail (tq_ggml_tail.h). */
static inline bool tq_ggml_writes_tail(const struct ggml_tensor * node) {
    return node->op == GGML_OP_SET_ROWS && node->src[3];
}

static inline bool tq_ggml_reads_tail(const struct ggml_tensor * node) {
    return node->op == GGML_OP_FLASH_ATTN_EXT && (node->src[5] || node->src[7]);
}

/* A FLASH_ATTN_EXT node that libtqgguf computes. */
static inline bool tq_ggml_attends(const struct ggml_tensor * node) {
    return tq_ggml_is_pqo(node->src[1]->type) || tq_ggml_is_pqo(node->src[2]->type) || tq_ggml_reads_tail(node);
}

/* The functions of each type; to_float and from_float are in libggml-base, vec_dot in libggml-cpu: s = <blocks, y>, y:
 * f32 (n). Its strides are unused: one row at a time (nrc = 1). */
#define TQ_GGML_TYPES(X) X(pqo3, PQO3) X(pqo4, PQO4) X(pqt3, PQT3) X(pqt4, PQT4) X(pqt2, PQT2) X(pqt5, PQT5)
#define TQ_GGML_DECLARE(name, NAME)                                                                                    \
    void tq_ggml_to_float_##name(const void * blocks, float * x, int64_t n);                                           \
    void tq_ggml_from_float_##name(const float * x, void * blocks, int64_t n);                                         \
    void tq_ggml_cpu_vec_dot_##name(int n, float * s, size_t bs, const void * blocks, size_t bx, const void * y,       \
                                    size_t by, int nrc);
TQ_GGML_TYPES(TQ_GGML_DECLARE)

/* ---- libggml-base: the rows of ggml's table of types, and two of its switches over types ---- */

#define TQ_GGML_TYPE_TRAITS(name, bytes)                                                                               \
    {                                                                                                                  \
        .type_name = #name,                                                                                            \
        .blck_size = TQ_GGML_BLOCK,                                                                                    \
        .type_size = (bytes),                                                                                          \
        .is_quantized = true,                                                                                          \
        .to_float = tq_ggml_to_float_##name,                                                                           \
        .from_float_ref = tq_ggml_from_float_##name,                                                                   \
    }

/* Encodes and decodes n values. An error of libtqgguf, which ggml's own checks rule out, ends the process with its
 * message. */
void tq_ggml_encode(enum ggml_type type, const float * x, void * blocks, int64_t n);
void tq_ggml_decode(enum ggml_type type, const void * blocks, float * x, int64_t n);
/* Encodes n values and returns the number of bytes written. */
size_t tq_ggml_quantize(enum ggml_type type, const float * x, void * blocks, int64_t n);
/* False, with a line on stderr, if a block's scale is NaN or infinite: the encoder never writes that. */
bool tq_ggml_validate(enum ggml_type type, const void * blocks, size_t n_blocks);

/* ---- libggml-cpu: the rows of the CPU backend's table of types, and its operators ---- */

#define TQ_GGML_TYPE_TRAITS_CPU(name)                                                                                  \
    {                                                                                                                  \
        .from_float = tq_ggml_from_float_##name,                                                                       \
        .vec_dot = tq_ggml_cpu_vec_dot_##name,                                                                         \
        .vec_dot_type = GGML_TYPE_F32,                                                                                 \
        .nrows = 1,                                                                                                    \
    }

/* Each operator is a pair: does it take this node, and compute it (called by every thread). Under use_ref upstream's
 * own loops run instead, over to_float, from_float and vec_dot above: test-backend-ops compares the two. */

/* SET_ROWS from f32 or f16, into a type of ours or into one that has a tail; split over threads by blocks, since a decode
 * step stores a single row. */
bool tq_ggml_set_rows_used(const struct ggml_tensor * dst);
void tq_ggml_set_rows(const struct ggml_compute_params * params, struct ggml_tensor * dst);

/* DUP and CPY between a type of ours and f32, f16, bf16 or another one of ours, for any strides on both sides. */
bool tq_ggml_dup_used(const struct ggml_tensor * dst);
void tq_ggml_dup(const struct ggml_compute_params * params, struct ggml_tensor * dst);

/* MUL_MAT with the matrix that mixes the blocks of a head (tq_ggml_calibration.h), which a hint in its node tells: sums
 * and differences of whole blocks in the place of a product. */
#define TQ_GGML_HINT_MIX 0x7471
bool tq_ggml_mix_used(const struct ggml_tensor * dst);
void tq_ggml_mix(const struct ggml_compute_params * params, struct ggml_tensor * dst);

/* FLASH_ATTN_EXT with a type of ours or a tail on at least one side; the other may be any type that has to_float. */
bool tq_ggml_flash_attn_ext_used(const struct ggml_tensor * dst);
void tq_ggml_flash_attn_ext(const struct ggml_compute_params * params, struct ggml_tensor * dst);
/* Bytes of work buffer for n_tasks threads; 0 if the node is not ours. */
size_t tq_ggml_flash_attn_ext_work_size(const struct ggml_tensor * dst, int n_tasks);

#ifdef __cplusplus
}
#endif

#endif /* TQ_GGML_H */
