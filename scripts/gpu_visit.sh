#!/usr/bin/env bash
# What only a GPU can show, in three visits of less than seven minutes each, most valuable first:
#
#     bash scripts/gpu_visit.sh a|b|c        TINY=1 bash scripts/gpu_visit.sh a|b|c    # rehearses every part on a CPU
#
# OUT (default runs/gpu) receives visit-a.json and the like, which grow as parts end. Packages that the machine lacks can
# lie as wheels in WHEELS (default .whl); part c takes its models and photographs from MODELS and PHOTOGRAPHS.
# benchmarks/GPU.md says what each part decides.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheels=${WHEELS:-.whl}
if [ -z "${TINY:-}" ] && ls "$wheels"/*.whl >/dev/null 2>&1; then
    site=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "$wheels"/*.whl
    export PYTHONPATH="$site:${PYTHONPATH:-}"
fi
export PYTHONPATH="$PWD/src:$PWD:${PYTHONPATH:-}" PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
exec "$python" scripts/gpu_visit.py "$@"
