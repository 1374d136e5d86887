/* cache.c: the stand-alone PQO cache: appended tokens, encoded at once, and attention over all of a layer.
 *
 * A layer keeps keys and values as rows of blocks, (capacity, n_head_kv, head_dim / 32 blocks). */
#include "error.h"
#include "kernels.h"

#include <math.h>
#include <stdlib.h>

typedef struct {
    uint8_t * k;
    uint8_t * v;
    int64_t n_tokens;
    int64_t capacity;
} tqi_layer;

struct tq_cache {
    tq_cache_config config;
    const tqi_codec * codec;
    size_t token_bytes; /* of k, and of v, per token */
    int64_t token_dim;  /* n_head_kv * head_dim */
    tqi_layer * layers; /* (n_layer) */
};

int tq_cache_new(const tq_cache_config * config, tq_cache ** cache) {
    if (config == NULL || cache == NULL) {
        return tqi_fail(TQ_E_ARGUMENT, "null pointer given for the configuration or the cache");
    }
    *cache = NULL;
    if (config->bits != 3 && config->bits != 4) {
        return tqi_fail(TQ_E_ARGUMENT, "bits = %d given; allowed are 3 and 4", config->bits);
    }
    if (config->head_dim <= 0 || config->head_dim > TQ_MAX_HEAD_DIM || config->head_dim % TQ_BLOCK != 0) {
        return tqi_fail(TQ_E_ARGUMENT, "head_dim = %d given; it must be a positive multiple of %d, at most %d",
                        config->head_dim, TQ_BLOCK, TQ_MAX_HEAD_DIM);
    }
    if (config->n_head_kv <= 0 || config->n_head_kv > TQ_MAX_HEADS || config->n_layer <= 0) {
        return tqi_fail(TQ_E_ARGUMENT,
                        "n_head_kv = %d, n_layer = %d given; both must be positive, the first at most %d",
                        config->n_head_kv, config->n_layer, TQ_MAX_HEADS);
    }
    const tqi_codec * codec = tqi_codec_get(config->bits == 3 ? TQ_TYPE_PQO3 : TQ_TYPE_PQO4, config->mode);
    if (codec == NULL) {
        return tqi_fail(TQ_E_ARGUMENT, "mode %d given; allowed are search (0), maxnorm (1), l2norm (2)", config->mode);
    }
    tq_cache * new_cache = calloc(1, sizeof *new_cache);
    tqi_layer * layers = calloc((size_t) config->n_layer, sizeof *layers);
    if (new_cache == NULL || layers == NULL) {
        free(new_cache);
        free(layers);
        return tqi_fail(TQ_E_MEMORY, "no memory for a cache of %d layers", config->n_layer);
    }
    new_cache->config = *config;
    new_cache->codec = codec;
    new_cache->token_dim = (int64_t) config->n_head_kv * config->head_dim;
    new_cache->token_bytes = tq_row_bytes(codec->type, new_cache->token_dim);
    new_cache->layers = layers;
    *cache = new_cache;
    return TQ_OK;
}

void tq_cache_free(tq_cache * cache) {
    if (cache != NULL) {
        tq_cache_reset(cache);
        free(cache->layers);
        free(cache);
    }
}

static int check_layer(const tq_cache * cache, int layer) {
    if (cache == NULL) {
        return tqi_fail(TQ_E_ARGUMENT, "null pointer given for the cache");
    }
    if (layer < 0 || layer >= cache->config.n_layer) {
        return tqi_fail(TQ_E_ARGUMENT, "layer %d given; allowed are 0 to %d", layer, cache->config.n_layer - 1);
    }
    return TQ_OK;
}

int64_t tq_cache_capacity(int64_t n_tokens) {
    return n_tokens + n_tokens / 4 + 128;
}

/* Makes room for n_tokens tokens in all. On failure nothing has changed. */
static int reserve(const tq_cache * cache, tqi_layer * layer, int64_t n_tokens) {
    if (n_tokens <= layer->capacity) {
        return TQ_OK;
    }
    const int64_t capacity = tq_cache_capacity(n_tokens);
    const size_t bytes = (size_t) capacity * cache->token_bytes;
    uint8_t * k = malloc(bytes);
    uint8_t * v = malloc(bytes);
    if (k == NULL || v == NULL) {
        free(k);
        free(v);
        return tqi_fail(TQ_E_MEMORY, "no memory for 2 x %zu bytes (%lld tokens); the cache is unchanged", bytes,
                        (long long) capacity);
    }
    if (layer->n_tokens > 0) {
        memcpy(k, layer->k, (size_t) layer->n_tokens * cache->token_bytes);
        memcpy(v, layer->v, (size_t) layer->n_tokens * cache->token_bytes);
    }
    free(layer->k);
    free(layer->v);
    layer->k = k;
    layer->v = v;
    layer->capacity = capacity;
    return TQ_OK;
}

