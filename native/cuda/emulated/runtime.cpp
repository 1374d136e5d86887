/* runtime.cpp: the emulated machine of simt.h, and what ../runtime.cu tells of devices and streams. Tests set
 * environment variables: TQ_HOST_NO_DRIVER a driver's refusal in its words, TQ_HOST_NO_CODE a device that nothing was
 * compiled for, TQ_HOST_SM its multiprocessors, TQ_HOST_SHARED_KIB the shared memory of each. */
#include "simt.h"

#include <stdio.h>
#include <stdlib.h>

tqi_host_machine tqi_host;

static jmp_buf scheduler;
static ucontext_t home;
static unsigned char * stacks;
static std::function<void()> running;

void tqi_host_die(const char * what) {
    fprintf(stderr, "emulated kernel: %s (thread %d of block %d, %d, %d)\n", what, tqi_host.thread, tqi_host.x,
            tqi_host.y, tqi_host.z);
    abort();
}

void tqi_host_yield() {
    if (_setjmp(tqi_host.fibres[tqi_host.thread].at) == 0) {
        _longjmp(scheduler, 1);
    }
}

static void begin() {
    running();
    tqi_host.fibres[tqi_host.thread].done = true;
    _longjmp(scheduler, 1);
}

static void resume(int thread) {
    tqi_host_fibre * f = &tqi_host.fibres[thread];
    tqi_host.thread = thread;
    if (_setjmp(scheduler) != 0) {
        return;
    }
    if (f->begun) {
        _longjmp(f->at, 1);
    }
    f->begun = true;
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = stacks + (size_t) thread * TQI_HOST_STACK;
    f->context.uc_stack.ss_size = TQI_HOST_STACK;
    f->context.uc_link = NULL;
    makecontext(&f->context, begin, 0);
    swapcontext(&home, &f->context);
}

/* Runs a warp until each of its lanes is done or waits at the block's or a team's barrier. Returns whether any lane
 * moved. Odd blocks run backwards, in run_block, too: nothing may depend on the order. */
static bool run_warp(int w, int * n_done) {
    bool moved = false;
    for (bool again = true; again;) {
        const unsigned exchanges = tqi_host.warps[w].n_exchanges;
        for (int j = 0; j < TQI_HOST_LANES; ++j) {
            const int i = w * TQI_HOST_LANES + (tqi_host.x & 1 ? TQI_HOST_LANES - 1 - j : j);
            const tqi_host_fibre * f = &tqi_host.fibres[i];
            const bool at_barrier = f->n_barriers > tqi_host.n_barriers;
            const bool at_exchange = f->n_exchanges > tqi_host.warps[w].n_exchanges;
            const bool at_team =
                f->n_team_barriers > tqi_host.teams[tqi_host.team > 1 ? w / tqi_host.team : w].n_barriers;
            if (!f->done && !at_barrier && !at_exchange && !at_team) {
                resume(i);
                moved = true;
                *n_done += f->done;
            }
        }
        again = tqi_host.warps[w].n_exchanges != exchanges;
    }
    return moved;
}

static void run_block(int n_threads) {
    const int n_warps = n_threads / TQI_HOST_LANES;
    tqi_host.n_threads = n_threads;
    tqi_host.team = 0;
    tqi_host.n_arrived = tqi_host.n_barriers = 0;
    tqi_host.any[0] = tqi_host.any[1] = 0;
    for (int i = 0; i < n_threads; ++i) {
        tqi_host_fibre * f = &tqi_host.fibres[i];
        f->begun = f->done = false;
        f->n_barriers = f->n_exchanges = f->n_team_barriers = f->n_groups = 0;
        f->copies.clear();
    }
    for (int w = 0; w < n_warps; ++w) {
        tqi_host.warps[w].n_arrived = tqi_host.warps[w].n_exchanges = 0;
        tqi_host.teams[w].n_arrived = tqi_host.teams[w].n_barriers = 0;
    }
    for (int n_done = 0; n_done < n_threads;) {
        const unsigned barriers = tqi_host.n_barriers;
        bool moved = false;
        for (int w = 0; w < n_warps; ++w) {
            moved = run_warp(tqi_host.x & 1 ? n_warps - 1 - w : w, &n_done) || moved;
        }
        if (!moved && barriers == tqi_host.n_barriers) {
            tqi_host_die("threads wait for each other at different places");
        }
    }
}

