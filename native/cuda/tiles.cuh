/* tiles.cuh: where a block of threads of attention works, and how its tiles of K and V come into shared memory. */
#ifndef TQ_TILES_CUH
#define TQ_TILES_CUH

#include "attention_plan.h"

/* Where a block of threads works. */
struct tq_task {
    int stream, kv_stream, kv_head, vec0, split;
    int begin, end; /* keys */
};

TQ_D tq_task tq_task_of(const tq_attention & p) {
    tq_task k;
    k.split = tq_divide(tq_block_x(), p.n_head_kv, p.heads_inverse);
    k.kv_head = tq_block_x() - k.split * p.n_head_kv; /* fastest: the heads of a token share sectors */
    k.vec0 = tq_block_y() * 8 * p.n_tiles;
    k.stream = tq_block_z();
    k.kv_stream = p.streams_per_kv == 1 ? k.stream : k.stream / p.streams_per_kv;
    k.begin = k.split * p.split;
    k.end = p.n_kv - k.begin < p.split ? p.n_kv : k.begin + p.split;
    return k;
}

/* How far a head's rows in shared memory lie behind a multiple of 16 bytes. */
TQ_D int tq_lead(const tq_operand & x, const tq_task & k) {
    return x.grain == 16 ? (int) (k.kv_head * x.stride_head) & 15 : 0;
}

/* What a thread copies of a tile of K or V: of every rows_on-th row the same unit, a unit being what is copied at once. Up to
 * 256 % units threads, or 32 % units of a warp that copies by itself, have nothing to do, but to go on takes additions alone. */
struct tq_loader {
    const uint8_t * from; /* in the tile to be loaded next */
    uint32_t to_and_row;  /* bytes into the stage, 20 bits; the first row, beyond all tiles where a thread has none */
};

/* thread: of those that copy together; begin: the first key. */
TQ_D tq_loader tq_loader_of(const tq_operand & x, const tq_task & k, int thread, int begin, int in_stage) {
    const int lead = tq_lead(x, k);
    const int first = (int) tq_multiply_high((uint32_t) thread, x.units_inverse);
    const int unit = thread - first * x.units;
    const int last = x.grain == 16 ? (lead + x.row_bytes - 1) / 16
                                   : x.units - 1; /* unit that this head needs: copied again for others */
    tq_loader l;
    l.from = x.data + k.kv_stream * x.stride_stream + k.kv_head * x.stride_head - lead +
             (begin + first) * x.stride_token + (unit < last ? unit : last) * x.grain;
    l.to_and_row = (uint32_t) (in_stage + first * x.stride_shared + unit * x.grain);
    l.to_and_row |= (uint32_t) (first < x.rows_on ? first : TQ_MAX_TILE) << 20;
    return l;
}

template <int BYTES, int THREADS>
TQ_D void tq_copy_rows(const tq_operand & x, const tq_loader & l, int n, uint8_t * stage) {
    const uint8_t * from = l.from;
    uint8_t * to = stage + (l.to_and_row & 0xfffffu);
    const int thread = tq_thread() % THREADS;
    TQ_NO_UNROLL
    for (int row = (int) (l.to_and_row >> 20); row < n; row += x.rows_on) {
        tq_copy_async<BYTES>(to, from);
        TQ_NO_UNROLL
        for (int i = THREADS; BYTES < 16 && i + thread < x.units; i += THREADS) { /* the longest rows */
            tq_copy_async<BYTES>(to + i * BYTES, from + i * BYTES);
        }
        from += x.step;
        to += x.step_shared;
    }
}

template <int THREADS> TQ_D void tq_copy_operand(const tq_operand & x, const tq_loader & l, int n, uint8_t * stage) {
    if (x.grain == 16) {
        tq_copy_rows<16, THREADS>(x, l, n, stage);
    } else if (x.grain == 8) {
        tq_copy_rows<8, THREADS>(x, l, n, stage);
    } else if (x.grain == 4) {
        tq_copy_rows<4, THREADS>(x, l, n, stage);
    } else {
        tq_copy_rows<2, THREADS>(x, l, n, stage);
    }
}

/* Starts to load the tile at t0, K and V; tiles are loaded one after the other. */
TQ_D void tq_load_tile(const tq_attention & p, const tq_task & k, tq_loader * loaders, int t0, uint8_t * stage) {
    const int n = k.end - t0 < p.tile ? k.end - t0 : p.tile;
    tq_copy_operand<TQ_ATTENTION_THREADS>(p.k, loaders[0], n, stage);
    tq_copy_operand<TQ_ATTENTION_THREADS>(p.v, loaders[1], n, stage);
    loaders[0].from += p.k.step_tile;
    loaders[1].from += p.v.step_tile;
    tq_copy_commit();
}

#endif
