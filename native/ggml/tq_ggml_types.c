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
static_assert((int) GGML_TYPE_PQO3 == (int) TQ_TYPE_PQO3, "type number of pqo3 differs");
static_assert((int) GGML_TYPE_PQO4 == (int) TQ_TYPE_PQO4, "type number of pqo4 differs");
static_assert((int) GGML_TYPE_PQT3 == (int) TQ_TYPE_PQT3, "type number of pqt3 differs");
static_assert((int) GGML_TYPE_PQT4 == (int) TQ_TYPE_PQT4, "type number of pqt4 differs");
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

#define ROW_FUNCTIONS(name, type)                                                                                      \
    void tq_ggml_to_float_##name(const void * blocks, float * x, int64_t n) {                                          \
        tq_ggml_decode(type, blocks, x, n);                                                                            \
    }                                                                                                                  \
    void tq_ggml_from_float_##name(const float * x, void * blocks, int64_t n) {                                        \
        tq_ggml_encode(type, x, blocks, n);                                                                            \
    }

ROW_FUNCTIONS(pqo3, GGML_TYPE_PQO3)
ROW_FUNCTIONS(pqo4, GGML_TYPE_PQO4)
ROW_FUNCTIONS(pqt3, GGML_TYPE_PQT3)
ROW_FUNCTIONS(pqt4, GGML_TYPE_PQT4)

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
