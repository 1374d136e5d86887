/* tq_ggml_program.c: see tq_ggml_program.h. */
#include "tq_ggml_program.h"

#include "gguf.h"
#include "tq_ggml_cache.h"
#include "tq_ggml_policy.h"
#include "tq_ggml_tail.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define POLICY "tqgguf-policy"
#define CALIBRATION "tqgguf-calibration"
#define VERSION 1
#define LARGEST_MEAN 65504.0f /* as tqgguf/cache/policy.py has it */
#define LARGEST_GAIN 1024.0f
#define LONGEST_TAIL (1 << 20)

static char * policy_path;
static char * calibration_path;

/* A policy or calibration file. */
struct vectors {
    struct gguf_context * meta;
    struct ggml_context * tensors;
};

static struct vectors policy_file;
static struct vectors calibration_file;
static struct tq_ggml_layer_policy * layers;
static char message[512];
static struct tq_ggml_program_cache made;

static void set_path(char ** to, const char * path) {
    free(*to);
    *to = path ? strdup(path) : NULL;
}

void tq_ggml_program_policy(const char * path) {
    set_path(&policy_path, path);
}

void tq_ggml_program_calibration(const char * path) {
    set_path(&calibration_path, strcmp(path, "off") == 0 ? NULL : path);
}

bool tq_ggml_program_tail(const char * value) {
    char * end;
    const long n_ours = strtol(value, &end, 10);
    const long n_stock = *end == ',' ? strtol(end + 1, &end, 10) : n_ours;
    if (end == value || *end != '\0' || n_ours < 0 || n_ours > LONGEST_TAIL || n_stock < 0 || n_stock > LONGEST_TAIL) {
        return false;
    }
    tq_ggml_tail_set((int32_t) n_ours, (int32_t) n_stock);
    tq_ggml_tail_in_all_states(n_ours > 0 || n_stock > 0);
    return true;
}

/* ---- Files ---- */

__attribute__((format(printf, 1, 2))) static const char * refuse(const char * format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof(message), format, args);
    va_end(args);
    for (char * c = message; *c; c++) {
        *c = (unsigned char) *c < ' ' ? '?' : *c; /* names in a file could move the cursor */
    }
    return message;
}

static void close_file(struct vectors * file) {
    gguf_free(file->meta);
    ggml_free(file->tensors);
    *file = (struct vectors) { NULL, NULL };
}

static const char * string_of(const struct gguf_context * meta, const char * key) {
    const int64_t id = gguf_find_key(meta, key);
    return id >= 0 && gguf_get_kv_type(meta, id) == GGUF_TYPE_STRING ? gguf_get_val_str(meta, id) : "";
}

/* Its metadata first: a model of many gigabytes is refused without reading it. */
static const char * open_file(struct vectors * file, const char * path, const char * architecture) {
    struct gguf_context * meta = gguf_init_from_file(path, (struct gguf_init_params) { true, NULL });
    if (!meta) {
        return refuse("%s cannot be read, or is no GGUF file: give a file of tqgguf tune or tqgguf calibrate", path);
    }
    struct stat state;
    bool whole = stat(path, &state) == 0;
    for (int64_t i = 0; i < gguf_get_n_tensors(meta) && whole;
         i++) { /* what a forged file announces is not allocated */
        const size_t begin = gguf_get_data_offset(meta) + gguf_get_tensor_offset(meta, i);
        whole = begin <= (size_t) state.st_size && gguf_get_tensor_size(meta, i) <= (size_t) state.st_size - begin;
    }
    char key[64];
    snprintf(key, sizeof(key), "%s.version", architecture);
    const int64_t id = gguf_find_key(meta, key);
    const bool known = strcmp(string_of(meta, "general.architecture"), architecture) == 0 && id >= 0 &&
                       gguf_get_kv_type(meta, id) == GGUF_TYPE_UINT32 && gguf_get_val_u32(meta, id) == VERSION;
    gguf_free(meta);
    if (!known) {
        return refuse("%s is no %s file of version %d", path, architecture, VERSION);
    }
    if (!whole) {
        return refuse("%s is damaged: it is shorter than its tensors", path);
    }
    file->meta = gguf_init_from_file(path, (struct gguf_init_params) { false, &file->tensors });
    return file->meta ? NULL : refuse("%s is damaged", path);
}

