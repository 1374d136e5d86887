/* features_x86.h: what an x86-64 processor has and the operating system saves, asked of the processor itself.
 *
 * __builtin_cpu_supports would ask the compiler's runtime library, and that of Zig, which the wheel is linked with,
 * finds nothing. */
#ifndef TQI_FEATURES_X86_H
#define TQI_FEATURES_X86_H

#include <cpuid.h>

/* Registers that the operating system keeps for each thread (XCR0): those of AVX, and those of AVX-512 besides. */
#define TQI_XCR0_AVX 0x06u
#define TQI_XCR0_AVX512 0xe6u

typedef struct {
    unsigned ecx_1, ebx_7, ecx_7, xcr0;
} tqi_features_x86;

static inline tqi_features_x86 tqi_features_x86_read(void) {
    tqi_features_x86 f = { 0, 0, 0, 0 };
    unsigned eax, ebx, ecx, edx;
    if (__get_cpuid(1, &eax, &ebx, &ecx, &edx)) {
        f.ecx_1 = ecx;
    }
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
        f.ebx_7 = ebx;
        f.ecx_7 = ecx;
    }
    if (f.ecx_1 & bit_OSXSAVE) {
        __asm__ volatile("xgetbv" : "=a"(f.xcr0), "=d"(edx) : "c"(0));
    }
    return f;
}

static inline int tqi_has_all(unsigned bits, unsigned wanted) {
    return (bits & wanted) == wanted;
}

static inline int tqi_has_avx2_fma_f16c(void) {
    const tqi_features_x86 f = tqi_features_x86_read();
    return tqi_has_all(f.xcr0, TQI_XCR0_AVX) && tqi_has_all(f.ecx_1, bit_AVX | bit_FMA | bit_F16C) &&
           tqi_has_all(f.ebx_7, bit_AVX2);
}

/* AVX-512 F, BW, DQ, VL, VBMI and VNNI. */
static inline int tqi_has_avx512(void) {
    const tqi_features_x86 f = tqi_features_x86_read();
    return tqi_has_all(f.xcr0, TQI_XCR0_AVX512) && tqi_has_avx2_fma_f16c() &&
           tqi_has_all(f.ebx_7, bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL) &&
           tqi_has_all(f.ecx_7, bit_AVX512VBMI | bit_AVX512VNNI);
}

#endif
