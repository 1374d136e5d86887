/* simt_host.h: simt.cuh for a host compiler: runs a kernel's threads as fibres, one block after the other, last first, so that
 * the tests execute the kernels' source on any machine. Every thread runs until it needs what another one has not done yet.
 * Barriers that not all threads reach, and exchanges that not all lanes of a warp reach, end the process with a message: on a GPU
 * they would be undefined. Shared memory is filled with NaN first. Not for use outside tests, and not thread-safe. */
#ifndef TQ_SIMT_HOST_H
#define TQ_SIMT_HOST_H

#include <functional>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>
#include <vector>

#define TQ_HD inline
#define TQ_D inline
#define TQ_UNROLL
#define TQ_UNROLL_BY(n)
#define TQ_NO_UNROLL
#define TQ_SHARED(name) unsigned char * name = tq_host.shared
#define TQ_KERNEL(threads, blocks) static void
#define TQ_PARAMETER const

enum { TQ_HOST_THREADS = 256, TQ_HOST_LANES = 32, TQ_HOST_STACK = 128 * 1024, TQ_HOST_SLOT = 64 };

struct tq_host_copy {
    void * to;
    unsigned char data[16];
    int bytes;
    unsigned group;
};

struct tq_host_fibre {
    ucontext_t context;
    jmp_buf at;
    bool begun, done;
    unsigned n_barriers, n_exchanges; /* that this thread has come to */
    unsigned n_groups;                /* of copies that it has ended */
    std::vector<tq_host_copy> copies; /* begun; they arrive when they are waited for, and not before */
};

/* A barrier or exchange is complete when all its threads have come to it. What is exchanged lies in the slot of its parity:
 * no lane can be two exchanges ahead of another. */
struct tq_host_warp {
    unsigned n_arrived, n_exchanges;
    unsigned char slot[2][TQ_HOST_LANES][TQ_HOST_SLOT];
};

struct tq_host_machine {
    tq_host_fibre fibres[TQ_HOST_THREADS];
    tq_host_warp warps[TQ_HOST_THREADS / TQ_HOST_LANES];
    jmp_buf scheduler;
    ucontext_t home;
    unsigned char *stacks, *shared;
    int thread, n_threads;
    int x, y, z;
    unsigned n_arrived, n_barriers;
    int any[2]; /* of sync_or, by parity */
    std::function<void()> kernel;
};

extern tq_host_machine tq_host; /* runtime.cu */

inline void tq_host_die(const char * what) {
    fprintf(stderr, "emulated kernel: %s (thread %d of block %d, %d, %d)\n", what, tq_host.thread, tq_host.x, tq_host.y,
            tq_host.z);
    abort();
}

inline void tq_host_yield() {
    if (_setjmp(tq_host.fibres[tq_host.thread].at) == 0) {
        _longjmp(tq_host.scheduler, 1);
    }
}

inline void tq_host_begin() {
    tq_host.kernel();
    tq_host.fibres[tq_host.thread].done = true;
    _longjmp(tq_host.scheduler, 1);
}

inline void tq_host_resume(int thread) {
    tq_host_fibre * f = &tq_host.fibres[thread];
    tq_host.thread = thread;
    if (_setjmp(tq_host.scheduler) != 0) {
        return;
    }
    if (f->begun) {
        _longjmp(f->at, 1);
    }
    f->begun = true;
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = tq_host.stacks + (size_t) thread * TQ_HOST_STACK;
    f->context.uc_stack.ss_size = TQ_HOST_STACK;
    f->context.uc_link = NULL;
    makecontext(&f->context, tq_host_begin, 0);
    swapcontext(&tq_host.home, &f->context);
}

inline void tq_host_run_block(int n_threads) {
    tq_host.n_threads = n_threads;
    tq_host.n_arrived = tq_host.n_barriers = 0;
    tq_host.any[0] = tq_host.any[1] = 0;
    for (int i = 0; i < n_threads; ++i) {
        tq_host_fibre * f = &tq_host.fibres[i];
        f->begun = f->done = false;
        f->n_barriers = f->n_exchanges = f->n_groups = 0;
        f->copies.clear();
    }
    for (int w = 0; w < n_threads / TQ_HOST_LANES; ++w) {
        tq_host.warps[w].n_arrived = tq_host.warps[w].n_exchanges = 0;
    }
    for (int n_done = 0; n_done < n_threads;) {
        const unsigned barriers = tq_host.n_barriers;
        bool moved = false;
        for (int v = 0; v < n_threads / TQ_HOST_LANES;
             ++v) { /* odd blocks run backwards: nothing may depend on the order */
            const int w = tq_host.x & 1 ? n_threads / TQ_HOST_LANES - 1 - v : v;
            for (bool again = true;
                 again;) { /* a warp runs until each of its lanes is done or waits at the block's barrier */
                const unsigned exchanges = tq_host.warps[w].n_exchanges;
                again = false;
                for (int j = 0; j < TQ_HOST_LANES; ++j) {
                    const int i = w * TQ_HOST_LANES + (tq_host.x & 1 ? TQ_HOST_LANES - 1 - j : j);
                    tq_host_fibre * f = &tq_host.fibres[i];
                    const bool at_barrier = f->n_barriers > tq_host.n_barriers;
                    const bool at_exchange = f->n_exchanges > tq_host.warps[w].n_exchanges;
                    if (!f->done && !at_barrier && !at_exchange) {
                        tq_host_resume(i);
                        moved = true;
                        n_done += f->done;
                    }
                }
                again = tq_host.warps[w].n_exchanges != exchanges;
            }
        }
        if (!moved && barriers == tq_host.n_barriers) {
            tq_host_die("threads wait for each other at different places");
        }
    }
}

