/* blocks.c: any bytes are valid blocks. Every kernel decodes them to the same values, all finite and within what their
 * scale allows, a block whose scale is not finite to zeros; a dot product with them is that of the decoded values. */
#include "fuzz.h"

#define MAX_BLOCKS 16

int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    static float want[MAX_BLOCKS * TQ_BLOCK], got[MAX_BLOCKS * TQ_BLOCK], x[MAX_BLOCKS * TQ_BLOCK];
    static double outer[N_CODECS];
    if (n_kernels == 0) {
        find_kernels();
        for (int c = 0; c < N_CODECS; ++c) {
            outer[c] = outermost(codecs[c].type, codecs[c].mode);
        }
        uint32_t state = 1;
        for (int i = 0; i < MAX_BLOCKS * TQ_BLOCK; ++i) {
            x[i] = (float) (int32_t) scramble(&state) / 2147483648.0f;
        }
    }
    if (size < 1) {
        return 0;
    }
    const int c = data[0] % N_CODECS, type = codecs[c].type, mode = codecs[c].mode;
    const size_t block_bytes = tq_row_bytes(type, TQ_BLOCK);
    size_t n_blocks = (size - 1) / block_bytes;
    n_blocks = n_blocks < MAX_BLOCKS ? n_blocks : MAX_BLOCKS;
    /* all arrays end where their memory does: reading or writing on is an error that the sanitizer sees */
    const uint8_t * blocks = data + size - n_blocks * block_bytes;
    const size_t n = n_blocks * TQ_BLOCK, skip = (MAX_BLOCKS - n_blocks) * TQ_BLOCK;
    for (int k = 0; k < n_kernels; ++k) {
        float * y = (k == 0 ? want : got) + skip;
        use_kernel(k);
        memset(y, 0xff, n * sizeof(float));
        REQUIRE(tq_decode(type, mode, blocks, (int64_t) n, y) == TQ_OK, "%s", tq_last_error());
        REQUIRE(k == 0 || memcmp(y, want + skip, n * sizeof(float)) == 0, "another value than portable's");
        double sum = 0.0, bound = 1e-30;
        for (size_t b = 0; b < n_blocks; ++b) {
            double xx = 0.0, yy = 0.0;
            for (size_t i = b * TQ_BLOCK; i < (b + 1) * TQ_BLOCK; ++i) {
                sum += (double) y[i] * (double) x[skip + i];
                xx += (double) x[skip + i] * (double) x[skip + i];
                yy += (double) y[i] * (double) y[i];
            }
            bound += dot_bound(sqrt(xx), sqrt(yy), outer[c] * scale_of(blocks + b * block_bytes));
        }
        const double dot = (double) tq_dot(type, mode, blocks, x + skip, (int64_t) n);
        REQUIRE(fabs(dot - sum) <= bound, "dot %g, of the decoded values %g, allowed %g apart", dot, sum, bound);
    }
    for (size_t b = 0; b < n_blocks; ++b) {
        const double scale = scale_of(blocks + b * block_bytes);
        for (int i = 0; i < TQ_BLOCK; ++i) {
            const double y = (double) want[skip + b * TQ_BLOCK + (size_t) i];
            REQUIRE(fabs(y) <= scale * outer[c] * 5.6569, "%g from a scale of %g", y, scale);
        }
    }
    return 0;
}