static int append(tq_cache * cache, int index, const float * k, const float * v, int64_t n_tokens) {
    TQI_TRY(check_layer(cache, index));
    tqi_layer * layer = &cache->layers[index];
    const int64_t limit = INT64_MAX / 16 / (int64_t) (cache->token_dim * (int64_t) sizeof(float));
    if (n_tokens < 0 || n_tokens > limit - layer->n_tokens) {
        return tqi_fail(TQ_E_ARGUMENT, "%lld tokens given; allowed are 0 to %lld more", (long long) n_tokens,
                        (long long) (limit - layer->n_tokens));
    }
    if (n_tokens == 0) {
        return TQ_OK;
    }
    if (k == NULL || v == NULL) {
        return tqi_fail(TQ_E_ARGUMENT, "null pointer given for k or v of %lld tokens", (long long) n_tokens);
    }
    TQI_TRY(reserve(cache, layer, layer->n_tokens + n_tokens));
    const tqi_steps * steps = tqi_steps_of(tqi_active(), cache->codec);
    const size_t offset = (size_t) layer->n_tokens * cache->token_bytes;
    const int64_t n_blocks = n_tokens * cache->token_dim / TQ_BLOCK;
    steps->encode(cache->codec, k, n_blocks, layer->k + offset);
    steps->encode(cache->codec, v, n_blocks, layer->v + offset);
    layer->n_tokens += n_tokens;
    return TQ_OK;
}

int tq_cache_prefill(tq_cache * cache, int layer, const float * k, const float * v, int64_t n_tokens, float * k_out,
                     float * v_out) {
    const int64_t before = tq_cache_seq_len(cache, layer);
    if (before < 0) {
        return (int) before;
    }
    if ((k_out == NULL) != (v_out == NULL)) {
        return tqi_fail(TQ_E_ARGUMENT, "one of k_out and v_out given; allowed are both or neither");
    }
    TQI_TRY(append(cache, layer, k, v, n_tokens));
    if (before > 0 && k_out != NULL) {
        return tq_cache_dequantize(cache, layer, k_out, v_out);
    }
    if (n_tokens > 0 && k_out != NULL) {
        const size_t bytes = (size_t) (n_tokens * cache->token_dim) * sizeof(float);
        memmove(k_out, k, bytes);
        memmove(v_out, v, bytes);
    }
    return TQ_OK;
}

static tq_attn_operand operand(const tq_cache * cache, const uint8_t * data) {
    const size_t row = cache->token_bytes / (size_t) cache->config.n_head_kv;
    return (tq_attn_operand) {
        .data = data,
        .type = cache->codec->type,
        .mode = cache->config.mode,
        .head_dim = cache->config.head_dim,
        .n_head = cache->config.n_head_kv,
        .n_stream = 1,
        .stride_token = cache->token_bytes,
        .stride_head = row,
        .stride_stream = 0,
    };
}

/* Checks the values of one call of tq_cache_decode. */
static int check_query(const tq_cache * cache, const float * q, int n_head, float scale) {
    const int64_t dim = cache->config.head_dim;
    if (n_head <= 0 || n_head % cache->config.n_head_kv != 0) {
        return tqi_fail(TQ_E_ARGUMENT, "q has %d heads; it must be a positive multiple of n_head_kv = %d", n_head,
                        cache->config.n_head_kv);
    }
    if (!isfinite(scale)) {
        return tqi_fail(TQ_E_ARGUMENT, "scale = %g given; it must be finite", (double) scale);
    }
    for (int64_t i = 0; i < n_head * dim; ++i) {
        if (!isfinite(q[i])) {
            return tqi_fail(TQ_E_ARGUMENT, "q holds %g at head %lld, value %lld; it must be finite", (double) q[i],
                            (long long) (i / dim), (long long) (i % dim));
        }
    }
    return TQ_OK;
}