inline void tq_host_run(unsigned nx, unsigned ny, unsigned nz, int n_threads, size_t shared,
                        std::function<void()> kernel) {
    if (n_threads > TQ_HOST_THREADS || n_threads % TQ_HOST_LANES != 0) {
        tq_host_die("the block is too large, or no whole number of warps");
    }
    std::vector<unsigned char> stacks((size_t) n_threads * TQ_HOST_STACK), memory(shared + 16);
    tq_host.stacks = stacks.data();
    tq_host.shared = (unsigned char *) (((uintptr_t) memory.data() + 15) / 16 * 16);
    tq_host.kernel = kernel;
    for (tq_host.z = 0; tq_host.z < (int) nz; ++tq_host.z) {
        for (tq_host.y = 0; tq_host.y < (int) ny; ++tq_host.y) {
            for (tq_host.x = (int) nx - 1; tq_host.x >= 0;
                 --tq_host.x) { /* last first: what only their order would decide shows */
                memset(tq_host.shared, 0xff, shared);
                tq_host_run_block(n_threads);
            }
        }
    }
    tq_host.kernel = nullptr;
}

TQ_D int tq_thread() {
    return tq_host.thread;
}
TQ_D int tq_keep(int x) {
    return x;
}
TQ_D int tq_block_x() {
    return tq_host.x;
}
TQ_D int tq_block_y() {
    return tq_host.y;
}
TQ_D int tq_block_z() {
    return tq_host.z;
}

TQ_D int tq_sync_or(int x) {
    tq_host_fibre * f = &tq_host.fibres[tq_host.thread];
    const unsigned n = f->n_barriers++;
    tq_host.any[n & 1] |= x;
    if (++tq_host.n_arrived == (unsigned) tq_host.n_threads) {
        tq_host.n_arrived = 0;
        ++tq_host.n_barriers;
        tq_host.any[tq_host.n_barriers & 1] = 0;
    }
    while (tq_host.n_barriers == n) {
        tq_host_yield();
    }
    return tq_host.any[n & 1];
}

TQ_D void tq_sync() {
    tq_sync_or(0);
}

/* Puts x down for the other lanes; returns the slots of all of them. */
inline const unsigned char (*tq_host_share(const void * x, size_t size)) [TQ_HOST_SLOT] {
    const int thread = tq_host.thread;
    tq_host_fibre * f = &tq_host.fibres[thread];
    tq_host_warp * w = &tq_host.warps[thread / TQ_HOST_LANES];
    const unsigned n = f->n_exchanges++;
    if (size > TQ_HOST_SLOT) {
        tq_host_die("an exchange of too many bytes");
    }
    memcpy(w->slot[n & 1][thread % TQ_HOST_LANES], x, size);
    if (++w->n_arrived == TQ_HOST_LANES) {
        w->n_arrived = 0;
        ++w->n_exchanges;
    }
    while (w->n_exchanges == n) {
        tq_host_yield();
    }
    return w->slot[n & 1];
}

TQ_D void tq_sync_warp() {
    tq_host_share("", 1);
}

template <typename T> TQ_D T tq_lane(T x, int lane) {
    T y;
    memcpy(&y, tq_host_share(&x, sizeof x)[lane % TQ_HOST_LANES], sizeof y);
    return y;
}

TQ_D uint32_t tq_which_lanes(bool x) {
    const unsigned char (*all)[TQ_HOST_SLOT] = tq_host_share(&x, sizeof x);
    uint32_t lanes = 0;
    for (int i = 0; i < TQ_HOST_LANES; ++i) {
        lanes |= (uint32_t) (all[i][0] != 0) << i;
    }
    return lanes;
}

TQ_D bool tq_any_lane(bool x) {
    return tq_which_lanes(x) != 0;
}

template <typename T> TQ_D T tq_exchange(T x, int mask) {
    return tq_lane(x, (tq_host.thread % TQ_HOST_LANES) ^ mask);
}

/* ---- f16 ---- */

