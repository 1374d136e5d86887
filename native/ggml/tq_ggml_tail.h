/* tq_ggml_tail.h: the precise tail of a KV cache: rows of f16 for the tokens written last, beside their blocks.
 *
 * Types of ours may have one, and stock types of as many values to a block. The rows of ours are transformed as blocks
 * are. The rows of a stock type are what an f16 cache would hold: rotated where llama.cpp rotates the cache. Attention
 * that reads a tail is libtqgguf's on both, which decodes stock blocks tile by tile.
 *
 * A tensor of the cache, K or V of a layer, gets two companions in the same buffer: rows (n_embd_gqa, n_row, n_stream)
 * f16 and owner (n_row, n_stream) i32, as tq_attn_tail in tqgguf.h describes them. The cache's tensor is a leaf, so its
 * sources are free: it points to them with src[0] and src[1], and every view of it knows them through view_src.
 * SET_ROWS takes them as src[3] and src[4], FLASH_ATTN_EXT as src[5] to src[8] (rows and owner of K, then of V).
 *
 * A batch of several tokens of a stream is written before it is read, so it reads a copy of these (tq_tail_batch in
 * tqgguf.h), which two nodes make before SET_ROWS: src[5] and src[6] of that. They are DUP nodes that say by
 * op_params[0] what they are.
 *
 * A copy of a stream copies its rows. A context shift turns those of K: the CPY node that decodes K reads them, the one
 * that writes it back writes them, both with src[3] and src[4] as SET_ROWS has them. Where the cache does not lie in the
 * host's memory, a shifted cell owns nothing until it is written again: disown. So does one that is restored, unless the
 * state holds the tail. In libggml-base. */
#ifndef TQ_GGML_TAIL_H
#define TQ_GGML_TAIL_H

#include "tq_ggml.h"

#include <assert.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Cells at the beginning of a stream that keep a row each: where attention sinks are, as a rule. */
#define TQ_GGML_TAIL_FIRST 4

static_assert(GGML_MAX_SRC >= 9, "FLASH_ATTN_EXT takes the tails of K and V in src[5] to src[8]");

/* cffi: begin */

/* How many recent tokens the KV caches that this thread makes from now on keep in f16, in types of ours and in stock
 * types; 0: none, and no first ones. */
void tq_ggml_tail_set(int32_t n_ours, int32_t n_stock);
/* Whether states that this thread reads and writes from now on hold the tail (tq_ggml_tail_state.h). */
void tq_ggml_tail_in_states(bool held);

/* cffi: end */

/* Whether states that any thread of the process reads and writes hold it; said before there are other threads. */
void tq_ggml_tail_in_all_states(bool held);
bool tq_ggml_tail_states(void);

/* Gives a cache tensor (n_embd_gqa, kv_size, n_stream) its companions in ctx, if this thread wants a tail of its type;
 * t may be NULL. flash: whether attention is FLASH_ATTN_EXT, which alone reads a tail. */
void tq_ggml_tail_new(struct ggml_context * ctx, struct ggml_tensor * t, bool flash);

/* These cells of a stream own no rows any more. t: a cache tensor or NULL; cells: (n_cells). */
void tq_ggml_tail_disown(struct ggml_tensor * t, int64_t stream, const uint32_t * cells, size_t n_cells);
/* The shift has turned the keys in these cells: in another cache they own no rows any more. */
void tq_ggml_tail_turned(struct ggml_tensor * t, int64_t stream, const uint32_t * cells, size_t n_cells);
/* Rows and owners of a stream become those of another one as well. */
void tq_ggml_tail_copy_stream(struct ggml_tensor * t, int64_t from, int64_t to);

/* Makes a CPY node of a context shift's graph, from a view of a cache in the host's memory or into one, take the tail
 * along. Returns node. */
struct ggml_tensor * tq_ggml_tail_turn(struct ggml_tensor * node);

/* Owners of the rows of a stream's tail, (n_row), if owner is not NULL; returns n_row, 0 without a tail. */
int64_t tq_ggml_tail_owners(const struct ggml_tensor * t, int64_t stream, int32_t * owner);
/* Puts back the row of a cell. Nothing happens without a tail. */
void tq_ggml_tail_own(struct ggml_tensor * t, int64_t stream, int64_t cell, const void * row);

static inline struct ggml_tensor * tq_ggml_tail_rows(const struct ggml_tensor * t) {
    return t && t->op == GGML_OP_NONE && ggml_blck_size(t->type) == TQ_GGML_BLOCK ? t->src[0] : NULL;
}

/* Rows of the tail that belong to the first cells of a stream of a cache tensor; the others are for the newest cells.
 * */
static inline int64_t tq_ggml_tail_n_first(const struct ggml_tensor * t) {
    return TQ_GGML_TAIL_FIRST < t->ne[1] ? TQ_GGML_TAIL_FIRST : t->ne[1];
}

/* Bytes of a cache tensor's companions; t may be NULL. */
static inline size_t tq_ggml_tail_bytes(const struct ggml_tensor * t) {
    return tq_ggml_tail_rows(t) ? ggml_nbytes(t->src[0]) + ggml_nbytes(t->src[1]) : 0;
}

/* op_params[0] of the nodes that make a batch's copy; [1]: the batch's first stream.
 *   TAIL_ROWS   (n_embd_gqa, n_row + n_own, n_stream) f16; src: the batch's values, the rows. [2]: the cache's type
 *   TAIL_INDEX  (2 * (n_row + n_own) + n_own, n_stream) i32; src: the owners, where the batch goes. [2]: a stream's cells */
enum { TQ_GGML_TAIL_ROWS = 0x74716701, TQ_GGML_TAIL_INDEX };

static inline bool tq_ggml_copies_tail(const struct ggml_tensor * node) {
    return node->op == GGML_OP_DUP &&
           (node->op_params[0] == TQ_GGML_TAIL_ROWS || node->op_params[0] == TQ_GGML_TAIL_INDEX);
}

/* Sets one source of a node. Upstream must not use it: a release that does is noticed here, and not by wrong numbers.
 * */
static inline void tq_ggml_set_src(struct ggml_tensor * node, int i, struct ggml_tensor * src) {
    GGML_ASSERT(!node->src[i] && "llama.cpp uses a source of this node that tqgguf takes for the tail");
    node->src[i] = src;
}

/* Makes a node that writes into a view of the cache take its tail along. first_stream, n_stream: where a batch goes, as
 * many tokens to each stream. Returns the node. */
struct ggml_tensor * tq_ggml_tail_set_rows(struct ggml_context * ctx, struct ggml_tensor * node, int64_t first_stream,
                                           int64_t n_stream);

/* Makes a node that reads views of the cache take their tails along, as the batch reads them that graph has written
 * there. Returns the node. */
struct ggml_tensor * tq_ggml_tail_flash_attn(struct ggml_cgraph * graph, struct ggml_tensor * node);

#ifdef __cplusplus
}
#endif

#endif /* TQ_GGML_TAIL_H */
