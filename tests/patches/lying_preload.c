/* lying_preload.c: preloaded, does one of the things that an unpatched or a wrongly patched llama.cpp would do, named by
 * the environment variable TQGGUF_LIE: each function stands in the place of one of native/ggml that libllama calls. */
#define _GNU_SOURCE
#include "tq_ggml_cache.h"
#include "tq_ggml_calibration.h"
#include "tq_ggml_policy.h"
#include "tq_ggml_tail.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

static bool lies(const char * what) {
    const char * lie = getenv("TQGGUF_LIE");
    return lie && strcmp(lie, what) == 0;
}

/* Python loads libggml-base where RTLD_NEXT does not look; TQGGUF_LIE_OF is its path. */
#define ORIGINAL(name) ((__typeof__(&name)) dlsym(dlopen(getenv("TQGGUF_LIE_OF"), RTLD_LAZY | RTLD_NOLOAD), #name))

/* "type": the trellis type of as many bytes in layer 2. "layers": layers 0 and 1 in each other's place. */
enum ggml_type tq_ggml_policy_type_k(enum ggml_type type, uint32_t il) {
    const uint32_t other = lies("layers") && il < 2 ? 1 - il : il;
    type = ORIGINAL(tq_ggml_policy_type_k)(type, other);
    return lies("type") && il == 2 && type == GGML_TYPE_PQO3 ? GGML_TYPE_PQT3 : type;
}

/* "mean": no mean is subtracted. "gain": the keys are multiplied by none. */
void tq_ggml_calibration_new(struct ggml_context * ctx, struct ggml_tensor * k, uint32_t il, int64_t head_dim) {
    ORIGINAL(tq_ggml_calibration_new)(ctx, k, il, head_dim);
    if (lies("mean")) {
        k->src[TQ_GGML_K_MEAN] = NULL;
    }
    if (lies("gain")) {
        k->src[TQ_GGML_K_GAIN] = NULL;
    }
}

/* "values": a mean and a gain of zeros, which the buffer was filled with. */
void tq_ggml_calibration_set(struct ggml_context * ctx) {
    if (!lies("values")) {
        ORIGINAL(tq_ggml_calibration_set)(ctx);
    }
}

/* "tail": there is none. */
void tq_ggml_tail_new(struct ggml_context * ctx, struct ggml_tensor * t, bool flash) {
    if (!lies("tail")) {
        ORIGINAL(tq_ggml_tail_new)(ctx, t, flash);
    }
}

/* "list": nothing is noted. */
void tq_ggml_cache_note(const struct ggml_tensor * t, uint32_t layer, int32_t side, bool rotated) {
    if (!lies("list")) {
        ORIGINAL(tq_ggml_cache_note)(t, layer, side, rotated);
    }
}
