/* tq_ggml_tail_state.h: the precise tail in states of llama.cpp's KV cache. C++; included by src/llama-kv-cache.cpp.
 *
 * Upstream's states have no place for it. A thread that says so (tq_ggml_tail_in_states) gets it behind the rows of each
 * stream, K and V of each layer in turn:
 *
 *     4       n, rows of the tail that belong to cells of the state
 *     4       bytes of a row
 *     4 n     places of their cells among those of the state, ascending
 *     ...     the rows, f16 */
#ifndef TQ_GGML_TAIL_STATE_H
#define TQ_GGML_TAIL_STATE_H

#include "tq_ggml_tail.h"

#include <algorithm>
#include <utility>
#include <vector>

/* ranges: cells of the state, [first, second) each. */
template <class io_t, class ranges_t>
void tq_ggml_tail_write(io_t & io, struct ggml_tensor * t, uint32_t stream, const ranges_t & ranges) {
    if (!t || !tq_ggml_tail_states()) {
        return;
    }
    std::vector<int32_t> owner((size_t) tq_ggml_tail_owners(t, stream, nullptr));
    tq_ggml_tail_owners(t, stream, owner.data());
    std::vector<std::pair<uint32_t, size_t>> found; /* place, row */
    for (size_t row = 0; row < owner.size(); row++) {
        uint32_t place = 0;
        for (const auto & range : ranges) {
            const int64_t cell = (int64_t) owner[row] - 1;
            if (cell >= range.first && cell < range.second) {
                found.emplace_back(place + (uint32_t) (cell - range.first), row);
            }
            place += range.second - range.first;
        }
    }
    std::sort(found.begin(), found.end());

    const uint32_t n = (uint32_t) found.size();
    const uint32_t n_bytes = (uint32_t) (t->ne[0] * (int64_t) sizeof(ggml_fp16_t));
    io.write(&n, sizeof(n));
    io.write(&n_bytes, sizeof(n_bytes));
    for (const auto & each : found) {
        io.write(&each.first, sizeof(each.first));
    }
    for (const auto & each : found) {
        struct ggml_tensor * rows = tq_ggml_tail_rows(t);
        io.write_tensor(rows, stream * rows->nb[2] + each.second * rows->nb[1], n_bytes);
    }
}

/* cells: where the cells of the state have gone. Of two that share a row here, the later one stays. Returns whether
 * what is read can be true. */
template <class io_t, class cells_t>
bool tq_ggml_tail_read(io_t & io, struct ggml_tensor * t, uint32_t stream, const cells_t & cells) {
    if (!t || !tq_ggml_tail_states()) {
        return true;
    }
    uint32_t n;
    uint32_t n_bytes;
    io.read(&n, sizeof(n));
    io.read(&n_bytes, sizeof(n_bytes));
    if (n > cells.size() || n_bytes != t->ne[0] * (int64_t) sizeof(ggml_fp16_t)) {
        return false;
    }
    std::vector<uint32_t> places(n);
    std::vector<uint8_t> row(n_bytes);
    io.read(places.data(), n * sizeof(uint32_t));
    for (const uint32_t place : places) {
        io.read(row.data(), n_bytes);
        if (place >= cells.size()) {
            return false;
        }
        tq_ggml_tail_own(t, stream, cells[place], row.data());
    }
    return true;
}

#endif /* TQ_GGML_TAIL_STATE_H */
