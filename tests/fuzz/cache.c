/* cache.c: sequences of calls on a tq_cache, good ones and bad ones. Each layer holds what was appended to it, encoded
 * and decoded as tq_encode and tq_decode do it; a call that fails, for want of memory too, changes nothing. */
#include "fuzz.h"

#define MAX_TOKENS 96
#define MAX_LAYERS 3
#define MAX_DIM 256 /* values of a token */

#if defined(__has_feature)
#    if __has_feature(address_sanitizer)
/* more memory than there is makes malloc fail, as it does without the sanitizer */
const char * __asan_default_options(void);
const char * __asan_default_options(void) {
    return "allocator_may_return_null=1";
}
#    endif
#endif

typedef struct {
    float k[MAX_TOKENS * MAX_DIM], v[MAX_TOKENS * MAX_DIM]; /* as they should be decoded */
    int n_tokens;
    size_t capacity;
} model;

static model layers[MAX_LAYERS];

/* n values that the input does not pay for, or its own bytes; returns them encoded and decoded in want. */
static float * make_values(bytes * in, uint32_t * state, int type, int mode, size_t n, float * want) {
    uint8_t * blocks = malloc(tq_row_bytes(type, (int64_t) n) + 1);
    float * x = malloc(n * sizeof(float) + 1);
    const int wild = take_below(in, 3) == 0;
    if (blocks == NULL || x == NULL) {
        exit(2);
    }
    for (size_t i = 0; i < n; ++i) {
        x[i] = wild ? take_float(in) : (float) (int32_t) scramble(state) / 1073741824.0f;
    }
    tq_encode(type, mode, x, (int64_t) n, blocks);
    tq_decode(type, mode, blocks, (int64_t) n, want);
    free(blocks);
    return x;
}

static void check_layers(tq_cache * cache, const tq_cache_config * config) {
    static float k[MAX_TOKENS * MAX_DIM], v[MAX_TOKENS * MAX_DIM];
    const size_t dim = (size_t) (config->n_head_kv * config->head_dim);
    size_t bytes = 0;
    for (int i = 0; i < config->n_layer; ++i) {
        const model * m = &layers[i];
        const size_t n = (size_t) m->n_tokens * dim;
        REQUIRE(tq_cache_seq_len(cache, i) == m->n_tokens, "%d tokens", (int) tq_cache_seq_len(cache, i));
        REQUIRE(tq_cache_dequantize(cache, i, k, v) == TQ_OK, "%s", tq_last_error());
        REQUIRE(memcmp(k, m->k, n * sizeof(float)) == 0 && memcmp(v, m->v, n * sizeof(float)) == 0, "layer %d", i);
        bytes += 2 * m->capacity * tq_row_bytes(config->bits == 3 ? TQ_TYPE_PQO3 : TQ_TYPE_PQO4, (int64_t) dim);
    }
    REQUIRE(tq_cache_memory_usage(cache) == bytes, "%zu bytes, not %zu", tq_cache_memory_usage(cache), bytes);
}

