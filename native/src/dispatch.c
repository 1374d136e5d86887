/* dispatch.c: which kernel runs: listed, chosen by CPU features, forced by name. */
#include "error.h"
#include "kernels.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

/* Best first. */
static const tqi_kernels * const kernels[] = {
#if defined(TQI_HAVE_AVX512)
    &tqi_kernels_avx512,
#endif
#if defined(TQI_HAVE_AVX2)
    &tqi_kernels_avx2,
#endif
#if defined(TQI_HAVE_I8MM)
    &tqi_kernels_i8mm,
#endif
#if defined(TQI_HAVE_DOTPROD)
    &tqi_kernels_dotprod,
#endif
#if defined(TQI_HAVE_NEON)
    &tqi_kernels_neon,
#endif
    &tqi_kernels_portable,
};

#define N_KERNELS ((int) (sizeof kernels / sizeof kernels[0]))

static _Atomic(const tqi_kernels *) active;

/* Asked once: in a virtual machine CPUID takes 20 us. */
static int usable(int i) {
    static atomic_int known[N_KERNELS]; /* 0: not yet, 1: no, 2: yes */
    int answer = atomic_load_explicit(&known[i], memory_order_relaxed);
    if (answer == 0) {
        answer = kernels[i]->supported() ? 2 : 1;
        atomic_store_explicit(&known[i], answer, memory_order_relaxed);
    }
    return answer == 2;
}

int tq_kernel_count(void) {
    return N_KERNELS;
}

const char * tq_kernel_name(int i) {
    return i >= 0 && i < N_KERNELS ? kernels[i]->name : NULL;
}

int tq_kernel_supported(int i) {
    if (i < 0 || i >= N_KERNELS) {
        return tqi_fail(TQ_E_ARGUMENT, "kernel number %d given; allowed are 0 to %d", i, N_KERNELS - 1);
    }
    return usable(i);
}

static const tqi_kernels * best(void) {
    for (int i = 0; i < N_KERNELS; ++i) {
        if (usable(i)) {
            return kernels[i];
        }
    }
    return &tqi_kernels_portable;
}

/* Finds the kernel of that name; the message of a failure lists the usable ones. */
static int find(const char * name, const tqi_kernels ** found) {
    char list[128] = "auto";
    size_t length = strlen(list);
    int built = 0;
    for (int i = 0; i < N_KERNELS; ++i) {
        if (usable(i)) {
            if (strcmp(kernels[i]->name, name) == 0) {
                *found = kernels[i];
                return TQ_OK;
            }
            length += (size_t) snprintf(list + length, sizeof list - length, ", %s", kernels[i]->name);
        } else if (strcmp(kernels[i]->name, name) == 0) {
            built = 1;
        }
    }
    return tqi_fail(built ? TQ_E_UNSUPPORTED : TQ_E_ARGUMENT, "kernel '%s' %s; usable here: %s", name,
                    built ? "needs CPU features this machine lacks" : "does not exist in this library", list);
}

int tq_kernel_force(const char * name) {
    const tqi_kernels * kernel = best();
    if (name != NULL && strcmp(name, "auto") != 0) {
        TQI_TRY(find(name, &kernel));
    }
    atomic_store_explicit(&active, kernel, memory_order_release);
    return TQ_OK;
}

const tqi_kernels * tqi_active(void) {
    const tqi_kernels * kernel = atomic_load_explicit(&active, memory_order_acquire);
    if (kernel == NULL) {
        const char * name = getenv("TQGGUF_KERNEL");
        if (tq_kernel_force(name != NULL && name[0] != '\0' ? name : "auto") != TQ_OK) {
            fprintf(stderr, "TQGGUF_KERNEL: %s\n", tq_last_error());
            exit(1);
        }
        kernel = atomic_load_explicit(&active, memory_order_acquire);
    }
    return kernel;
}

const char * tq_kernel_active(void) {
    return tqi_active()->name;
}
