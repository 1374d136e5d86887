/* tq_ggml_abi.h: is the libtqgguf that a library of ggml meets at load the one it was compiled for? Included once in
 * each library that calls libtqgguf, whose constructor then asks before anything else can: by tq_ggml_types.c in
 * libggml-base and by tq_ggml_cpu.c in libggml-cpu. Python asks earlier (tqgguf/_native/library.py), and raises. */
#ifndef TQ_GGML_ABI_H
#define TQ_GGML_ABI_H

#include "tqgguf.h"

#include <stdio.h>
#include <stdlib.h>

#if defined(__GNUC__)
__attribute__((constructor)) static void tq_ggml_check_abi(void) {
    const int found = tq_abi_version();

    if (found != TQ_ABI_VERSION) {
        fprintf(stderr,
                "tqgguf: " TQ_GGML_LIBRARY
                " was built for ABI version %d of libtqgguf, but loaded one with %d: they come from "
                "different builds; build them together, or reinstall the wheel\n",
                TQ_ABI_VERSION, found);
        _Exit(EXIT_FAILURE);
    }
}
#endif

#endif /* TQ_GGML_ABI_H */
