/* tq_ggml_types.c: our types in ggml's table of types (libggml-base). ggml passes only whole blocks and valid
 * pointers here, so that an error from libtqgguf is a bug and ends the process with its message. */
#include "tq_ggml.h"

#define TQ_GGML_LIBRARY "libggml-base"
#include "tq_ggml_abi.h"
#include "tqgguf.h"

#include <assert.h>
#include <stdio.h>
#include <string.h>

static_assert((int) GGML_TYPE_F32 == (int) TQ_TYPE_F32 && (int) GGML_TYPE_F16 == (int) TQ_TYPE_F16,
              "type numbers differ");
static_assert(TQ_GGML_BLOCK == TQ_BLOCK, "block length differs");

void tq_ggml_encode(enum ggml_type type, const float * x, void * blocks, int64_t n) {
    if (tq_encode((int) type, TQ_MODE_SEARCH, x, n, blocks) != TQ_OK) {
        GGML_ABORT("%s", tq_last_error());
    }
}

void tq_ggml_decode(enum ggml_type type, const void * blocks, float * x, int64_t n) {
    if (tq_decode((int) type, TQ_MODE_SEARCH, blocks, n, x) != TQ_OK) {
        GGML_ABORT("%s", tq_last_error());
    }
}

#define ROW_FUNCTIONS(name, NAME)                                                                                      \
    static_assert((int) GGML_TYPE_##NAME == (int) TQ_TYPE_##NAME, "type number of " #name " differs");                 \
    void tq_ggml_to_float_##name(const void * blocks, float * x, int64_t n) {                                          \
        tq_ggml_decode(GGML_TYPE_##NAME, blocks, x, n);                                                                \
    }                                                                                                                  \
    void tq_ggml_from_float_##name(const float * x, void * blocks, int64_t n) {                                        \
        tq_ggml_encode(GGML_TYPE_##NAME, x, blocks, n);                                                                \
    }
TQ_GGML_TYPES(ROW_FUNCTIONS)

size_t tq_ggml_quantize(enum ggml_type type, const float * x, void * blocks, int64_t n) {
    tq_ggml_encode(type, x, blocks, n);
    return tq_row_bytes((int) type, n);
}

bool tq_ggml_validate(enum ggml_type type, const void * blocks, size_t n_blocks) {
    const size_t block_bytes = ggml_type_size(type);

    for (size_t i = 0; i < n_blocks; i++) {
        uint16_t scale; /* f16, the first member of every layout */
        memcpy(&scale, (const char *) blocks + i * block_bytes, sizeof(scale));
        if ((scale & 0x7c00) == 0x7c00) {
            fprintf(stderr, "%s: found a scale that is NaN or infinite in block %zu of type %s\n", __func__, i,
                    ggml_type_name(type));
            return false;
        }
    }
    return true;
}
