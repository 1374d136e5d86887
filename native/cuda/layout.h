/* layout.h: what attention's kernels keep in shared memory and where it lies. The plan asks for as much, and the
 * kernels find their way in it, by the same functions. Offsets are bytes from the beginning, where the table of K's
 * levels is. */
#ifndef TQI_LAYOUT_H
#define TQI_LAYOUT_H

#include "internal.h"

#define TQI_ATTENTION_THREADS 256
/* Blocks of threads that registers leave room for on a multiprocessor. With three, 80 registers each, the compiler
 * spills 104 bytes and computes addresses again and again: 473 instructions per tile of a warp instead of 412 (pqo3,
 * heads of 128, sm_90). */
#define TQI_ATTENTION_BLOCKS 2
#define TQI_WARPS (TQI_ATTENTION_THREADS / 32)
#define TQI_MAX_TILE 128 /* keys */
#define TQI_MERGE_THREADS 128
/* Of one K block's part of eight query vectors: the fragments of 32 lanes, 16 bytes each. */
#define TQI_FRAGMENTS_BYTES 512

TQI_HD constexpr int tqi_round_up(int n, int unit) {
    return (n + unit - 1) / unit * unit;
}

/* Bits per value of a type's block. */
TQI_HD constexpr int tqi_bits_of(int type) {
    return type == TQ_TYPE_PQT2                           ? 2
           : type == TQ_TYPE_PQO3 || type == TQ_TYPE_PQT3 ? 3
           : type == TQ_TYPE_PQO4 || type == TQ_TYPE_PQT4 ? 4
           : type == TQ_TYPE_PQT5                         ? 5
                                                          : 0;
}

/* A block of q8_0: an f16 scale and 32 signed bytes. */
#define TQI_Q8_0_BYTES 34

/* Bytes of 32 values. */
TQI_HD constexpr int tqi_block_bytes_of(int type) {
    return type == TQ_TYPE_F16         ? 2 * TQ_BLOCK
           : type == TQ_CUDA_TYPE_Q8_0 ? TQI_Q8_0_BYTES
                                       : (int) TQI_BLOCK_BYTES(tqi_bits_of(type));
}

/* ---- Tables of levels (slices.cuh) ---- */

struct tqi_table {
    int entries, spacing; /* bytes from one entry to the next */
};

TQI_HD constexpr tqi_table tqi_table_of(int type) {
    return type == TQ_TYPE_PQO3    ? tqi_table{ 64, 256 }
           : type == TQ_TYPE_PQT4  ? tqi_table{ 32, 128 }
           : type == TQ_TYPE_PQT5  ? tqi_table{ 64, 128 }
           : tqi_bits_of(type) > 0 ? tqi_table{ 256, 128 }
                                   : tqi_table{ 0, 0 };
}

TQI_HD constexpr int tqi_table_bytes(int type) {
    return tqi_table_of(type).entries * tqi_table_of(type).spacing;
}

/* ---- A warp by itself (attention_warp.cuh) ---- */

#define TQI_WARP_TILE 16 /* keys that a warp takes at once */

/* Whether there are kernels for K and V of two types (attention_kernels.cuh). */
TQI_HD constexpr bool tqi_has_warp_kernel(int k_type, int v_type) {
    return k_type == v_type || (k_type == TQ_TYPE_PQO4 && v_type == TQ_TYPE_PQO3) ||
           (k_type == TQ_TYPE_PQT5 && v_type == TQ_TYPE_PQT4) || (k_type == TQ_TYPE_PQT4 && v_type == TQ_TYPE_PQT3) ||
           (k_type == TQ_TYPE_PQT3 && v_type == TQ_TYPE_PQT2) || tqi_bits_of(k_type) == 0 || tqi_bits_of(v_type) == 0;
}

/* Warps that share a tile's keys, each with a part of the head: a lane has registers for the results of 8 blocks and
 * eight query vectors. */
TQI_HD constexpr int tqi_team_of(int blocks, int n_tiles) {
    return blocks * n_tiles > 8 ? blocks * n_tiles / 8 : 1;
}

/* Keys from one tile of a warp to its next. */
TQI_HD constexpr int tqi_warp_step(int team) {
    return TQI_WARPS / team * TQI_WARP_TILE;
}

/* Lanes that leave their results at once, to be added up: as many as have four blocks of V. */
TQI_HD constexpr int tqi_result_lanes(int blocks) {
    return blocks > 4 ? 128 / blocks : 32;
}

/* Where they leave them: four floats of each lane, 2 * blocks times. With one more, reading meets no bank twice,
 * either. */
TQI_HD constexpr int tqi_part_stride(int blocks) {
    return tqi_result_lanes(blocks) + 1;
}

/* Copies of 16 bytes that a row takes, where it begins at most 8 bytes behind a multiple of 16, or fits anyway. Rows of
 * whole units lie side by side in a cache, and so begin at a multiple. */
TQI_HD constexpr int tqi_wide_units(int row_bytes) {
    return row_bytes % 16 == 0 ? row_bytes / 16 : (row_bytes + 8 + 15) / 16;
}

