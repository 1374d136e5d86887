/* attention_plan.h: how one call of attention is cut into blocks of threads, and what a block keeps in shared memory. */
#ifndef TQ_ATTENTION_PLAN_H
#define TQ_ATTENTION_PLAN_H

#include "tq_cuda.h"

#include "simt.cuh"

#if !defined(_Static_assert)
#    define _Static_assert static_assert
#endif
extern "C" {
#include "../src/codebook.h"
}

#define TQ_ATTENTION_THREADS 256
/* Blocks of threads that registers leave room for on a multiprocessor. With three, 80 registers each, the compiler spills 104 bytes
 * and computes addresses again and again: 473 instructions per tile of a warp instead of 412 (pqo3, heads of 128, sm_90). */
#define TQ_ATTENTION_BLOCKS 2
#define TQ_WARPS (TQ_ATTENTION_THREADS / 32)
#define TQ_MAX_TILE 128                        /* keys */
#define TQ_WARP_TILE 16                        /* keys of a tile that a warp has to itself, */
#define TQ_WARP_STEP (TQ_WARPS * TQ_WARP_TILE) /* and from one of its tiles to the next */
#define TQ_MAX_SPLITS 1024
#define TQ_MERGE_THREADS 128
/* Kernels for heads of 64 or 128 (attention_warp.cuh): the bytes from row to row in shared memory are
 * a constant, too, so that loads need one address, and no bank is met twice for K (see check_operand). */
#define TQ_FIXED_STRIDE(blocks) ((blocks) == 4 ? 80 : 48)
/* A warp's stage: rows of K, rows of V, and (8 n_tiles, 16) values of the mask. */
#define TQ_WARP_V(blocks) (TQ_WARP_TILE * TQ_FIXED_STRIDE(blocks))
#define TQ_WARP_MASK(blocks) (2 * TQ_WARP_V(blocks))
#define TQ_WARP_STAGE(blocks, n_tiles) (TQ_WARP_MASK(blocks) + (n_tiles) * 8 * TQ_WARP_TILE * 2)
/* Where warps leave results: four floats of each lane, 2 * blocks times. With one more, reading meets no bank twice, either. */
#define TQ_PART_STRIDE 33
#define TQ_WARP_SUMS(blocks) (TQ_WARPS * 2 * (blocks) * TQ_PART_STRIDE * 16)
#define TQ_TAIL_SLOTS 32 /* rows of a tail per block of threads, whose 128 threads keep eight query vectors */
#define TQ_TAIL_ATTENTION_THREADS 128
#define TQ_MAX_TILES 2 /* tensor-core tiles of eight query vectors per block of threads */

/* The rows of K's or V's precise tail; owner is NULL if it has none. */
struct tq_tail {
    const uint8_t * data;
    const int32_t * owner;
    int64_t stride_row, stride_head, stride_stream, owner_stride; /* the last in owners, not bytes */
};

/* K or V. */
struct tq_operand {
    const uint8_t * data;
    int64_t stride_token, stride_head, stride_stream;
    int type; /* a tq_type */
    int ours;
    int signs_first;
    int n_blocks; /* of 32 values per row */
    int row_bytes;
    int copied_bytes;  /* of a row, the most that a head needs if copied 16 bytes at a time */
    int grain;         /* bytes copied at once: 16, 8, 4, or 2 if nothing is aligned better */
    int stride_shared; /* of rows in shared memory */
    int units;         /* grains per row; with 16, which take a row's neighbours along, the most that a head needs */
    int rows_on;       /* rows that 256 threads copy at once */
    int step_shared;   /* bytes from a row to the one that is rows_on further, in shared memory */
    int64_t step;      /* and in data */
    int64_t step_tile; /* bytes of data from tile to tile */
    uint32_t units_inverse; /* 2^32 / units, rounded up: a division by multiplication, below 256 */
    float levels[TQI_MAX_LEVELS];
    tq_tail tail;
};

/* What a kernel is launched with. A query vector of a KV head is head i % group of row i / group. */
struct tq_attention {
    const uint8_t * q;
    int64_t q_stride_row, q_stride_head, q_stride_stream;
    tq_operand k, v;
    const uint8_t * mask;
    int64_t mask_stride_row, mask_stride_head, mask_stride_stream;
    const float * sinks;
    uint8_t * out;
    int64_t out_stride_row, out_stride_head, out_stride_stream;
    float * stats;                  /* (n_stream, n_head_kv, n_vec, n_parts, 2): largest score, sum */
    float * partials;               /* (n_stream, n_head_kv, n_vec, n_parts, DV), transformed */
    float scale, softcap, max_bias; /* a score is scale K q, or softcap tanh(scale K q) */
    int n_mask_head, n_mask_stream;
    int n_kv, n_head, n_head_kv, n_stream, group, n_vec;
    int streams_per_kv;
    uint32_t heads_inverse, group_inverse; /* of n_head_kv and group, for tq_divide */
    int n_tiles;                           /* of eight query vectors in a block of threads: 1 or 2 */
    int tile;                              /* keys in shared memory at once: 128, 64 or 32 */
    int n_stages;                          /* tiles in flight or in use */
    int one_table;                         /* K and V share their table of levels */
    int wide;                              /* K, V and the mask can be copied 16 bytes at a time */
    int blocks;              /* of K and of V, where there is a kernel for that (attention_warp.cuh); otherwise 0 */
    int n_splits;            /* ranges of keys, each of */
    int split;               /* keys, whole tiles */
    int n_parts;             /* to be merged: n_splits, and those of the tails */
    int n_recent, n_first;   /* rows of K's and V's tails; 0: there are none */
    uint32_t recent_inverse; /* of n_recent */
    int tail_shared_bytes;
    int at_v_table, at_q, at_scores, at_weights, at_vectors,
        at_stages; /* bytes into shared memory; K's table is at 0 */
    int stage_bytes, v_in_stage;
    int shared_bytes;
};

/* 2^32 / n, rounded down; n = 1: one less. */
TQ_HD uint32_t tq_inverse_of(int n) {
    return n == 1 ? 0xffffffffu : (uint32_t) ((1ull << 32) / (uint64_t) n);
}

/* x / n for x >= 0, in some 5 instructions instead of 25: the product falls short by one at most. */
TQ_D int tq_divide(int x, int n, uint32_t inverse) {
    const uint32_t q = tq_multiply_high((uint32_t) x, inverse);
    return (int) (q + ((uint32_t) x - q * (uint32_t) n >= (uint32_t) n ? 1u : 0u));
}

/* Floats per query vector while parts are added: (units, 8 dimensions of a slice, 8 lanes g), and four so that the lanes of a
 * warp, g and t, write to different banks. */
TQ_HD int tq_sum_stride(int n_blocks) {
    return (n_blocks + 1) / 2 * 64 + 4;
}

/* Copies of 16 bytes that a row takes, where it begins at most 8 bytes behind a multiple of 16, or fits anyway. */
TQ_HD constexpr int tq_wide_units(int row_bytes) {
    return (row_bytes + 8 + 15) / 16;
}

/* What of the device matters. */
struct tqi_cuda_limits {
    int n_sm;
    size_t shared_per_block, shared_per_sm;
};

/* Fills *a but for stats and partials. */
int tqi_cuda_plan(const tq_attn * args, const tqi_cuda_limits & limits, tq_attention * a);
size_t tqi_cuda_plan_work_bytes(const tq_attention & a);

#endif
