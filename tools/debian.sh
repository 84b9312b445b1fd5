#!/usr/bin/env bash
# Usage: tools/debian.sh SUITE [COMMAND ARGUMENT...]
# Run .ci/run, or COMMAND, on Debian SUITE (trixie, bookworm): in a folder that debootstrap fills, below build/debian, in a copy of
# this tree. A run of .ci/run leaves its log in build/debian/SUITE.log, and its result in docs/debian.md. Needs root.
#
# Where packages come from is read from this machine's apt and pip while it runs. All mounts lie in a mount namespace of their own:
# they end with the last process, however that ends. DEBIAN_BUILD names another folder to work in.
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
suite=${1:?usage: tools/debian.sh SUITE [COMMAND ARGUMENT...]}
shift
build=${DEBIAN_BUILD:-$here/build/debian}
root=$build/$suite
copy=/srv/cowhand

if [ "$(id -u)" -ne 0 ]; then
    echo "tools/debian.sh needs root: it makes a Debian system in a folder and changes into it" >&2
    exit 1
fi

# The rest runs where mounts and processes are its own, and end with it.
if [ -z "${COWHAND_DEBIAN_INSIDE:-}" ]; then
    "$here/tools/setup-system.sh" debootstrap >/dev/null
    COWHAND_DEBIAN_INSIDE=1 exec unshare --mount --propagation private --pid --fork --kill-child \
        "$here/tools/debian.sh" "$suite" "$@"
fi
unset COWHAND_DEBIAN_INSIDE
# The first process of a namespace ignores what it has no handler for.
trap 'exit 130' INT
trap 'exit 143' TERM HUP

mirror() {
    # REPO_URI of Debian's own packages, as apt has them; updates and security are other archives of the same words.
    apt-get indextargets --format '$(ORIGIN) $(COMPONENT) $(RELEASE) $(REPO_URI)' 'Created-By: Packages' |
        awk '$1 == "Debian" && $2 == "main" && $3 !~ /security|updates|backports/ { print $4; exit }'
}

acquire_settings() {
    # Proxies, certificates, patience: how this machine's apt fetches.
    apt-config dump --no-empty --format '%f "%v";%n' Acquire | grep -Ev '^Acquire::(IndexTargets|Changelogs|Languages|cdrom)' || true
}

make_root() {
    local from proxy
    from=$(mirror)
    if [ -z "$from" ]; then
        echo "apt knows no archive of Debian on this machine: nothing to make Debian $suite from" >&2
        exit 1
    fi
    proxy=$(apt-config dump --no-empty --format '%v' Acquire::http::Proxy)
    rm -rf "$root"
    mkdir -p "$root"
    ${proxy:+env "http_proxy=$proxy"} debootstrap --variant=minbase \
        --include=ca-certificates,git,make,python3,python3-venv,procps,iproute2 "$suite" "$root" "$from" >"$build/$suite.debootstrap.log" 2>&1 || {
        tail -n 20 "$build/$suite.debootstrap.log" >&2
        exit 1
    }
    echo "deb-src $from $suite main" >>"$root/etc/apt/sources.list"
    touch "$root/.cowhand-complete"
}

mounts() {
    mount -t proc proc "$root/proc"
    mount -t sysfs sysfs "$root/sys"
    mount --bind /dev "$root/dev"
    mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$root/dev/pts"
    mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
    mount -t tmpfs -o mode=755 tmpfs "$root/run"
}

# Show a file or folder of this machine under its own name, read-only.
lend() {
    [ -e "$1" ] || return 0
    if [ -d "$1" ]; then
        mkdir -p "$root$1"
    else
        mkdir -p "$root$(dirname "$1")"
        [ -e "$root$1" ] || touch "$root$1"
    fi
    mount --bind "$1" "$root$1"
    mount -o remount,bind,ro "$root$1"
}

network() {
    local name path
    cp --remove-destination -L /etc/resolv.conf /etc/hosts "$root/etc/"
    acquire_settings >"$root/etc/apt/apt.conf.d/90host"
    rm -rf "$root/etc/apt/auth.conf.d"
    for name in /etc/apt/auth.conf /etc/apt/auth.conf.d; do
        [ ! -e "$name" ] || cp -a "$name" "$root/etc/apt/"
    done
    for name in /etc/pip.conf /etc/xdg/pip /root/.pip /root/.config/pip; do
        lend "$name"
    done
    # What pip is told to read from this machine's own disks, and the certificates that environment variables name. A simple
    # index refers to files beside it.
    {
        { python3 -m pip config list 2>/dev/null || true; } | tr -d "'\"" | sed 's/\\n/ /g; s/^[^=]*=//' | tr -s ' ' '\n'
        env | grep -E '^(PIP_|[A-Z_]*(SSL|CERT|CA_BUNDLE|CA_CERTS|CAINFO))' | sed 's/^[^=]*=//' | tr -s ' ' '\n'
    } | sort -u | while read -r path; do
        case $path in
            file:///*) path=${path#file://} && lend "$(dirname "${path%/}")" ;;
            /etc/ssl/certs | /etc/ssl/certs/) ;;
            /*) lend "$path" ;;
        esac
    done
}

copy_tree() {
    local kept
    mkdir -p "$root$copy"
    # What a run made there stays, as it does in a checkout: virtual environment, caches.
    for kept in "$root$copy"/* "$root$copy"/.[!.]*; do
        case ${kept##*/} in .venv | .mypy_cache | .ruff_cache | .hypothesis | .import_linter_cache | build) ;; *) rm -rf "$kept" ;; esac
    done
    (cd "$here" && git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' name; do
        [ ! -e "$name" ] || printf '%s\0' "$name"
    done | tar --null --files-from=- -cf -) | tar -xf - -C "$root$copy" --no-same-owner
}

# Run a command in the copy, with what of the environment decides how packages are fetched and tests run.
inside() {
    local words=() line
    while IFS= read -r -d '' line; do
        case $line in
            PIP_* | *_proxy=* | *_PROXY=* | *SSL_CERT* | CURL_CA_BUNDLE=* | REQUESTS_CA_BUNDLE=* | COWHAND_* | JOBS=* | TESTS=* | PYTEST_ADDOPTS=*) words+=("$line") ;;
        esac
    done < <(env -0)
    chroot "$root" env -i HOME=/root LANG=C.UTF-8 TERM="${TERM:-dumb}" \
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "${words[@]}" \
        sh -c 'cd "$1" && shift && exec "$@"' sh "$copy" "$@"
}

mkdir -p "$build"
exec 9>"$build/$suite.lock"
if ! flock --nonblock 9; then
    echo "another run uses $root" >&2
    exit 1
fi
if [ ! -e "$root/.cowhand-complete" ]; then
    echo "making Debian $suite in $root" >&2
    make_root
fi
mounts
network
copy_tree

if [ $# -gt 0 ]; then
    inside "$@"
    exit
fi
status=0
inside .ci/run 2>&1 | tee "$build/$suite.log" || status=$?
facts=$(inside sh -c 'cat /etc/debian_version; qemu-img --version | head -n 1; python3 --version; uname -r')
commit=$(git -C "$here" describe --always --dirty --abbrev=12)
python3 "$here/tools/debian.py" "$here/docs/debian.md" "$suite" "$status" "$commit" "$build/$suite.log" <<<"$facts"
exit "$status"
