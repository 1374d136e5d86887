#!/bin/sh
# Zig's compiler, for ARM64: it knows an architecture by the name of a processor and its features (-mcpu=generic+v8_2a),
# and refuses the -march=armv8.2-a+dotprod of GCC and Clang that CMake's files are written in.
set -eu

# mcpu TEXT: armv8.2-a+dotprod+fp16 becomes generic+v8_2a+dotprod+fullfp16.
mcpu() {
    echo "$1" | sed -E 's/^armv([0-9]+)(\.([0-9]+))?-a/generic+v\1_\3a/; s/_a/a/; s/\+fp16/+fullfp16/g'
}

links=yes
for argument in "$@"; do
    case $argument in
    -c | -E | -S) links= ;;
    esac
done
for argument in "$@"; do
    shift
    case $argument in
    -march=armv*)
        # To link, Zig would compile its C++ library once more for each processor.
        [ -z "$links" ] || continue
        argument=-mcpu=$(mcpu "${argument#-march=}")
        ;;
    esac
    set -- "$@" "$argument"
done
exec "$(command -v python-zig || echo "$(dirname "$0")/../.venv/bin/python-zig")" "$@"
