/* tiles.cuh: where a block of threads of attention works, and how its tiles of K and V come into shared memory. */
#ifndef TQI_TILES_CUH
#define TQI_TILES_CUH

#include "attention_plan.h"
#include "simt.cuh"

/* x / n for x >= 0, in some 5 instructions instead of 25: the product falls short by one at most. inverse:
 * tqi_reciprocal_of(n). */
TQI_D int tqi_divide(int x, int n, uint32_t inverse) {
    const uint32_t q = tqi_multiply_high((uint32_t) x, inverse);
    return (int) (q + ((uint32_t) x - q * (uint32_t) n >= (uint32_t) n ? 1u : 0u));
}

/* Where a block of threads works. */
struct tqi_task {
    int stream, kv_stream, kv_head, vec0;
    int part;       /* of the head, where warps share it (attention_warp.cuh); otherwise 0 */
    int split;      /* of the keys, or 32 rows of a tail */
    int begin, end; /* keys */
};

/* n_vec: query vectors of a block. */
TQI_D tqi_task tqi_task_of(const tqi_attention & p, int n_vec) {
    tqi_task task;
    task.split = tqi_divide(tqi_block_x(), p.n_head_kv, p.heads_inverse);
    task.kv_head = tqi_block_x() - task.split * p.n_head_kv; /* fastest: the heads of a token share sectors */
    task.vec0 = tqi_block_y() * n_vec;
    task.stream = tqi_block_z();
    task.part = 0;
    task.kv_stream = p.streams_per_kv == 1 ? task.stream : task.stream / p.streams_per_kv;
    task.begin = task.split * p.split;
    task.end = p.n_kv - task.begin < p.split ? p.n_kv : task.begin + p.split;
    return task;
}

/* How far a head's rows, or their parts, in shared memory lie behind a multiple of 16 bytes. */
TQI_D int tqi_lead(const tqi_operand & x, const tqi_task & task) {
    return x.grain == 16 ? (int) (task.kv_head * x.stride_head + task.part * x.part_bytes) & 15 : 0;
}

/* What a thread copies of a tile of K or V: of every rows_on-th row the same unit, a unit being what is copied at once.
 * Up to 256 % units threads, or 32 % units of a warp that copies by itself, have nothing to do, but to go on takes
 * additions alone. */
struct tqi_loader {
    const uint8_t * from; /* in the tile to be loaded next */
    uint32_t to_and_row;  /* bytes into the stage, 20 bits; the first row, beyond all tiles where a thread has none */
};

/* thread: of those that copy together; begin: the first key. */
TQI_D tqi_loader tqi_loader_of(const tqi_operand & x, const tqi_task & task, int thread, int begin, int in_stage) {
    const int lead = tqi_lead(x, task);
    const int first = (int) tqi_multiply_high((uint32_t) thread, x.units_inverse);
    const int unit = thread - first * x.units;
    /* The last unit that this head needs: it is copied again in place of those beyond it. */
    const int last = x.grain == 16 ? (lead + x.part_bytes - 1) / 16 : x.units - 1;
    tqi_loader l;
    l.from = x.data + task.kv_stream * x.stride_stream + task.kv_head * x.stride_head + task.part * x.part_bytes -
             lead + (begin + first) * x.stride_token + (unit < last ? unit : last) * x.grain;
    l.to_and_row = (uint32_t) (in_stage + first * x.stride_shared + unit * x.grain);
    l.to_and_row |= (uint32_t) (first < x.rows_on ? first : TQI_MAX_TILE) << 20;
    return l;
}

template <int BYTES, int THREADS>
TQI_D void tqi_copy_rows(const tqi_operand & x, const tqi_loader & l, int n, uint8_t * stage) {
    const uint8_t * from = l.from;
    uint8_t * to = stage + (l.to_and_row & 0xfffffu);
    const int thread = tqi_thread() % THREADS;
    TQI_NO_UNROLL
    for (int row = (int) (l.to_and_row >> 20); row < n; row += x.rows_on) {
        tqi_copy_async<BYTES>(to, from);
        TQI_NO_UNROLL
        for (int i = THREADS; BYTES < 16 && i + thread < x.units; i += THREADS) { /* the longest rows */
            tqi_copy_async<BYTES>(to + i * BYTES, from + i * BYTES);
        }
        from += x.step;
        to += x.step_shared;
    }
}

template <int THREADS>
TQI_D void tqi_copy_operand(const tqi_operand & x, const tqi_loader & l, int n, uint8_t * stage) {
    if (x.grain == 16) {
        tqi_copy_rows<16, THREADS>(x, l, n, stage);
    } else if (x.grain == 8) {
        tqi_copy_rows<8, THREADS>(x, l, n, stage);
    } else if (x.grain == 4) {
        tqi_copy_rows<4, THREADS>(x, l, n, stage);
    } else {
        tqi_copy_rows<2, THREADS>(x, l, n, stage);
    }
}

/* Starts to load the tile at t0, K and V; tiles are loaded one after the other. */
TQI_D void tqi_load_tile(const tqi_attention & p, const tqi_task & task, tqi_loader * loaders, int t0,
                         uint8_t * stage) {
    const int n = task.end - t0 < p.tile ? task.end - t0 : p.tile;
    tqi_copy_operand<TQI_ATTENTION_THREADS>(p.k, loaders[0], n, stage);
    tqi_copy_operand<TQI_ATTENTION_THREADS>(p.v, loaders[1], n, stage);
    loaders[0].from += p.k.step_tile;
    loaders[1].from += p.v.step_tile;
    tqi_copy_commit();
}

#endif