void tqi_host_run(tqi_grid grid, int n_threads, size_t shared, std::function<void()> kernel) {
    if (n_threads > TQI_HOST_THREADS || n_threads % TQI_HOST_LANES != 0) {
        tqi_host_die("the block is too large, or no whole number of warps");
    }
    std::vector<unsigned char> all_stacks((size_t) n_threads * TQI_HOST_STACK), memory(shared + 16);
    stacks = all_stacks.data();
    tqi_host.shared = (unsigned char *) (((uintptr_t) memory.data() + 15) / 16 * 16);
    running = kernel;
    for (tqi_host.z = 0; tqi_host.z < (int) grid.z; ++tqi_host.z) {
        for (tqi_host.y = 0; tqi_host.y < (int) grid.y; ++tqi_host.y) {
            for (tqi_host.x = (int) grid.x - 1; tqi_host.x >= 0; --tqi_host.x) {
                memset(tqi_host.shared, 0xff, shared);
                run_block(n_threads);
            }
        }
    }
    running = nullptr;
}

/* ---- Devices and streams ---- */

extern "C" int tq_cuda_emulated(void) {
    return 1;
}

extern "C" int tq_cuda_device_ready(void) {
    return getenv("TQ_HOST_NO_CODE") != NULL ? tqi_cuda_no_code("emulated", 9, 0) : TQ_OK;
}

extern "C" int tq_cuda_device_count(void) {
    const char * refusal = getenv("TQ_HOST_NO_DRIVER");
    return refusal != NULL ? tq_cuda_fail(TQ_E_UNSUPPORTED, "looking for CUDA devices: %s", refusal) : 1;
}

extern "C" int tq_cuda_device_use(int i, tq_cuda_device * device) {
    const int n = tq_cuda_device_count();
    if (n < 0) {
        return n;
    }
    if (i != 0) {
        return tq_cuda_fail(TQ_E_ARGUMENT, "CUDA device %d given; there is 1", i);
    }
    TQI_TRY(tq_cuda_device_ready());
    if (device != NULL) {
        memset(device, 0, sizeof *device);
        snprintf(device->name, sizeof device->name, "emulated");
        device->cc = 90;
        device->n_sm = 2;
        device->shared_per_block = 227 * 1024;
        device->shared_per_sm = 228 * 1024;
    }
    return TQ_OK;
}

extern "C" int tq_cuda_device_swap(int i) {
    return i <= 0 ? 0 : tq_cuda_fail(TQ_E_ARGUMENT, "CUDA device %d given; there is 1", i);
}

extern "C" int tq_cuda_device_of(const void * data) {
    return data != NULL ? 0 : tq_cuda_fail(TQ_E_ARGUMENT, "%p given; it is no device memory", data);
}

int tqi_cuda_limits_of(tqi_cuda_limits * limits) {
    const char * shared = getenv("TQ_HOST_SHARED_KIB");
    const char * n_sm = getenv("TQ_HOST_SM");
    limits->n_sm = n_sm != NULL ? atoi(n_sm) : 2;
    limits->shared_per_block = (size_t) (shared != NULL ? atoi(shared) : 227) * 1024;
    limits->shared_per_sm = limits->shared_per_block + 1024;
    return TQ_OK;
}

extern "C" int tq_cuda_stream_wait(void *, void *) {
    return TQ_OK;
}

extern "C" int tq_cuda_synchronize(void *) {
    return TQ_OK;
}
