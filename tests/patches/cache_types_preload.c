/* cache_types_preload.c: preloaded, makes a program that takes llama.cpp's default context parameters use the cache types that
 * TQGGUF_TEST_K and TQGGUF_TEST_V name by number, with flash attention, and a tail of TQGGUF_TEST_TAIL tokens; and writes the
 * logits it asks for to the file TQGGUF_TEST_LOGITS, f32 row after row. For test-llama-archs, which has no options for that. */
#define _GNU_SOURCE
#include "llama.h"
#include "tq_ggml_tail.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

static int number(const char * name) {
    const char * text = getenv(name);
    if (text == NULL) {
        fprintf(stderr, "cache_types_preload: %s is not set\n", name);
        exit(2);
    }
    return atoi(text);
}

struct llama_context_params llama_context_default_params(void) {
    struct llama_context_params (*original)(void) =
        (struct llama_context_params (*)(void)) dlsym(RTLD_NEXT, "llama_context_default_params");
    struct llama_context_params params = original();
    params.type_k = (enum ggml_type) number("TQGGUF_TEST_K");
    params.type_v = (enum ggml_type) number("TQGGUF_TEST_V");
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    tq_ggml_tail_set(number("TQGGUF_TEST_TAIL"), 0);
    return params;
}

float * llama_get_logits_ith(struct llama_context * ctx, int32_t i) {
    float * (*original)(struct llama_context *, int32_t) =
        (float * (*)(struct llama_context *, int32_t) ) dlsym(RTLD_NEXT, "llama_get_logits_ith");
    float * logits = original(ctx, i);
    const char * path = getenv("TQGGUF_TEST_LOGITS");
    FILE * file = logits && path ? fopen(path, "ab") : NULL;
    if (file) {
        fwrite(logits, sizeof(float), (size_t) llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx))), file);
        fclose(file);
    }
    return logits;
}
