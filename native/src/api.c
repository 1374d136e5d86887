/* api.c: version, names and the block functions: argument checks in front of the kernels. */
#include "error.h"
#include "kernels.h"

#include <math.h>

#define CHUNK_BLOCKS 16 /* that tq_dot and tq_tail_encode take at once */

int tq_abi_version(void) {
    return TQ_ABI_VERSION;
}

const char * tq_version(void) {
    return TQI_VERSION;
}

const char * tq_type_name(int type) {
    static const char * const ours[] = { "pqo3", "pqo4", "pqt3", "pqt4", "pqt2", "pqt5" }; /* from TQ_TYPE_PQO3 on */
    if (type >= TQ_TYPE_PQO3 && type <= TQ_TYPE_PQT5) {
        return ours[type - TQ_TYPE_PQO3];
    }
    return type == TQ_TYPE_F32 ? "f32" : type == TQ_TYPE_F16 ? "f16" : NULL;
}

const char * tq_mode_name(int mode) {
    static const char * const names[] = { "search", "maxnorm", "l2norm" };
    return mode >= TQ_MODE_SEARCH && mode <= TQ_MODE_L2NORM ? names[mode] : NULL;
}

size_t tq_row_bytes(int type, int64_t n) {
    if (n < 0 || n > INT64_MAX / 4) {
        return 0;
    }
    if (type == TQ_TYPE_F32 || type == TQ_TYPE_F16) {
        return (size_t) n * (type == TQ_TYPE_F32 ? 4 : 2);
    }
    const tqi_codec * codec = tqi_codec_get(type, TQ_MODE_SEARCH);
    return codec == NULL || n % TQ_BLOCK != 0 ? 0 : (size_t) (n / TQ_BLOCK) * (size_t) codec->block_bytes;
}

#define TYPES_AND_MODES "there are pqo3, pqo4 in modes search, maxnorm, l2norm and pqt2 to pqt5 in mode search"

int tq_codebook(int type, int mode, float * levels, float * boundaries) {
    const tqi_codec * codec = tqi_codec_get(type, mode);
    if (codec == NULL) {
        return tqi_fail(TQ_E_ARGUMENT, "type %d in mode %d has no codebook; " TYPES_AND_MODES, type, mode);
    }
    if (levels != NULL) {
        memcpy(levels, codec->levels, (size_t) codec->n_levels * sizeof(float));
    }
    if (boundaries != NULL) {
        const int n = codec->trellis ? codec->n_levels - 4 : codec->n_levels - 1;
        memcpy(boundaries, codec->boundaries, (size_t) n * sizeof(float));
    }
    return codec->n_levels;
}

void tq_signs(float * signs) {
    memcpy(signs, tqi_signs, sizeof tqi_signs);
}

/* The codec for a block function's arguments, or NULL with a message. */
static const tqi_codec * check_blocks(int type, int mode, const void * a, const void * b, int64_t n) {
    const tqi_codec * codec = tqi_codec_get(type, mode);
    if (codec == NULL) {
        tqi_fail(TQ_E_ARGUMENT, "type %d in mode %d has no encoder; " TYPES_AND_MODES, type, mode);
        return NULL;
    }
    if (n < 0 || n % TQ_BLOCK != 0) {
        tqi_fail(TQ_E_ARGUMENT, "%lld values given; a count must be a multiple of %d and not negative", (long long) n,
                 TQ_BLOCK);
        return NULL;
    }
    if (n > 0 && (a == NULL || b == NULL)) {
        tqi_fail(TQ_E_ARGUMENT, "null pointer given for %lld values", (long long) n);
        return NULL;
    }
    return codec;
}

int tq_encode(int type, int mode, const float * x, int64_t n, void * blocks) {
    const tqi_codec * codec = check_blocks(type, mode, x, blocks, n);
    if (codec == NULL) {
        return TQ_E_ARGUMENT;
    }
    tqi_steps_of(tqi_active(), codec)->encode(codec, x, n / TQ_BLOCK, blocks);
    return TQ_OK;
}

