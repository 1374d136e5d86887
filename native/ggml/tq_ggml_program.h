/* tq_ggml_program.h: the KV cache that the command line of a llama.cpp program chooses: policy, calibration and tail.
 *
 * The options say it once for the process, and the program makes the context of its model between begin and end, on the
 * thread that read the options. Other contexts, such as that of a draft, get the tail alone. In libggml-base. */
#ifndef TQ_GGML_PROGRAM_H
#define TQ_GGML_PROGRAM_H

#include "tq_ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Options ---- */

/* --cache-policy: a file of `tqgguf tune`. Types, means and gains of each layer's cache; they overrule the types that
 * the program was given. NULL: none. */
void tq_ggml_program_policy(const char * path);

/* --cache-calibration: a file of `tqgguf calibrate`, or "off". Means and gains of each layer whose keys are quantized. */
void tq_ggml_program_calibration(const char * path);

/* --cache-tail: newest tokens kept in f16, "N", or "N,M" for types of ours and for stock types. States, such as those of
 * a server's slots, keep them as well. Returns whether that is what value says. */
bool tq_ggml_program_tail(const char * value);

/* ---- The context ---- */

/* Before the context is made: reads the files. n_layer: layers of the model; type_k, type_v: the program's types, which
 * become those that llama.cpp has to check. Returns NULL, or why the files do not suit the model: a sentence, valid
 * until the next call. */
const char * tq_ggml_program_begin(int32_t n_layer, enum ggml_type * type_k, enum ggml_type * type_v);

/* After the context is made, or could not be made. */
void tq_ggml_program_end(void);

/* ---- What was made ---- */

struct tq_ggml_program_cache {
    int64_t bytes;        /* of blocks and tails, all layers and streams */
    int64_t tail_bytes;   /* of them, of the tails */
    int64_t f16_bytes;    /* what an f16 cache of as many tokens would take */
    int64_t n_cells;      /* tokens it has room for: of a stream, times streams, where a layer keeps most */
    int32_t n_tail;       /* newest tokens kept in f16 */
    int32_t n_calibrated; /* layers with a mean or a gain */
    char types_k[64];     /* names, in the order of the layers, with "+" between if there are several */
    char types_v[64];
};

/* The cache made last between begin and end. */
const struct tq_ggml_program_cache * tq_ggml_program_cache(void);

/* The same as an object of JSON; valid until the next call. */
const char * tq_ggml_program_json(void);

#ifdef __cplusplus
}
#endif

#endif /* TQ_GGML_PROGRAM_H */
