#!/usr/bin/env bash
# Usage: tools/venv.sh DIRECTORY REQUIREMENT...
# Make a virtual environment unless it is there, and install the project into it, editable, as REQUIREMENT says ("-e .").
# PYTHON chooses the interpreter. Works where the distribution left ensurepip out, as long as the interpreter has pip.
set -euo pipefail

directory=$1
shift

suitable() {
    "$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.14 python3.13 python3.12 python3.11 python; do
        if suitable "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    echo "cowhand needs Python 3.11 or newer with the venv module; none was found (set PYTHON to name one)" >&2
    return 1
}

if ! "$directory/bin/python" -c '' >/dev/null 2>&1; then
    python=$(find_python)
    echo "making $directory with $python"
    if "$python" -c 'import ensurepip' >/dev/null 2>&1; then
        "$python" -m venv "$directory"
    else
        "$python" -m venv --without-pip "$directory"
    fi
fi

if "$directory/bin/python" -c 'import pip' >/dev/null 2>&1; then
    exec "$directory/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
else
    exec "$(find_python)" -m pip --python "$directory/bin/python" install --quiet --disable-pip-version-check "$@"
fi