int tq_decode(int type, int mode, const void * blocks, int64_t n, float * x) {
    const tqi_codec * codec = check_blocks(type, mode, blocks, x, n);
    if (codec == NULL) {
        return TQ_E_ARGUMENT;
    }
    tqi_decode(tqi_active(), codec, blocks, n / TQ_BLOCK, x);
    return TQ_OK;
}

int64_t tq_tail_row(int64_t n_recent, int64_t n_first, int64_t token) {
    return token < n_first ? n_recent + token : n_recent > 0 ? token % n_recent : 0;
}

void tq_tail_batch(int64_t n_recent, int64_t n_first, const int32_t * owner, const int64_t * cells, int64_t base,
                   int64_t n_own, int32_t * index) {
    const int64_t n_row = n_recent + n_first, n = n_row + n_own;
    int32_t *until = index + n, *order = until + n;
    memcpy(index, owner, (size_t) n_row * sizeof *owner);
    for (int64_t r = 0; r < n_row; ++r) {
        until[r] = (int32_t) n_own;
    }
    for (int64_t i = n_own - 1; i >= 0; --i) {
        int32_t * taken =
            &until[tq_tail_row(n_recent, n_first, cells[i] - base)]; /* by which token so far, from the end */
        index[n_row + i] = (int32_t) (cells[i] - base + 1);
        until[n_row + i] = *taken;
        *taken = (int32_t) i;
    }
    for (int64_t i = 0; i < n_own; ++i) { /* cells ascend but for a wrap, as a rule */
        int64_t at = i;
        for (; at > 0 && cells[order[at - 1]] > cells[i]; --at) {
            order[at] = order[at - 1];
        }
        order[at] = (int32_t) i;
    }
}

int tq_tail_encode(int type, int mode, const float * x, int64_t n, uint16_t * rows) {
    const tqi_codec * codec = check_blocks(type, mode, x, rows, n);
    if (codec == NULL) {
        return TQ_E_ARGUMENT;
    }
    const tqi_kernels * kernel = tqi_active();
    float y[CHUNK_BLOCKS * TQ_BLOCK];
    for (int64_t i = 0; i < n; i += CHUNK_BLOCKS * TQ_BLOCK) {
        const int64_t m = n - i < CHUNK_BLOCKS * TQ_BLOCK ? n - i : CHUNK_BLOCKS * TQ_BLOCK;
        for (int64_t j = 0; j < m; ++j) {
            y[j] = tqi_sanitize(x[i + j]);
        }
        kernel->transform(codec->signs, y, m / TQ_BLOCK);
        kernel->narrow(y, m, rows + i);
    }
    return TQ_OK;
}

int tq_tail_decode(int type, int mode, const uint16_t * rows, int64_t n, float * x) {
    const tqi_codec * codec = check_blocks(type, mode, rows, x, n);
    if (codec == NULL) {
        return TQ_E_ARGUMENT;
    }
    const tqi_kernels * kernel = tqi_active();
    kernel->widen(rows, n, x);
    tqi_inverse_transform_blocks(kernel, codec, x, n / TQ_BLOCK);
    return TQ_OK;
}

float tq_dot(int type, int mode, const void * blocks, const float * x, int64_t n) {
    const tqi_codec * codec = check_blocks(type, mode, blocks, x, n);
    if (codec == NULL) {
        return NAN;
    }
    const tqi_kernels * kernel = tqi_active();
    const int64_t n_blocks = n / TQ_BLOCK;
    float q[CHUNK_BLOCKS * TQ_BLOCK], query[TQI_QUERY_FLOATS(CHUNK_BLOCKS)], sum = 0.0f;
    for (int64_t b = 0; b < n_blocks; b += CHUNK_BLOCKS) {
        const int n_part = (int) (n_blocks - b < CHUNK_BLOCKS ? n_blocks - b : CHUNK_BLOCKS);
        float s;
        memcpy(q, x + b * TQ_BLOCK, (size_t) n_part * TQ_BLOCK * sizeof(float));
        kernel->transform(codec->signs, q, n_part);
        const tqi_steps * steps = tqi_steps_of(kernel, codec);
        steps->load_query(codec, q, n_part, query);
        steps->scores(codec, (const uint8_t *) blocks + b * codec->block_bytes, 0, 1, query, 1, n_part, &s, 1);
        sum += s;
    }
    return sum;
}