/* Bytes from row to row in a stage, for rows of `blocks` blocks: a constant, so that loads need one address, and an odd
 * multiple of four words, so that no bank is met twice for K (check_operand). */
TQI_HD constexpr int tqi_warp_stride(int type, int blocks) {
    return 16 * (tqi_wide_units(tqi_block_bytes_of(type) * blocks) | 1);
}

struct tqi_warp_layout {
    int v_table;
    int q;             /* (n_tiles, blocks of the head, 32 lanes): fragments */
    int scale, slope;  /* (vectors) */
    int bases, totals; /* (vectors, warps) */
    int scores;        /* (2, warps, n_tiles, 32 lanes): four floats, for the others of a team; none without a team */
    int stages;        /* (warps, n_stages): rows of K, rows of V, (vectors, 16) of the mask; at the end results */
    int v_in_stage, mask_in_stage, stage_bytes;
};

/* A warp's part of K and V: `blocks` blocks of 32 values, as has each of its team; 8 n_tiles query vectors. */
TQI_HD constexpr tqi_warp_layout tqi_warp_layout_of(int k_type, int v_type, int blocks, int n_tiles, int team) {
    const int n_vec = 8 * n_tiles;
    tqi_warp_layout l{};
    l.v_table = k_type == v_type ? 0 : tqi_table_bytes(k_type);
    l.q = l.v_table + tqi_table_bytes(v_type);
    l.scale = l.q + n_tiles * blocks * team * TQI_FRAGMENTS_BYTES;
    l.slope = l.scale + 4 * n_vec;
    l.bases = l.slope + 4 * n_vec;
    l.totals = l.bases + 4 * n_vec * TQI_WARPS;
    l.scores = l.totals + 4 * n_vec * TQI_WARPS;
    l.stages = l.scores + (team > 1 ? 2 * TQI_WARPS * n_tiles * TQI_FRAGMENTS_BYTES : 0);
    l.v_in_stage = TQI_WARP_TILE * tqi_warp_stride(k_type, blocks);
    l.mask_in_stage = l.v_in_stage + TQI_WARP_TILE * tqi_warp_stride(v_type, blocks);
    l.stage_bytes = l.mask_in_stage + 2 * n_vec * TQI_WARP_TILE;
    return l;
}

TQI_HD constexpr int tqi_warp_shared_bytes(const tqi_warp_layout & l, int blocks, int team, int n_stages) {
    const int stages = TQI_WARPS * n_stages * l.stage_bytes,
              results = TQI_WARPS / team * 2 * blocks * tqi_part_stride(blocks) * 16;
    return l.stages + (stages > results ? stages : results);
}

/* ---- A block of threads together (attention.cuh) ---- */

struct tqi_block_layout {
    int v_table;
    int q;                               /* (n_tiles, n_blocks of K, 32 lanes): fragments */
    int scores;                          /* (vectors, tqi_scores_stride) floats */
    int weights;                         /* (vectors, tqi_weights_stride) f16 */
    int factors, max, sum, scale, slope; /* (vectors) floats */
    int stages;                          /* rows of K, rows of V; at the end sums */
    int v_in_stage, stage_bytes;
};

/* Scores and weights per query vector: a few more than keys in a tile, so that no bank is met twice. */
TQI_HD constexpr int tqi_scores_stride(int tile) {
    return tile + 4;
}
TQI_HD constexpr int tqi_weights_stride(int tile) {
    return tile + 8;
}

/* Floats per query vector while parts are added: (units, 8 dimensions of a slice, 8 lanes g), and four so that the
 * lanes of a warp, g and t, write to different banks. */
TQI_HD constexpr int tqi_sum_stride(int n_blocks) {
    return (n_blocks + 1) / 2 * 64 + 4;
}

/* ---- Tails (tail.cuh) ---- */

#define TQI_TAIL_ATTENTION_THREADS 128
#define TQI_TAIL_SLOTS 32                     /* rows of a tail per block of threads */
#define TQI_TAIL_ENTRIES (2 * TQI_TAIL_SLOTS) /* a row's owner in K, and its owner in V if that is another token */

enum {
    TQI_TAIL_AT_TOKENS = 0,                                         /* (entries) */
    TQI_TAIL_AT_OWNED = TQI_TAIL_AT_TOKENS + 4 * TQI_TAIL_ENTRIES,  /* (entries): 1 if K has a row of it, 2 if V has */
    TQI_TAIL_AT_UNTIL = TQI_TAIL_AT_OWNED + 4 * TQI_TAIL_ENTRIES,   /* (entries): the first query row that has not */
    TQI_TAIL_AT_WEIGHTS = TQI_TAIL_AT_UNTIL + 4 * TQI_TAIL_ENTRIES, /* (8, entries): scores, then weights */
    TQI_TAIL_AT_Q = TQI_TAIL_AT_WEIGHTS + 8 * 4 * TQI_TAIL_ENTRIES  /* (8, DK) */
};

TQI_HD constexpr int tqi_tail_shared_bytes(int head_dim_k) {
    return TQI_TAIL_AT_Q + 8 * 4 * head_dim_k;
}

#endif
