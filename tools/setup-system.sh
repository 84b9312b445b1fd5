#!/usr/bin/env bash
# Usage: tools/setup-system.sh [PACKAGE...]
# Install the Debian packages that tests and benchmarks use, or those named. Does nothing where all of them are installed.
set -euo pipefail

packages=(
    python3-venv                        # "make setup" with Debian's own Python
    debootstrap                         # another release of Debian in a folder, for "make test-trixie"
    qemu-utils qemu-block-extra         # the partner of the interop tests
    qemu-system-x86 qemu-system-common  # block jobs beside our tools, for conformance
    nbdkit libnbd-bin python3-libnbd    # NBD peers
    fio                                 # load
    e2fsprogs btrfs-progs xfsprogs      # file systems to work on, reflinks
    zsh fish groff                      # readers of completion scripts and man pages
    cryptsetup-bin                      # LUKS headers that another program reads and makes
    dpkg-dev patch xz-utils             # unpacking QEMU's source package, for conformance
)
if [ $# -gt 0 ]; then
    packages=("$@")
fi

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
    echo "setup-system knows Debian and its descendants only. Elsewhere, install the equivalents of:" >&2
    echo "  ${packages[*]}" >&2
    echo "Tests that need one that is absent are skipped with the reason." >&2
    exit 1
fi

missing=()
for package in "${packages[@]}"; do
    if [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)" != installed ]; then
        missing+=("$package")
    fi
done
if [ ${#missing[@]} -eq 0 ]; then
    echo "all system packages are installed"
    exit 0
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
        echo "root is needed to install: ${missing[*]}" >&2
        exit 1
    fi
    as_root=(sudo)
fi
"${as_root[@]}" apt-get update -q
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}"