/* Attends to all tokens of a layer: q, out: (n_head, head_dim). */
static int attend(const tq_cache * cache, const tqi_layer * layer, const float * q, int n_head, float scale,
                  float * out) {
    const size_t head_bytes = (size_t) cache->config.head_dim * sizeof(float);
    tq_attn args = {
        .k = operand(cache, layer->k),
        .v = operand(cache, layer->v),
        .n_q = 1,
        .n_kv = layer->n_tokens,
        .scale = scale,
        .out = out,
        .out_stride_row = head_bytes * (size_t) n_head,
        .out_stride_head = head_bytes,
    };
    args.q = (tq_attn_operand) {
        .data = q,
        .type = TQ_TYPE_F32,
        .head_dim = cache->config.head_dim,
        .n_head = n_head,
        .n_stream = 1,
        .stride_token = head_bytes * (size_t) n_head,
        .stride_head = head_bytes,
    };
    const size_t work_bytes = tq_attn_work_bytes(&args, 1);
    if (work_bytes == 0) {
        return TQ_E_ARGUMENT;
    }
    void * work = malloc(work_bytes);
    if (work == NULL) {
        return tqi_fail(TQ_E_MEMORY, "no memory for %zu bytes of scratch; the cache is unchanged", work_bytes);
    }
    int status = tq_attn_compute(&args, 0, 0, 1, work);
    if (status == TQ_OK) {
        status = tq_attn_compute(&args, 1, 0, 1, work);
    }
    free(work);
    for (int64_t i = 0; status == TQ_OK && i < (int64_t) n_head * cache->config.head_dim; ++i) {
        if (!isfinite(out[i])) {
            status = tqi_fail(TQ_E_ARGUMENT,
                              "q and scale = %g are so large that their scores overflow; nothing was appended",
                              (double) scale);
        }
    }
    return status;
}

int tq_cache_decode(tq_cache * cache, int layer, const float * k, const float * v, const float * q, int n_head,
                    float scale, float * out) {
    TQI_TRY(check_layer(cache, layer));
    if (k == NULL || v == NULL || q == NULL || out == NULL) {
        return tqi_fail(TQ_E_ARGUMENT, "null pointer given for k, v, q or out");
    }
    TQI_TRY(check_query(cache, q, n_head, scale));
    const int64_t before = cache->layers[layer].n_tokens;
    int status = append(cache, layer, k, v, 1);
    if (status == TQ_OK) {
        status = attend(cache, &cache->layers[layer], q, n_head, scale, out);
    }
    if (status != TQ_OK) {
        cache->layers[layer].n_tokens = before;
    }
    return status;
}

int tq_cache_dequantize(tq_cache * cache, int layer, float * k_out, float * v_out) {
    TQI_TRY(check_layer(cache, layer));
    const tqi_kernels * kernel = tqi_active();
    const tqi_layer * l = &cache->layers[layer];
    const int64_t n_blocks = l->n_tokens * cache->token_dim / TQ_BLOCK;
    if (k_out != NULL) {
        tqi_decode(kernel, cache->codec, l->k, n_blocks, k_out);
    }
    if (v_out != NULL) {
        tqi_decode(kernel, cache->codec, l->v, n_blocks, v_out);
    }
    return TQ_OK;
}

int64_t tq_cache_seq_len(const tq_cache * cache, int layer) {
    const int status = check_layer(cache, layer);
    return status != TQ_OK ? status : cache->layers[layer].n_tokens;
}

int tq_cache_truncate(tq_cache * cache, int layer, int64_t n_tokens) {
    const int64_t n = tq_cache_seq_len(cache, layer);
    if (n < 0) {
        return (int) n;
    }
    if (n_tokens < 0 || n_tokens > n) {
        return tqi_fail(TQ_E_ARGUMENT, "truncation to %lld tokens given; layer %d has %lld", (long long) n_tokens,
                        layer, (long long) n);
    }
    cache->layers[layer].n_tokens = n_tokens;
    return TQ_OK;
}

int tq_cache_reset(tq_cache * cache) {
    if (cache == NULL) {
        return tqi_fail(TQ_E_ARGUMENT, "null pointer given for the cache");
    }
    for (int i = 0; i < cache->config.n_layer; ++i) {
        free(cache->layers[i].k);
        free(cache->layers[i].v);
        cache->layers[i] = (tqi_layer) { 0 };
    }
    return TQ_OK;
}

size_t tq_cache_memory_usage(const tq_cache * cache) {
    size_t bytes = 0;
    for (int i = 0; cache != NULL && i < cache->config.n_layer; ++i) {
        bytes += 2 * (size_t) cache->layers[i].capacity * cache->token_bytes;
    }
    return bytes;
}
