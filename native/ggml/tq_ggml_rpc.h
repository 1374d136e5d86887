/* tq_ggml_rpc.h: connections to workers (llama.cpp's RPC backend): which protocol they must speak, and which were lost.
 *
 * Upstream's client ends the process when a worker goes away. Patched, it notes the loss here, answers itself from then
 * on, with zeros, and its graphs fail. Whoever computes asks for the count of losses before it believes a result: the
 * loss shows only when the results are fetched. A connection that was lost stays lost; a model that is loaded after
 * that gets a new one. In libggml-rpc; any thread. */
#ifndef TQ_GGML_RPC_H
#define TQ_GGML_RPC_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What a worker must know of the graphs that use our types or a tail: the types, the tail's sources of SET_ROWS and
 * FLASH_ATTN_EXT, beside types of ours (1) and stock types (2), pqt2 and pqt5, the mixing of blocks, and a batch's copy of
 * the tail (3). To be raised when that changes. A worker sends it in the fourth byte of its greeting, where upstream's
 * workers send 0. */
#define TQ_GGML_RPC_VERSION 3

/* In the place of answers that a lost worker owes, where zero would be a division by it or an assertion. */
#define TQ_GGML_RPC_NOWHERE 4096
#define TQ_GGML_RPC_ALIGNMENT 128

#if defined(_WIN32)
#    define TQ_GGML_RPC_API __declspec(dllexport)
#else
#    define TQ_GGML_RPC_API __attribute__((visibility("default")))
#endif

/* ---- For the client ---- */

void tq_ggml_rpc_connected(const char * endpoint);
void tq_ggml_rpc_lost(const char * endpoint);
void tq_ggml_rpc_closed(const char * endpoint, bool lost);

/* A peer whose machine went away without a word is noticed within TQ_GGML_RPC_SILENCE seconds, on either side:
 * otherwise the client would wait for hours, and the worker, which serves one client at a time, would be lost to all
 * others. */
#define TQ_GGML_RPC_SILENCE 25
void tq_ggml_rpc_watch(intptr_t socket);

/* ---- For Python ---- */

/* cffi: begin */

/* The protocol this build speaks: upstream's major, minor and patch, and TQ_GGML_RPC_VERSION, one byte each, the first
 * on top. */
TQ_GGML_RPC_API uint32_t tq_ggml_rpc_protocol(void);
/* Connections of this process to an endpoint ("host:port"): lost since its start, and alive now. */
TQ_GGML_RPC_API int32_t tq_ggml_rpc_n_lost(const char * endpoint);
TQ_GGML_RPC_API int32_t tq_ggml_rpc_n_alive(const char * endpoint);

/* cffi: end */

#ifdef __cplusplus
}
#endif

#endif /* TQ_GGML_RPC_H */
