/* features_arm.h: what an ARM64 processor has beyond the base, as the operating system says. */
#ifndef TQI_FEATURES_ARM_H
#define TQI_FEATURES_ARM_H

#if defined(__linux__)
#    include <sys/auxv.h>

/* The kernel's numbers, which headers of an old C library lack. */
#    define TQI_HWCAP_ASIMDDP (1ul << 20)
#    define TQI_HWCAP2_I8MM (1ul << 13)

static inline int tqi_has_dotprod(void) {
    return (getauxval(AT_HWCAP) & TQI_HWCAP_ASIMDDP) != 0;
}

static inline int tqi_has_i8mm(void) {
    return tqi_has_dotprod() && (getauxval(AT_HWCAP2) & TQI_HWCAP2_I8MM) != 0;
}

#elif defined(__APPLE__)
#    include <sys/sysctl.h>

static inline int tqi_sysctl_says(const char * name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, NULL, 0) == 0 && value != 0;
}

static inline int tqi_has_dotprod(void) {
    return tqi_sysctl_says("hw.optional.arm.FEAT_DotProd");
}

static inline int tqi_has_i8mm(void) {
    return tqi_has_dotprod() && tqi_sysctl_says("hw.optional.arm.FEAT_I8MM");
}

#else

static inline int tqi_has_dotprod(void) {
    return 0;
}

static inline int tqi_has_i8mm(void) {
    return 0;
}

#endif
#endif