/* The type of layer il of a policy; GGML_TYPE_COUNT: none that a cache may have. */
static enum ggml_type type_of(const struct vectors * file, const char * key, int32_t n_layer, int32_t il) {
    static const enum ggml_type stock[] = { GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16,
                                            GGML_TYPE_Q8_0, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1,
                                            GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_IQ4_NL };
    const int64_t id = gguf_find_key(file->meta, key);
    if (id < 0 || gguf_get_kv_type(file->meta, id) != GGUF_TYPE_ARRAY ||
        gguf_get_arr_type(file->meta, id) != GGUF_TYPE_STRING || gguf_get_arr_n(file->meta, id) != (size_t) n_layer) {
        return GGML_TYPE_COUNT;
    }
    const char * name = gguf_get_arr_str(file->meta, id, (size_t) il);
    for (size_t i = 0; i < sizeof(stock) / sizeof(stock[0]); i++) {
        if (strcmp(name, ggml_type_name(stock[i])) == 0) {
            return stock[i];
        }
    }
    for (int type = 0; type < GGML_TYPE_COUNT; type++) {
        if (tq_ggml_is_pqo((enum ggml_type) type) && strcmp(name, ggml_type_name((enum ggml_type) type)) == 0) {
            return (enum ggml_type) type;
        }
    }
    return GGML_TYPE_COUNT;
}

/* Whether values can be a mean or, if smallest is above 0, a gain. */
static bool within(const float * values, int64_t n, float smallest, float largest) {
    for (int64_t i = 0; i < n; i++) {
        if (!(fabsf(values[i]) <= largest) || (smallest > 0 && !(values[i] >= smallest))) {
            return false;
        }
    }
    return true;
}

/* Means and gains of the layers whose keys are quantized. */
static const char * take_vectors(const struct vectors * file, const char * path, int32_t n_layer) {
    for (struct ggml_tensor * t = ggml_get_first_tensor(file->tensors); t; t = ggml_get_next_tensor(file->tensors, t)) {
        int32_t il = -1;
        char side[8] = "";
        if (t->data == NULL || strcmp(ggml_get_name(t), "GGUF tensor data binary blob") == 0) {
            continue; /* gguf's own, which holds the data of the others */
        }
        const bool named = sscanf(ggml_get_name(t), "blk.%d.k_%4s", &il, side) == 2 && il >= 0 && il < n_layer;
        const bool gain = strcmp(side, "gain") == 0;
        if (!named || !(gain || strcmp(side, "mean") == 0) || t->type != GGML_TYPE_F32 ||
            !within(t->data, ggml_nelements(t), gain ? 1 / LARGEST_GAIN : 0, gain ? LARGEST_GAIN : LARGEST_MEAN)) {
            return refuse("%s is damaged, or is for another model: it holds the tensor %s", path, ggml_get_name(t));
        }
        if (!ggml_is_quantized((enum ggml_type) layers[il].type_k)) {
            continue;
        }
        *(gain ? &layers[il].k_gain : &layers[il].k_mean) = t->data;
        *(gain ? &layers[il].n_gain : &layers[il].n_mean) = ggml_nelements(t);
    }
    return NULL;
}

/* What libllama checks and what an option of its own depends on is the first quantized type, if there is one. */
static enum ggml_type base_type(int32_t n_layer, bool is_k) {
    for (int32_t il = 0; il < n_layer; il++) {
        const enum ggml_type type = (enum ggml_type)(is_k ? layers[il].type_k : layers[il].type_v);
        if (ggml_is_quantized(type)) {
            return type;
        }
    }
    return (enum ggml_type)(is_k ? layers[0].type_k : layers[0].type_v);
}

static const char * read_policy(int32_t n_layer) {
    const char * why = open_file(&policy_file, policy_path, POLICY);
    for (int32_t il = 0; !why && il < n_layer; il++) {
        const enum ggml_type type_k = type_of(&policy_file, POLICY ".types_k", n_layer, il);
        const enum ggml_type type_v = type_of(&policy_file, POLICY ".types_v", n_layer, il);
        if (type_k == GGML_TYPE_COUNT || type_v == GGML_TYPE_COUNT) {
            return refuse("%s has no types for the %d layers of this model: it is damaged, or for another model",
                          policy_path, (int) n_layer);
        }
        layers[il].type_k = (int32_t) type_k;
        layers[il].type_v = (int32_t) type_v;
    }
    return why ? why : take_vectors(&policy_file, policy_path, n_layer);
}

