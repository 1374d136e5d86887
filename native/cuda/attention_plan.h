/* attention_plan.h: how one call of attention is cut into blocks of threads: what its kernels are launched with. */
#ifndef TQI_ATTENTION_PLAN_H
#define TQI_ATTENTION_PLAN_H

#include "layout.h"

/* The rows of K's or V's precise tail; owner is NULL if it has none. In a batch a row for each of its own tokens
 * follows, and more integers follow the owners (tq_tail_batch in tqgguf.h). */
struct tqi_tail {
    const uint8_t * data;
    const int32_t * owner;
    int64_t stride_row, stride_head, stride_stream;
    int64_t owner_stride; /* in owners, not bytes */
};

/* K or V. */
struct tqi_operand {
    const uint8_t * data;
    int64_t stride_token, stride_head, stride_stream;
    int type;   /* a tq_type */
    int is_pqo; /* whether it is one of tqgguf's types, and so transformed */
    int signs_first;
    int n_blocks; /* of 32 values per row */
    int row_bytes;
    int part_bytes;         /* of a row that threads copy together: all, or what one of a team's warps takes */
    int wide;               /* tokens begin at multiples of 16 bytes, if data does */
    int grain;              /* bytes copied at once: 16, 8, 4, or 2 if nothing is aligned better */
    int stride_shared;      /* of rows in shared memory */
    int units;              /* grains per row; of 16, which take a row's neighbours along, the most that a head needs */
    int rows_on;            /* rows that 256 threads copy at once */
    int step_shared;        /* bytes from a row to the one that is rows_on further, in shared memory */
    int64_t step;           /* and in data */
    int64_t step_tile;      /* bytes of data from tile to tile */
    uint32_t units_inverse; /* 2^32 / units, rounded up: a division by multiplication, below 256 */
    float levels[TQI_MAX_LEVELS];
    tqi_tail tail;
};

/* What a kernel is launched with. A query vector of a KV head is head i % group of row i / group. */
struct tqi_attention {
    const uint8_t * q;
    int64_t q_stride_row, q_stride_head, q_stride_stream;
    tqi_operand k, v;
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
    uint32_t heads_inverse, group_inverse; /* of n_head_kv and group, for tqi_divide */
    int n_tiles;                           /* of eight query vectors in a block of threads: 1 or 2 */
    int tile;                              /* keys in shared memory at once: 128, 64 or 32 */
    int n_stages;                          /* tiles in flight or in use */
    int one_table;                         /* K and V share their table of levels */
    int wide;                              /* K, V and the mask can be copied 16 bytes at a time */
    int blocks;              /* of K and of V, where there is a kernel for that (attention_warp.cuh); otherwise 0 */
    int team;                /* warps that share a head there: tqi_team_of */
    int n_splits, split;     /* ranges of keys, and how many keys each has: whole tiles */
    int n_parts;             /* to be merged: n_splits, and those of the tails */
    int n_recent, n_first;   /* rows of K's and V's tails; 0: there are none */
    int n_own;               /* of a batch's own tokens; 0: all query rows read the tail alike */
    uint32_t recent_inverse; /* of n_recent */
    tqi_block_layout at;     /* where attention.cuh has what in shared memory */
    int shared_bytes;
};

/* 2^32 / n, rounded down; n = 1: one less. */
TQI_HD uint32_t tqi_reciprocal_of(int n) {
    return n == 1 ? 0xffffffffu : (uint32_t) ((1ull << 32) / (uint64_t) n);
}

/* Checks the arguments and fills *a but for stats and partials. */
int tqi_cuda_plan(const tq_attn * args, const tqi_cuda_limits & limits, tqi_attention * a);

/* Where partials begin in the work buffer, in floats behind stats, and how many bytes the buffer needs: none to merge
 * nothing. */
size_t tqi_cuda_plan_partials_at(const tqi_attention & a);
size_t tqi_cuda_plan_work_bytes(const tqi_attention & a);

#endif