TQ_D float tq_half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t) (h & 0x8000u) << 16, man = h & 0x3ffu, exp = (h >> 10) & 0x1fu;
    uint32_t u = exp == 31 ? 0x7f800000u | man << 13 : (exp + 112) << 23 | man << 13;
    float f;
    if (exp == 0) {
        f = (float) man * 5.9604644775390625e-8f;
        memcpy(&u, &f, sizeof u);
    }
    u |= sign;
    memcpy(&f, &u, sizeof f);
    return f;
}

TQ_D uint16_t tq_host_half(float f) {
    uint32_t u, m;
    memcpy(&u, &f, sizeof u);
    const uint32_t sign = (u >> 16) & 0x8000u, abs = u & 0x7fffffffu;
    if (abs >= 0x47800000u) {
        return (uint16_t) (sign | (abs > 0x7f800000u ? 0x7e00u : 0x7c00u));
    }
    if (abs < 0x38800000u) {
        float magic;
        memcpy(&magic, &abs, sizeof magic);
        magic += 0.5f;
        memcpy(&m, &magic, sizeof m);
        return (uint16_t) (sign | (m - 0x3f000000u));
    }
    return (uint16_t) (sign | ((abs - 0x38000000u + 0xfffu + ((abs >> 13) & 1u)) >> 13));
}

TQ_D uint32_t tq_half2(float low, float high) {
    return tq_host_half(low) | (uint32_t) tq_host_half(high) << 16;
}

TQ_D uint32_t tq_mul_half2(uint32_t a, uint32_t b) { /* products of 11-bit numbers are exact in f32: one rounding */
    return tq_half2(tq_half_to_float((uint16_t) a) * tq_half_to_float((uint16_t) b),
                    tq_half_to_float((uint16_t) (a >> 16)) * tq_half_to_float((uint16_t) (b >> 16)));
}

TQ_D uint32_t tq_select(uint32_t mask, uint32_t a, uint32_t b) {
    return (a & mask) | (b & ~mask);
}
TQ_D uint32_t tq_permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = a | (uint64_t) b << 32;
    uint32_t r = 0;
    for (int i = 0; i < 4; ++i) {
        r |= (uint32_t) (bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
    }
    return r;
}

TQ_D uint32_t tq_funnel(uint32_t low, uint32_t high, int shift) {
    return (uint32_t) (((uint64_t) high << 32 | low) >> (shift & 31));
}

TQ_D uint32_t tq_finite_halves(uint32_t a) {
    a = (a & 0x7c00u) == 0x7c00u ? (a & 0xffff8000u) | 0x7bffu : a;
    return (a & 0x7c000000u) == 0x7c000000u ? (a & 0x8000ffffu) | 0x7bff0000u : a;
}

TQ_D float tq_exp2(float x) {
    return exp2f(x);
}
TQ_D uint32_t tq_multiply_high(uint32_t a, uint32_t b) {
    return (uint32_t) ((uint64_t) a * b >> 32);
}

TQ_D void tq_mma(float * c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    const uint32_t words[6] = { a0, a1, a2, a3, b0, b1 };
    float mine[12];
    for (int i = 0; i < 12; ++i) {
        mine[i] = tq_half_to_float((uint16_t) (words[i / 2] >> (16 * (i & 1))));
    }
    const int lane = tq_host.thread % TQ_HOST_LANES, g = lane / 4, t = lane % 4;
    const unsigned char (*all)[TQ_HOST_SLOT] = tq_host_share(mine, sizeof mine);
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

TQ_D uint32_t tq_transpose(uint32_t x) {
    const unsigned char (*all)[TQ_HOST_SLOT] = tq_host_share(&x, sizeof x);
    const int lane = tq_host.thread % TQ_HOST_LANES, row = lane / 4, column = 2 * (lane % 4);
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
        memcpy(&pair[i], all[4 * (column + i) + row / 2] + 2 * (row % 2), 2);
    }
    return pair[0] | (uint32_t) pair[1] << 16;
}

template <int BYTES, int OFFSET = 0> TQ_D void tq_copy_async(void * start, const void * from) {
    unsigned char * to = (unsigned char *) start + OFFSET;
    tq_host_fibre * f = &tq_host.fibres[tq_host.thread];
    tq_host_copy c;
    if ((uintptr_t) to % BYTES != 0 || (uintptr_t) from % BYTES != 0) {
        tq_host_die("a copy from or to an address that is not aligned");
    }
    c.to = to;
    c.bytes = BYTES;
    c.group = f->n_groups;
    memcpy(c.data, from, BYTES);
    f->copies.push_back(c);
}

TQ_D void tq_copy_commit() {
    ++tq_host.fibres[tq_host.thread].n_groups;
}

template <int N> TQ_D void tq_copy_wait() {
    tq_host_fibre * f = &tq_host.fibres[tq_host.thread];
    size_t kept = 0;
    for (size_t i = 0; i < f->copies.size(); ++i) {
        const tq_host_copy c = f->copies[i];
        if (c.group + N < f->n_groups) {
            memcpy(c.to, c.data, (size_t) c.bytes);
        } else {
            f->copies[kept++] = c;
        }
    }
    f->copies.resize(kept);
}

#endif