static const char * read_calibration(int32_t n_layer) {
    const char * why = open_file(&calibration_file, calibration_path, CALIBRATION);
    if (why) {
        return why;
    }
    const int64_t id = gguf_find_key(calibration_file.meta, CALIBRATION ".n_layer");
    const bool fits = id >= 0 && gguf_get_kv_type(calibration_file.meta, id) == GGUF_TYPE_UINT32 &&
                      gguf_get_val_u32(calibration_file.meta, id) == (uint32_t) n_layer;
    for (int32_t il = 0; il < n_layer; il++) {
        if (layers[il].k_mean || layers[il].k_gain) {
            return refuse("%s has means or gains of its own: leave --cache-calibration out", policy_path);
        }
    }
    return fits ? take_vectors(&calibration_file, calibration_path, n_layer)
                : refuse("%s was measured on another model: this one has %d layers", calibration_path, (int) n_layer);
}

/* ---- The context ---- */

static void forget_files(void) {
    tq_ggml_policy_set(NULL, 0);
    free(layers);
    layers = NULL;
    close_file(&policy_file);
    close_file(&calibration_file);
}

const char * tq_ggml_program_begin(int32_t n_layer, enum ggml_type * type_k, enum ggml_type * type_v) {
    forget_files();
    tq_ggml_cache_list_begin();
    if ((!policy_path && !calibration_path) || n_layer <= 0) {
        return NULL;
    }
    layers = calloc((size_t) n_layer, sizeof(*layers));
    GGML_ASSERT(layers && "no memory for the cache policy");
    for (int32_t il = 0; il < n_layer; il++) {
        layers[il].type_k = (int32_t) *type_k;
        layers[il].type_v = (int32_t) *type_v;
    }
    const char * why = policy_path ? read_policy(n_layer) : NULL;
    if (!why && calibration_path) {
        why = read_calibration(n_layer);
    }
    if (why) {
        tq_ggml_program_end();
        return why;
    }
    *type_k = base_type(n_layer, true);
    *type_v = base_type(n_layer, false);
    tq_ggml_policy_set(layers, n_layer);
    return NULL;
}

/* Adds a type's name, unless it is among them. names: of size bytes */
static void add_name(char * names, size_t size, const char * name) {
    const size_t n = strlen(name);
    for (const char * at = names; at; at = strchr(at, '+')) {
        at += *at == '+';
        if (strncmp(at, name, n) == 0 && (at[n] == '+' || at[n] == '\0')) {
            return;
        }
    }
    const size_t used = strlen(names);
    snprintf(names + used, size - used, "%s%s", used ? "+" : "", name);
}

void tq_ggml_program_end(void) {
    const int32_t n = tq_ggml_cache_list(NULL, 0);
    struct tq_ggml_cache_tensor * notes = calloc((size_t) n + 1, sizeof(*notes));
    GGML_ASSERT(notes && "no memory for the list of cache tensors");
    tq_ggml_cache_list(notes, n);
    made = (struct tq_ggml_program_cache) { .bytes = 0 };
    int32_t calibrated = -1; /* the layer counted last */
    for (int32_t i = 0; i < n; i++) {
        const struct tq_ggml_cache_tensor * t = &notes[i];
        const int64_t n_cells = t->n_cells * t->n_stream;
        made.bytes += t->bytes + t->tail_bytes;
        made.tail_bytes += t->tail_bytes;
        made.f16_bytes += t->n_embd * n_cells * (int64_t) sizeof(ggml_fp16_t);
        made.n_cells = n_cells > made.n_cells ? n_cells : made.n_cells;
        made.n_tail = t->tail_recent > made.n_tail ? t->tail_recent : made.n_tail;
        if ((t->n_mean || t->n_gain) && t->layer != calibrated) {
            made.n_calibrated++;
            calibrated = t->layer;
        }
        add_name(t->side ? made.types_v : made.types_k, sizeof(made.types_k), ggml_type_name((enum ggml_type) t->type));
    }
    free(notes);
    tq_ggml_cache_list_end();
    forget_files();
}

const struct tq_ggml_program_cache * tq_ggml_program_cache(void) {
    return &made;
}

const char * tq_ggml_program_json(void) {
    static char json[512];
    snprintf(json, sizeof(json),
             "{\"type_k\": \"%s\", \"type_v\": \"%s\", \"bytes\": %lld, \"tail_bytes\": %lld, \"f16_bytes\": %lld, "
             "\"n_tokens\": %lld, \"n_tail\": %d, \"n_calibrated_layers\": %d}",
             made.types_k, made.types_v, (long long) made.bytes, (long long) made.tail_bytes,
             (long long) made.f16_bytes, (long long) made.n_cells, (int) made.n_tail, (int) made.n_calibrated);
    return json;
}
