/* error.cpp: the message of the last error, one for each thread, and the library's version. */
#include "internal.h"

#include <stdarg.h>
#include <stdio.h>

static thread_local char message[512];

extern "C" int tq_cuda_fail(int status, const char * format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    return status;
}

int tqi_cuda_no_code(const char * name, int major, int minor) {
    return tq_cuda_fail(TQ_E_UNSUPPORTED,
                        "%s has compute capability %d.%d, for which this build has no code: build with "
                        "CMAKE_CUDA_ARCHITECTURES=%d%d (make cuda CUDA_ARCHITECTURES=...)",
                        name, major, minor, major, minor);
}

extern "C" const char * tq_cuda_last_error(void) {
    return message;
}

extern "C" int tq_cuda_abi_version(void) {
    return 1000 * TQ_ABI_VERSION + TQ_CUDA_ABI_VERSION;
}
