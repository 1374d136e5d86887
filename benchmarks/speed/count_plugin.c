/* count_plugin.c: a plug-in for QEMU's user emulation that counts the instructions a program executes, by function and
 * by name, and prints them when the program ends. The declarations are the part it needs of QEMU's interface for
 * plug-ins, version 1.
 *
 *     cc -O2 -shared -fPIC benchmarks/speed/count_plugin.c -o count_plugin.so
 *     qemu-aarch64 -plugin ./count_plugin.so PROGRAM */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct qemu_plugin_tb;
struct qemu_plugin_insn;
void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, void (*call)(uint64_t id, struct qemu_plugin_tb * tb));
void qemu_plugin_register_atexit_cb(uint64_t id, void (*call)(uint64_t id, void * data), void * data);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb * tb);
struct qemu_plugin_insn * qemu_plugin_tb_get_insn(const struct qemu_plugin_tb * tb, size_t i);
const char * qemu_plugin_insn_symbol(const struct qemu_plugin_insn * insn);
char * qemu_plugin_insn_disas(const struct qemu_plugin_insn * insn);
void qemu_plugin_register_vcpu_insn_exec_inline(struct qemu_plugin_insn * insn, int add_u64, void * to, uint64_t n);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

#define MOST 4096

/* Instructions of a name in a function. */
typedef struct {
    char function[64], name[16];
    uint64_t n;
} counter;

static counter counters[MOST];
static int n_counters;

static counter * find(const char * function, const char * name) {
    for (int i = 0; i < n_counters; ++i) {
        if (strcmp(counters[i].function, function) == 0 && strcmp(counters[i].name, name) == 0) {
            return &counters[i];
        }
    }
    if (n_counters == MOST) {
        fprintf(stderr, "count_plugin: more than %d kinds of instructions\n", MOST);
        exit(1);
    }
    counter * c = &counters[n_counters++];
    snprintf(c->function, sizeof c->function, "%s", function);
    snprintf(c->name, sizeof c->name, "%s", name);
    return c;
}

static void translated(uint64_t id, struct qemu_plugin_tb * tb) {
    (void) id;
    for (size_t i = 0; i < qemu_plugin_tb_n_insns(tb); ++i) {
        struct qemu_plugin_insn * insn = qemu_plugin_tb_get_insn(tb, i);
        const char * symbol = qemu_plugin_insn_symbol(insn);
        char *text = qemu_plugin_insn_disas(insn), name[16] = "";
        sscanf(text, "%15s", name);
        counter * c = find(symbol == NULL || symbol[0] == '\0' ? "-" : symbol, name);
        qemu_plugin_register_vcpu_insn_exec_inline(insn, 0, &c->n, 1);
        free(text);
    }
}

static void ended(uint64_t id, void * data) {
    (void) id, (void) data;
    for (int i = 0; i < n_counters; ++i) {
        fprintf(stderr, "%s %s %llu\n", counters[i].function, counters[i].name, (unsigned long long) counters[i].n);
    }
}

__attribute__((visibility("default"))) int qemu_plugin_install(uint64_t id, const void * info, int argc, char ** argv) {
    (void) info, (void) argc, (void) argv;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, ended, NULL);
    return 0;
}
