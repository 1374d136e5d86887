"""The libraries of llama.cpp as cffi sees them: libggml-base, libggml, libggml-rpc and libllama.

The headers of native/ggml declare what tqgguf adds to them, `_UPSTREAM` declares what upstream has. `verify` compares
the size of every struct with the library's.
"""

from __future__ import annotations

import functools
import re
from typing import Any, Final

from ..config import CACHE_TYPES
from ..errors import LibraryError
from .library import LIB_DIR, declarations, header_path, library_path, read_header

_HEADERS: Final = {"ggml-base": ("policy", "tail", "cache"), "ggml-rpc": ("rpc",)}
"""Parts of native/ggml, each with a header, by the library that has its functions."""

_STRUCTS: Final = (
    *("tq_ggml_cache_tensor", "tq_ggml_layer_policy"),
    *("ggml_tensor", "ggml_type_traits", "ggml_threadpool_params"),
)

_UPSTREAM: Final = """
struct ggml_tensor {
    int type;
    void * buffer;
    int64_t ne[4]; /* sizes, the fastest dimension first */
    size_t nb[4];  /* strides in bytes */
    int op;
    float op_params[16];
    int32_t flags;
    struct ggml_tensor * src[10];
    struct ggml_tensor * view_src;
    size_t view_offs;
    void * data;
    char name[64];
    void * extra;
    char padding[8];
};
struct ggml_type_traits {
    const char * type_name;
    int64_t blck_size;
    int64_t blck_size_interleave;
    size_t type_size;
    bool is_quantized;
    void (*to_float)(const void * from, float * to, int64_t n);
    void (*from_float_ref)(const float * from, void * to, int64_t n);
};
struct ggml_threadpool_params {
    bool cpumask[512];
    int n_threads;
    int prio;
    uint32_t poll;
    bool strict_cpu;
    bool paused;
};
typedef void (*ggml_log_callback)(int level, const char * text, void * user_data);
typedef void (*ggml_abort_callback_t)(const char * message);

/* libggml-base */
const char * ggml_type_name(int type);
const char * ggml_op_name(int op);
size_t ggml_nbytes(const struct ggml_tensor * tensor);
const struct ggml_type_traits * ggml_get_type_traits(int type);
void ggml_backend_tensor_get(const struct ggml_tensor * tensor, void * data, size_t offset, size_t size);
ggml_abort_callback_t ggml_set_abort_callback(ggml_abort_callback_t callback);
void ggml_log_get(ggml_log_callback * callback, void ** user_data);
void ggml_log_set(ggml_log_callback callback, void * user_data);
void * ggml_backend_reg_get_proc_address(void * reg, const char * name);
size_t ggml_backend_reg_dev_count(void * reg);
void * ggml_backend_reg_dev_get(void * reg, size_t index);
int ggml_backend_dev_type(void * device);
const char * ggml_backend_dev_name(void * device);
const char * ggml_backend_dev_description(void * device);
void ggml_backend_dev_memory(void * device, size_t * free, size_t * total);
void * ggml_backend_dev_init(void * device, const char * params);
void ggml_backend_free(void * backend);

/* libggml */
void * ggml_backend_load(const char * path);
void * ggml_backend_reg_by_name(const char * name);
size_t ggml_backend_dev_count(void);
void * ggml_backend_dev_get(size_t index);

/* libggml-rpc */
void * ggml_backend_rpc_add_server(const char * endpoint);
void ggml_backend_rpc_start_server(const char * endpoint, const char * cache_dir, size_t n_threads, size_t n_devices,
                                   void ** devices);

/* a CPU backend; struct ggml_type_traits_cpu begins with from_float, and no more of it is needed */
struct ggml_type_traits_cpu {
    void (*from_float)(const float * from, void * to, int64_t n);
};
int ggml_backend_score(void);
const struct ggml_type_traits_cpu * ggml_get_type_traits_cpu(int type);
void ggml_cpu_init(void);

/* libllama */
void llama_attach_threadpool(void * context, void * one, void * batch);
void llama_detach_threadpool(void * context);

/* libc */
struct Dl_info {
    const char * dli_fname;
    void * dli_fbase;
    const char * dli_sname;
    void * dli_saddr;
};
int dladdr(const void * address, struct Dl_info * info);
"""


@functools.cache
def _declared(part: str) -> str:
    """The declarations of one of tqgguf's headers."""
    return declarations(read_header(header_path(f"tq_ggml_{part}.h")))


@functools.cache
def ffi() -> Any:
    """The cffi instance that knows the declarations above and those of tqgguf's headers."""
    import cffi  # type: ignore[import-untyped]

    made = cffi.FFI()
    made.cdef(_UPSTREAM)
    for parts in _HEADERS.values():
        made.cdef("".join(map(_declared, parts)))
    return made


@functools.cache
def library_of(name: str) -> Any:
    """One of this package's libraries, such as "ggml" or "llama", or a file given by its path."""
    return ffi().dlopen(name if "/" in name else str(library_path(name)))


def base() -> Any:
    """libggml-base, where almost everything is."""
    return library_of("ggml-base")


def pointer(kind: str, value: int | None) -> Any:
    """A pointer of a C type such as "void *", to an address that ctypes or llama_cpp has."""
    return ffi().cast(kind, value or 0)


def address(value: Any) -> int:
    """The address that a pointer or a function of cffi holds, for ctypes and llama_cpp."""
    return int(ffi().cast("uintptr_t", value))


def verify() -> None:
    """Compares what is declared here with the loaded libggml-base, and with libggml-rpc if this build has it.

    Raises:
        LibraryError: one lacks a cache type or a function of tqgguf, or has a struct of another size.
    """
    lib = base()
    for kind in CACHE_TYPES.values():
        known = lib.ggml_type_name(kind.number)
        if not known or ffi().string(known) != kind.name.encode():
            raise LibraryError(f"the libggml in {LIB_DIR} does not know {kind.name}: it was built without our patches")
    for name, parts in _HEADERS.items():
        for function in re.findall(r"\b(tq_ggml_\w+)\(", "".join(map(_declared, parts))):
            if library_path(name).exists() and not hasattr(library_of(name), function):
                raise LibraryError(
                    f"{library_path(name)} has no {function}: library and package come from different builds; "
                    f"rebuild with `make` or reinstall the wheel"
                )
    for struct in _STRUCTS:
        here, there = ffi().sizeof(f"struct {struct}"), int(lib.tq_ggml_sizeof(struct.encode()))
        if here != there:
            raise LibraryError(
                f"struct {struct} has {there} bytes in {library_path('ggml-base')}, this tqgguf declares {here}: "
                f"library and package come from different builds; rebuild with `make` or reinstall the wheel"
            )
