/* attention_plan.h: how attention is cut into tasks, and what it needs of memory (attention.c says what the words mean). */
#ifndef TQI_ATTENTION_PLAN_H
#define TQI_ATTENTION_PLAN_H

#include "kernels.h"

#define TILE TQI_AHEAD /* keys per tile */
#define MAX_SPAN 16    /* tasks that go through the keys together */
#define ALIGN 64       /* bytes */

typedef struct {
    int fused;
    int group; /* query heads per KV head */
    int rows;  /* query rows per task */
    int n_vec; /* group * rows */
    int n_col; /* n_vec, padded to TQI_LANES in the tiled way */
    int64_t n_row_blocks;
    int64_t n_chunks;
    int64_t chunk; /* keys per chunk, a multiple of TILE */
    int64_t n_tasks;
    int span;                  /* tasks that go through the keys together, at most */
    size_t query;              /* floats of a query vector as scores takes it, if K is of tqgguf */
    size_t vectors;            /* floats of one task's q, query, o, max, sum */
    size_t scratch;            /* floats per thread */
    size_t partial;            /* floats per task; 0 if keys are not cut */
    const tqi_codec * k_codec; /* NULL: not a type of tqgguf */
    const tqi_codec * v_codec;
} tqi_plan;

static inline int64_t min64(int64_t x, int64_t y) {
    return x < y ? x : y;
}

static inline size_t padded(size_t n_floats) {
    const size_t lanes = ALIGN / sizeof(float);
    return (n_floats + lanes - 1) / lanes * lanes;
}

/* Checks the arguments and makes the plan; its codecs are NULL for types that are not of tqgguf. Returns TQ_OK, or
 * TQ_E_ARGUMENT with a message. */
int tqi_plan_make(const tq_attn * args, int n_threads, tqi_plan * plan);

#endif /* TQI_ATTENTION_PLAN_H */
