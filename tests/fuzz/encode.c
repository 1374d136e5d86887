/* encode.c: the PQO encoders in all modes and the tail's, on any floats: every kernel writes the same bytes, and they
 * decode to finite values. */
#include "encoder.h"

int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    static float x[MAX_BLOCKS * TQ_BLOCK];
    static uint16_t want[MAX_BLOCKS * TQ_BLOCK], got[MAX_BLOCKS * TQ_BLOCK];
    bytes in = { data, size };
    if (n_kernels == 0) {
        find_kernels();
    }
    const codec c = codecs[take_below(&in, N_PQO)];
    const size_t n = take_values(&in, x);
    check_encoder(c.type, c.mode, x, n);
    for (int k = 0; k < n_kernels; ++k) {
        use_kernel(k);
        REQUIRE(tq_tail_encode(c.type, c.mode, x, (int64_t) n, k == 0 ? want : got) == TQ_OK, "%s", tq_last_error());
        REQUIRE(k == 0 || memcmp(got, want, n * sizeof *want) == 0, "other f16 than portable's");
    }
    for (size_t i = 0; i < n; ++i) {
        REQUIRE((want[i] & 0x7c00) != 0x7c00, "f16 bits %04x in the tail", want[i]);
    }
    return 0;
}
