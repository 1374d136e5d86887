/* trellis.c: the encoders of the trellis types, a search of its own in each kernel: the same of them as encode.c has of
 * PQO. */
#include "encoder.h"

int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    static float x[MAX_BLOCKS * TQ_BLOCK];
    bytes in = { data, size };
    if (n_kernels == 0) {
        find_kernels();
    }
    const codec c = codecs[N_PQO + take_below(&in, N_CODECS - N_PQO)];
    const size_t n = take_values(&in, x);
    check_encoder(c.type, c.mode, x, n);
    return 0;
}
