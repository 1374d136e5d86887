#!/bin/sh
# Builds the package and installs it into .venv; on the screen progress, in build/install.log all of it. The links
# tqgguf/lib, include and _bindings let Python that runs in this folder use the same files.
set -eu
cd "$(dirname "$0")/.."
log=build/install.log

mkdir -p build
echo "building tqgguf (the first time this takes minutes; full log in $log)"
{
    .venv/bin/pip install -v --no-build-isolation --no-deps --force-reinstall . 2>&1 && status=0 || status=$?
    echo "$status" >build/status
} | tee "$log" | grep --line-buffered -E '^ *(\[[0-9]+/[0-9]+\]|patches:|FAILED|Successfully)' || true
if [ "$(cat build/status)" != 0 ]; then
    printf '\nThe build failed; the cause, from %s:\n' "$log"
    grep -m3 -E 'patches: error|[Ee]rror[: ]' "$log"
    exit 1
fi
site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
for part in lib include _bindings; do
    rm -rf "tqgguf/$part"
    ln -s "$site/tqgguf/$part" "tqgguf/$part"
done
