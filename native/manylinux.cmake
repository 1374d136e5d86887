# The toolchain of `make wheel`: Clang as Zig packages it (pip install ziglang), which links against the symbols of an old
# glibc and brings a C++ library of its own, so that the wheel runs wherever that glibc or a newer one is (docs/wheels.md).
# It compiles for the machine it runs on; manylinux_aarch64.cmake includes it to compile for ARM64 on any.
find_program(TQGGUF_ZIG python-zig HINTS ${CMAKE_CURRENT_LIST_DIR}/../.venv/bin REQUIRED)
set(processor ${CMAKE_HOST_SYSTEM_PROCESSOR})
if(CMAKE_SYSTEM_PROCESSOR)
    set(processor ${CMAKE_SYSTEM_PROCESSOR})
endif()
if(processor STREQUAL "aarch64")
    set(zig ${CMAKE_CURRENT_LIST_DIR}/zig.sh)
else()
    set(zig ${TQGGUF_ZIG})
endif()
set(CMAKE_C_COMPILER ${zig} cc)
set(CMAKE_CXX_COMPILER ${zig} c++)
# -O3 already where CMake first looks at the compiler: without it Zig would compile its C++ library twice.
set(flags "-target ${processor}-linux-gnu.2.28 -O3")
set(CMAKE_C_FLAGS_INIT ${flags})
set(CMAKE_CXX_FLAGS_INIT ${flags})
# By which `tqgguf doctor` and a debugger know a library: Zig writes none unless told to. A library calls its own C++
# library, not that of a program: they are compiled differently, and memory of one is not another's to free.
set(CMAKE_SHARED_LINKER_FLAGS_INIT "-Wl,--build-id=sha1 -Wl,-Bsymbolic")
set(CMAKE_MODULE_LINKER_FLAGS_INIT -Wl,--build-id=sha1)
set(CCACHE OFF CACHE FILEPATH "ccache takes all versions of this compiler for the same; Zig has a cache of its own")
