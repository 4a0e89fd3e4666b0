#!/bin/sh
# Build the page of `localign explore` from web/ where Node is, and test it in a browser.
# Usage: scripts/web_tests.sh BIN-FOLDER-OF-THE-ENVIRONMENT
set -eu
bin=$1

"$bin/python" -c 'import playwright' 2>/dev/null || "$bin/python" -m pip install -q -e '.[web-tests]'

if ! command -v chromium >/dev/null && ! command -v chromium-browser >/dev/null && ! command -v google-chrome >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -q && apt-get install -y -q --no-install-recommends chromium fonts-dejavu-core || true
    fi
    command -v chromium >/dev/null || "$bin/playwright" install chromium || true  # without one, the tests are skipped
fi

if command -v npm >/dev/null; then
    (cd web && npm ci --no-audit --no-fund && npm run build)
fi
OMP_NUM_THREADS=1 "$bin/python" -m pytest -rs tests/explore
