/* tq_ggml_cache.c: see tq_ggml_cache.h. */
#include "tq_ggml_cache.h"

#include "ggml-backend.h"
#include "tq_ggml_calibration.h"
#include "tq_ggml_policy.h"
#include "tq_ggml_tail.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static _Thread_local bool noting;
static _Thread_local struct tq_ggml_cache_tensor * notes;
static _Thread_local int32_t n_notes;

void tq_ggml_cache_list_end(void) {
    free(notes);
    notes = NULL;
    n_notes = 0;
    noting = false;
}

void tq_ggml_cache_list_begin(void) {
    tq_ggml_cache_list_end();
    noting = true;
}

int32_t tq_ggml_cache_list(struct tq_ggml_cache_tensor * to, int32_t n) {
    const int32_t n_copied = n < n_notes ? n : n_notes;
    if (n_copied > 0) {
        memcpy(to, notes, (size_t) n_copied * sizeof(*to));
    }
    return n_notes;
}

/* Host memory belongs to no device in ggml; llama.cpp calls it CPU. */
static const char * device_of(const struct ggml_tensor * t) {
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(t->buffer));
    return dev ? ggml_backend_dev_name(dev) : "CPU";
}

static int64_t n_values(const struct ggml_tensor * t) {
    return t ? ggml_nelements(t) : 0;
}

void tq_ggml_cache_note(const struct ggml_tensor * t, uint32_t layer, int32_t side, bool rotated) {
    if (!t || !noting) {
        return;
    }
    notes = realloc(notes, (size_t) (n_notes + 1) * sizeof(*notes));
    GGML_ASSERT(notes && "no memory for the list of cache tensors");
    struct tq_ggml_cache_tensor * note = &notes[n_notes++];
    *note = (struct tq_ggml_cache_tensor) {
        .n_embd = t->ne[0],
        .n_cells = t->ne[1],
        .n_stream = t->ne[2],
        .bytes = (int64_t) ggml_nbytes(t),
        .n_mean = n_values(tq_ggml_k_companion(t, TQ_GGML_K_MEAN)),
        .n_gain = n_values(tq_ggml_k_companion(t, TQ_GGML_K_GAIN)),
        .calibration_sum = tq_ggml_calibration_sum(t),
        .layer = (int32_t) layer,
        .side = side,
        .type = (int32_t) t->type,
        .rotated = rotated || tq_ggml_k_companion(t, TQ_GGML_K_ROTATION),
    };
    snprintf(note->name, sizeof(note->name), "%s", ggml_get_name(t));
    snprintf(note->device, sizeof(note->device), "%s", device_of(t));
    if (tq_ggml_tail_rows(t)) {
        note->tail_bytes = (int64_t) tq_ggml_tail_bytes(t);
        note->tail_first = (int32_t) tq_ggml_tail_n_first(t);
        note->tail_recent = (int32_t) (t->src[0]->ne[1] - tq_ggml_tail_n_first(t));
    }
}

#define SIZE_OF(type) { #type, sizeof(struct type) }

size_t tq_ggml_sizeof(const char * name) {
    static const struct {
        const char * name;
        size_t size;
    } sizes[] = {
        SIZE_OF(tq_ggml_cache_tensor), SIZE_OF(tq_ggml_layer_policy),   SIZE_OF(ggml_tensor),
        SIZE_OF(ggml_type_traits),     SIZE_OF(ggml_threadpool_params),
    };
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        if (strcmp(sizes[i].name, name) == 0) {
            return sizes[i].size;
        }
    }
    return 0;
}

bool tq_ggml_is_set(void * flag) {
    return *(const volatile bool *) flag;
}
