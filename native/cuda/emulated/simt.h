/* simt.h: what ../simt.cuh has, for the CPU: a kernel's threads run as fibres, one block after the other, last first,
 * so that the tests execute the kernels' source on any machine. Every thread runs until it needs what another one has
 * not done yet. Barriers that not all threads reach, and exchanges that not all lanes of a warp reach, end the process
 * with a message: on a GPU they would be undefined. Shared memory is filled with NaN first. For tests only: it is slow
 * and not thread-safe. */
#ifndef TQI_SIMT
#define TQI_SIMT

#include "../internal.h"

#include <setjmp.h>
#include <ucontext.h>

#include <functional>
#include <vector>

#define TQI_D inline
#define TQI_UNROLL
#define TQI_UNROLL_BY(n)
#define TQI_NO_UNROLL
#define TQI_SHARED(name) unsigned char * name = tqi_host.shared
#define TQI_STATIC_SHARED static /* blocks run one after the other */
#define TQI_KERNEL(threads, blocks) static void
#define TQI_PARAMETER const

enum { TQI_HOST_THREADS = 256, TQI_HOST_LANES = 32, TQI_HOST_STACK = 128 * 1024, TQI_HOST_SLOT = 64 };

struct tqi_host_copy {
    void * to;
    unsigned char data[16];
    int bytes;
    unsigned group;
};

struct tqi_host_fibre {
    ucontext_t context;
    jmp_buf at;
    bool begun, done;
    unsigned n_barriers, n_exchanges;  /* that this thread has come to */
    unsigned n_team_barriers;          /* and those of the warps beside its own */
    unsigned n_groups;                 /* of copies that it has ended */
    std::vector<tqi_host_copy> copies; /* begun; they arrive when they are waited for, and not before */
};

/* A barrier or exchange is complete when all its threads have come to it. What is exchanged lies in the slot of its
 * parity: no lane can be two exchanges ahead of another. */
struct tqi_host_warp {
    unsigned n_arrived, n_exchanges;
    unsigned char slot[2][TQI_HOST_LANES][TQI_HOST_SLOT];
};

/* Warps side by side that have a barrier of their own. */
struct tqi_host_team {
    unsigned n_arrived, n_barriers;
};

struct tqi_host_machine {
    tqi_host_fibre fibres[TQI_HOST_THREADS];
    tqi_host_warp warps[TQI_HOST_THREADS / TQI_HOST_LANES];
    tqi_host_team teams[TQI_HOST_THREADS / TQI_HOST_LANES];
    int team; /* a team's warps */
    unsigned char * shared;
    int thread, n_threads;
    int x, y, z;
    unsigned n_arrived, n_barriers;
    int any[2]; /* of sync_or, by parity */
};

extern tqi_host_machine tqi_host;

/* Ends the process. */
void tqi_host_die(const char * what);
/* Lets the other threads run until this one is resumed. */
void tqi_host_yield();
/* Runs a grid of blocks. */
void tqi_host_run(tqi_grid grid, int n_threads, size_t shared, std::function<void()> kernel);

TQI_D int tqi_thread() {
    return tqi_host.thread;
}
TQI_D int tqi_keep(int x) {
    return x;
}
TQI_D int tqi_block_x() {
    return tqi_host.x;
}
TQI_D int tqi_block_y() {
    return tqi_host.y;
}
TQI_D int tqi_block_z() {
    return tqi_host.z;
}

TQI_D int tqi_sync_or(int x) {
    tqi_host_fibre * f = &tqi_host.fibres[tqi_host.thread];
    const unsigned n = f->n_barriers++;
    tqi_host.any[n & 1] |= x;
    if (++tqi_host.n_arrived == (unsigned) tqi_host.n_threads) {
        tqi_host.n_arrived = 0;
        ++tqi_host.n_barriers;
        tqi_host.any[tqi_host.n_barriers & 1] = 0;
    }
    while (tqi_host.n_barriers == n) {
        tqi_host_yield();
    }
    return tqi_host.any[n & 1];
}

TQI_D void tqi_sync() {
    tqi_sync_or(0);
}