static void grow(model * m, int n) {
    m->n_tokens += n;
    if ((size_t) m->n_tokens > m->capacity) {
        m->capacity = (size_t) (m->n_tokens + m->n_tokens / 4 + 128);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    bytes in = { data, size };
    uint32_t state = 1u + (uint32_t) size;
    tq_cache * cache = NULL;
    if (n_kernels == 0) {
        find_kernels();
    }
    use_kernel(take_below(&in, n_kernels));
    tq_cache_config config = { .bits = 3 + take_below(&in, 2),
                               .head_dim = 32 * (1 + take_below(&in, 4)),
                               .n_head_kv = 1 + take_below(&in, 2),
                               .n_layer = 1 + take_below(&in, MAX_LAYERS),
                               .mode = take_below(&in, 3) };
    if (take_below(&in, 8) == 0) { /* any numbers make a cache or an error */
        const tq_cache_config wild = { .bits = 3 + take_below(&in, 2),
                                       .head_dim = (int) take_u32(&in),
                                       .n_head_kv = (int) take_u32(&in),
                                       .n_layer = (int) (take_u32(&in) & 0x8000ffffu),
                                       .mode = (int8_t) take(&in) };
        const int ok = wild.head_dim > 0 && wild.head_dim <= TQ_MAX_HEAD_DIM && wild.head_dim % 32 == 0 &&
                       wild.n_head_kv > 0 && wild.n_head_kv <= TQ_MAX_HEADS && wild.n_layer > 0 && wild.mode >= 0 &&
                       wild.mode <= 2;
        const int status = tq_cache_new(&wild, &cache);
        REQUIRE((status == TQ_OK) == ok && (cache != NULL) == ok, "status %d, %s", status, tq_last_error());
        tq_cache_free(cache);
    }
    REQUIRE(tq_cache_new(&config, &cache) == TQ_OK, "%s", tq_last_error());
    const int type = config.bits == 3 ? TQ_TYPE_PQO3 : TQ_TYPE_PQO4;
    const size_t dim = (size_t) (config.n_head_kv * config.head_dim);
    for (int i = 0; i < MAX_LAYERS; ++i) {
        layers[i].n_tokens = 0;
        layers[i].capacity = 0;
    }
    while (in.left > 0) {
        const int call = take_below(&in, 8), layer = take_below(&in, config.n_layer);
        model * m = &layers[layer];
        if (call <= 1) { /* prefill, with results or without */
            const int n = take_below(&in, 40) % (MAX_TOKENS - m->n_tokens + 1);
            float * k =
                make_values(&in, &state, type, config.mode, (size_t) n * dim, m->k + (size_t) m->n_tokens * dim);
            float * v =
                make_values(&in, &state, type, config.mode, (size_t) n * dim, m->v + (size_t) m->n_tokens * dim);
            float * out = malloc((size_t) (m->n_tokens + n) * dim * 2 * sizeof(float) + 1);
            const int before = m->n_tokens;
            float * v_out = out + (size_t) (before + n) * dim;
            REQUIRE(tq_cache_prefill(cache, layer, k, v, n, call ? out : NULL, call ? v_out : NULL) == TQ_OK, "%s",
                    tq_last_error());
            grow(m, n);
            if (call) { /* the given ones if the layer was empty, else the whole layer decoded */
                const size_t n_bytes = (size_t) (before + n) * dim * sizeof(float);
                REQUIRE(memcmp(out, before ? m->k : k, n_bytes) == 0, "keys that prefill gives");
                REQUIRE(memcmp(v_out, before ? m->v : v, n_bytes) == 0, "values that prefill gives");
            }
            free(k);
            free(v);
            free(out);
        } else if (call <= 3) { /* decode */
            const int group = 1 + take_below(&in, 9), wild = take_below(&in, 4) == 0;
            const int n_head = group * config.n_head_kv;
            if (m->n_tokens == MAX_TOKENS) {
                continue;
            }
            float * k = make_values(&in, &state, type, config.mode, dim, m->k + (size_t) m->n_tokens * dim);
            float * v = make_values(&in, &state, type, config.mode, dim, m->v + (size_t) m->n_tokens * dim);
            const int n = n_head * config.head_dim;
            float *q = malloc((size_t) n * 2 * sizeof(float)), *out = q + n;
            const float scale = wild ? take_float(&in) : 0.125f;
            int valid = isfinite(scale) != 0;
            for (int i = 0; i < n; ++i) {
                q[i] = wild ? take_float(&in) : (float) (int32_t) scramble(&state) / 1073741824.0f;
                valid &= isfinite(q[i]) != 0;
            }
            const int status = tq_cache_decode(cache, layer, k, v, q, n_head, scale, out);
            REQUIRE(status == TQ_OK || status == TQ_E_ARGUMENT, "status %d", status);
            REQUIRE(status == TQ_OK ? valid : !valid || wild, "status %d for q that is %s: %s", status,
                    valid ? "good" : "bad", tq_last_error());
            if (status == TQ_OK) {
                grow(m, 1);
                for (int h = 0; h < n_head; ++h) { /* no output is beyond the largest value of its head */
                    double most = 0.0;
                    for (int t = 0; t < m->n_tokens; ++t) {
                        for (int i = 0; i < config.head_dim; ++i) {
                            most = fmax(
                                most,
                                fabs((double) m->v[(size_t) t * dim + (size_t) (h / group * config.head_dim + i)]));
                        }
                    }
                    for (int i = 0; i < config.head_dim; ++i) {
                        const double x = (double) out[h * config.head_dim + i];
                        REQUIRE(fabs(x) <= most * 5.7 + 1e-30, "output %g of values up to %g", x, most);
                    }
                }
            } else if ((size_t) m->n_tokens + 1 > m->capacity) {
                /* the storage may have grown before the scores were found to overflow */
                const int grown = tq_cache_memory_usage(cache) > 0;
                size_t others = 0;
                for (int i = 0; i < config.n_layer; ++i) {
                    others += i == layer ? 0 : layers[i].capacity;
                }
                const size_t token = 2 * tq_row_bytes(type, (int64_t) dim);
                m->capacity = grown ? tq_cache_memory_usage(cache) / token - others : m->capacity;
            }
            free(k);
            free(v);
            free(q);
        } else if (call == 4) {
            const int n = (int8_t) take(&in), ok = n >= 0 && n <= m->n_tokens;
            REQUIRE((tq_cache_truncate(cache, layer, n) == TQ_OK) == ok, "to %d of %d", n, m->n_tokens);
            m->n_tokens = ok ? n : m->n_tokens;
        } else if (call == 5) {
            if (take_below(&in, 4) == 0) {
                REQUIRE(tq_cache_reset(cache) == TQ_OK, "%s", tq_last_error());
                for (int i = 0; i < MAX_LAYERS; ++i) {
                    layers[i].n_tokens = 0;
                    layers[i].capacity = 0;
                }
            }
        } else if (call == 6) { /* bad calls */
            float x = 0.0f;
            const int64_t n = (int64_t) ((uint64_t) take_u32(&in) << 32 | take_u32(&in));
            const int bad_layer = take_below(&in, 2) ? -1 - take(&in) : config.n_layer + take(&in);
            /* far beyond any memory, before anything of k or v is read */
            REQUIRE(tq_cache_prefill(cache, layer, &x, &x, n < 0 ? n : n | (int64_t) 1 << 56, NULL, NULL) < 0,
                    "%lld tokens", (long long) n);
            REQUIRE(tq_cache_prefill(cache, layer, NULL, &x, 1, NULL, NULL) == TQ_E_ARGUMENT, "no k");
            REQUIRE(tq_cache_prefill(cache, layer, &x, &x, 1, &x, NULL) == TQ_E_ARGUMENT, "no v_out");
            REQUIRE(tq_cache_prefill(cache, bad_layer, &x, &x, 1, NULL, NULL) == TQ_E_ARGUMENT, "layer %d", bad_layer);
            REQUIRE(tq_cache_truncate(cache, bad_layer, 0) == TQ_E_ARGUMENT, "layer %d", bad_layer);
            REQUIRE(tq_cache_dequantize(cache, bad_layer, &x, &x) == TQ_E_ARGUMENT, "layer %d", bad_layer);
            REQUIRE(tq_cache_seq_len(cache, bad_layer) == TQ_E_ARGUMENT, "layer %d", bad_layer);
            REQUIRE(tq_cache_decode(cache, layer, &x, &x, &x, (int) n | 1 << 31, 1.0f, &x) == TQ_E_ARGUMENT, "heads");
            REQUIRE(tq_cache_decode(cache, layer, &x, &x, NULL, config.n_head_kv, 1.0f, &x) == TQ_E_ARGUMENT, "no q");
        } else {
            check_layers(cache, &config);
        }
    }
    check_layers(cache, &config);
    tq_cache_free(cache);
    return 0;
}
