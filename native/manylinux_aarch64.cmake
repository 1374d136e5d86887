# The toolchain of `make wheel-arm64`: that of `make wheel`, for another processor than that of the machine it runs on.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
include(${CMAKE_CURRENT_LIST_DIR}/manylinux.cmake)