template <int N> TQI_D void tqi_sync_warps() {
    tqi_host_fibre * f = &tqi_host.fibres[tqi_host.thread];
    tqi_host_team * team = &tqi_host.teams[tqi_host.thread / TQI_HOST_LANES / N];
    const unsigned n = f->n_team_barriers++;
    if (tqi_host.team != 0 && tqi_host.team != N) {
        tqi_host_die("barriers of teams of different sizes");
    }
    tqi_host.team = N;
    if (++team->n_arrived == (unsigned) (N * TQI_HOST_LANES)) {
        team->n_arrived = 0;
        ++team->n_barriers;
    }
    while (team->n_barriers == n) {
        tqi_host_yield();
    }
}

/* Puts x down for the other lanes; returns the slots of all of them. */
inline const unsigned char (*tqi_host_share(const void * x, size_t size)) [TQI_HOST_SLOT] {
    const int thread = tqi_host.thread;
    tqi_host_fibre * f = &tqi_host.fibres[thread];
    tqi_host_warp * w = &tqi_host.warps[thread / TQI_HOST_LANES];
    const unsigned n = f->n_exchanges++;
    if (size > TQI_HOST_SLOT) {
        tqi_host_die("an exchange of too many bytes");
    }
    memcpy(w->slot[n & 1][thread % TQI_HOST_LANES], x, size);
    if (++w->n_arrived == TQI_HOST_LANES) {
        w->n_arrived = 0;
        ++w->n_exchanges;
    }
    while (w->n_exchanges == n) {
        tqi_host_yield();
    }
    return w->slot[n & 1];
}

TQI_D void tqi_sync_warp() {
    tqi_host_share("", 1);
}

template <typename T> TQI_D T tqi_lane(T x, int lane) {
    T y;
    memcpy(&y, tqi_host_share(&x, sizeof x)[lane % TQI_HOST_LANES], sizeof y);
    return y;
}

TQI_D uint32_t tqi_which_lanes(bool x) {
    const unsigned char (*all)[TQI_HOST_SLOT] = tqi_host_share(&x, sizeof x);
    uint32_t lanes = 0;
    for (int i = 0; i < TQI_HOST_LANES; ++i) {
        lanes |= (uint32_t) (all[i][0] != 0) << i;
    }
    return lanes;
}

TQI_D bool tqi_any_lane(bool x) {
    return tqi_which_lanes(x) != 0;
}

template <typename T> TQI_D T tqi_exchange(T x, int mask) {
    return tqi_lane(x, (tqi_host.thread % TQI_HOST_LANES) ^ mask);
}

/* ---- Arithmetic ---- */

TQI_D float tqi_half_to_float(uint16_t h) {
    return tqi_f16_to_f32(h);
}

TQI_D uint32_t tqi_half2(float low, float high) {
    return tqi_f32_to_f16(low) | (uint32_t) tqi_f32_to_f16(high) << 16;
}

TQI_D uint32_t tqi_mul_half2(uint32_t a, uint32_t b) { /* products of 11-bit numbers are exact in f32: one rounding */
    return tqi_half2(tqi_half_to_float((uint16_t) a) * tqi_half_to_float((uint16_t) b),
                     tqi_half_to_float((uint16_t) (a >> 16)) * tqi_half_to_float((uint16_t) (b >> 16)));
}

TQI_D uint32_t tqi_add_half2(uint32_t a, uint32_t b) { /* so are sums */
    return tqi_half2(tqi_half_to_float((uint16_t) a) + tqi_half_to_float((uint16_t) b),
                     tqi_half_to_float((uint16_t) (a >> 16)) + tqi_half_to_float((uint16_t) (b >> 16)));
}

TQI_D uint32_t tqi_select(uint32_t mask, uint32_t a, uint32_t b) {
    return (a & mask) | (b & ~mask);
}
TQI_D uint32_t tqi_permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = a | (uint64_t) b << 32;
    uint32_t r = 0;
    for (int i = 0; i < 4; ++i) {
        r |= (uint32_t) (bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
    }
    return r;
}

