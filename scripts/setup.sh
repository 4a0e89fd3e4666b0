#!/bin/sh
# Create a virtual environment with localign and its development tools: scripts/setup.sh FOLDER
set -eu
venv=${1:?usage: scripts/setup.sh FOLDER}
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "localign needs Python 3.10 or newer; $python is $("$python" -V 2>&1)" >&2
    exit 1
}

# Debian's python3 lacks ensurepip; install the venv package if we may.
if [ ! -x "$venv/bin/pip" ]; then
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
        as_root=""
        [ "$(id -u)" = 0 ] || as_root="sudo"
        if ! command -v apt-get >/dev/null || ! { $as_root apt-get update -q && $as_root apt-get install -yq "$version-venv"; }; then
            echo "$python cannot create virtual environments: install its venv module (Debian: $version-venv)" >&2
            exit 1
        fi
    fi
    "$python" -m venv "$venv"
fi

"$venv/bin/pip" install --disable-pip-version-check --quiet -e ".[dev]"
