#!/bin/sh
# Runs every fuzz target for FUZZ_SECONDS: those of libtqgguf in C (FUZZ_TARGETS), then the readers of files in Python
# (FUZZ_FILES), then forged sessions. New inputs go to build/fuzz/corpus, findings to build/fuzz/findings.
# FUZZ_TARGETS=blocks FUZZ_FILES= runs one target alone, without forged sessions.
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
seconds=${FUZZ_SECONDS:-60}
targets=${FUZZ_TARGETS-blocks encode trellis attention cache gguf}
files=${FUZZ_FILES-gguf policy session state}

# fuzz NAME COMMAND...: runs a fuzzer and prints how many inputs it executed; its log goes to build/fuzz/NAME.log.
fuzz() {
    name=$1
    shift
    echo "fuzzing $name"
    if ! "$@" "-max_total_time=$seconds" -timeout=10 -rss_limit_mb=3000 -print_final_stats=1 \
        "-artifact_prefix=build/fuzz/findings/$name-" >"build/fuzz/$name.log" 2>&1; then
        tail -n 40 "build/fuzz/$name.log"
        exit 1
    fi
    grep number_of_executed_units "build/fuzz/$name.log"
}

if ! command -v clang >/dev/null; then
    echo "make fuzz needs clang, whose libFuzzer it uses (Debian: clang)"
    exit 1
fi
python patches/tool.py apply >/dev/null
cmake -G Ninja -S tests/fuzz -B build/fuzz -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++ >/dev/null
cmake --build build/fuzz
mkdir -p build/fuzz/findings

for target in $targets; do
    case $target in
    blocks) longest=55 ;;
    cache) longest=400 ;;
    gguf) longest=700 ;;
    *) longest=1200 ;;
    esac
    mkdir -p "build/fuzz/corpus/native-$target"
    set -- "build/fuzz/corpus/native-$target" "tests/fuzz/corpus/$target"
    [ ! -d "tests/fuzz/regressions/$target" ] || set -- "$@" "tests/fuzz/regressions/$target"
    fuzz "$target" "build/fuzz/fuzz_$target" -len_control=0 "-max_len=$longest" "$@"
done

[ -n "$files" ] || exit 0
pip install --quiet --require-hashes -r requirements-fuzz.txt
for target in $files; do
    mkdir -p "build/fuzz/corpus/files-$target"
    fuzz "files-$target" python tests/fuzz/drive.py "$target" "build/fuzz/corpus/files-$target" "tests/fuzz/corpus/$target"
done
mkdir -p build/fuzz/sessions
python tests/fuzz/restore.py build/fuzz/sessions $((20 * seconds)) 2>/dev/null | tail -n 1