TQI_D uint32_t tqi_funnel(uint32_t low, uint32_t high, int shift) {
    return (uint32_t) (((uint64_t) high << 32 | low) >> (shift & 31));
}

TQI_D uint32_t tqi_bounded_halves(uint32_t a, uint32_t most) {
    a = (a & 0x7fffu) > (most & 0x7fffu) ? (a & 0xffff8000u) | (most & 0x7fffu) : a;
    return (a & 0x7fff0000u) > (most & 0x7fff0000u) ? (a & 0x8000ffffu) | (most & 0x7fff0000u) : a;
}

TQI_D float tqi_exp2(float x) {
    return exp2f(x);
}
TQI_D uint32_t tqi_multiply_high(uint32_t a, uint32_t b) {
    return (uint32_t) ((uint64_t) a * b >> 32);
}

TQI_D void tqi_mma(float * c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    const uint32_t words[6] = { a0, a1, a2, a3, b0, b1 };
    float mine[12];
    for (int i = 0; i < 12; ++i) {
        mine[i] = tqi_half_to_float((uint16_t) (words[i / 2] >> (16 * (i & 1))));
    }
    const int lane = tqi_host.thread % TQI_HOST_LANES, g = lane / 4, t = lane % 4;
    const unsigned char (*all)[TQI_HOST_SLOT] = tqi_host_share(mine, sizeof mine);
    for (int r = 0; r < 2; ++r) {
        for (int j = 0; j < 2; ++j) {
            float sum = 0.0f;
            for (int k = 0; k < 4; ++k) { /* which lane of the quad has columns 2k, 2k + 1 and 8 more */
                const float * a = (const float *) (const void *) all[4 * g + k];
                const float * b = (const float *) (const void *) all[4 * (2 * t + j) + k];
                for (int i = 0; i < 2; ++i) {
                    sum += a[2 * r + i] * b[8 + i] + a[4 + 2 * r + i] * b[10 + i];
                }
            }
            c[2 * r + j] += sum;
        }
    }
}

TQI_D uint32_t tqi_transpose(uint32_t x) {
    const unsigned char (*all)[TQI_HOST_SLOT] = tqi_host_share(&x, sizeof x);
    const int lane = tqi_host.thread % TQI_HOST_LANES, row = lane / 4, column = 2 * (lane % 4);
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
        memcpy(&pair[i], all[4 * (column + i) + row / 2] + 2 * (row % 2), 2);
    }
    return pair[0] | (uint32_t) pair[1] << 16;
}

template <int BYTES, int OFFSET = 0> TQI_D void tqi_copy_async(void * start, const void * from) {
    unsigned char * to = (unsigned char *) start + OFFSET;
    tqi_host_fibre * f = &tqi_host.fibres[tqi_host.thread];
    tqi_host_copy c;
    if ((uintptr_t) to % BYTES != 0 || (uintptr_t) from % BYTES != 0) {
        tqi_host_die("a copy from or to an address that is not aligned");
    }
    c.to = to;
    c.bytes = BYTES;
    c.group = f->n_groups;
    memcpy(c.data, from, BYTES);
    f->copies.push_back(c);
}

TQI_D void tqi_copy_commit() {
    ++tqi_host.fibres[tqi_host.thread].n_groups;
}

template <int N> TQI_D void tqi_copy_wait() {
    tqi_host_fibre * f = &tqi_host.fibres[tqi_host.thread];
    size_t kept = 0;
    for (size_t i = 0; i < f->copies.size(); ++i) {
        const tqi_host_copy c = f->copies[i];
        if (c.group + N < f->n_groups) {
            memcpy(c.to, c.data, (size_t) c.bytes);
        } else {
            f->copies[kept++] = c;
        }
    }
    f->copies.resize(kept);
}

template <typename P>
int tqi_launch(void (*kernel)(P), const char *, tqi_grid grid, int threads, size_t shared, void *,
               const P & parameter) {
    tqi_host_run(grid, threads, shared, [&] { kernel(parameter); });
    return TQ_OK;
}

#endif
