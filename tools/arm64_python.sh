#!/bin/sh
# Debian's Python for ARM64 in build/arm64, run by qemu-user: build/arm64/python is a program like any other. Nothing is
# installed on this machine, and nobody needs to be root. apt checks Debian's signature.
set -eu
cd "$(dirname "$0")/.."
place=$PWD/build/arm64
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
keys=/usr/share/keyrings/debian-archive-keyring.gpg

for program in qemu-aarch64 apt-get dpkg-deb; do
    command -v "$program" >/dev/null || {
        echo "the check of the ARM64 wheel needs $program (Debian: qemu-user, apt, dpkg)"
        exit 1
    }
done

# An apt of its own, which knows no architecture but ARM64 and of no package that it is there.
mkdir -p "$place/apt/lists/partial" "$place/apt/archives/partial"
: >"$place/apt/status"
echo "deb [signed-by=$keys] $mirror bookworm main" >"$place/apt/sources.list"
arm64_apt() {
    apt-get --quiet=2 -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User="$(id -un)" \
        -o Dir::State="$place/apt" -o Dir::State::status="$place/apt/status" -o Dir::Cache="$place/apt" \
        -o Dir::Etc::sourcelist="$place/apt/sources.list" -o Dir::Etc::sourceparts=- "$@"
}
arm64_apt update
arm64_apt install --download-only --no-install-recommends --yes python3-venv libstdc++6 # which NumPy needs

rm -rf "$place/root"
for package in "$place"/apt/archives/*.deb; do
    dpkg-deb --extract "$package" "$place/root"
done
cat >"$place/python" <<END
#!/bin/sh
exec qemu-aarch64 -L "$place/root" "$place/root/usr/bin/python3" "\$@"
END
chmod +x "$place/python"
"$place/python" -c 'import platform, ssl, sqlite3; assert platform.machine() == "aarch64"'
