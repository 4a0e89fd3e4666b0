#!/bin/sh
# Build the source distribution and the wheel into dist/, and check what is in them: sh scripts/package.sh
# Needs the package `build` in the Python that it runs (PYTHON=..., default python3).
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
lists=$(mktemp -d)
trap 'rm -rf "$lists"' EXIT

rm -rf dist build
"$python" -m build --outdir dist

tar -tzf dist/localign-*.tar.gz | cut -d/ -f2- | LC_ALL=C sort >"$lists/sdist"
git ls-files src tests docs benchmarks scripts CHANGELOG.md CONTRIBUTING.md RELEASING.md LICENSE Makefile README.md pyproject.toml |
    LC_ALL=C sort >"$lists/tracked"
LC_ALL=C comm -13 "$lists/sdist" "$lists/tracked" >"$lists/missing"
if [ -s "$lists/missing" ]; then
    echo "the source distribution lacks:" >&2
    cat "$lists/missing" >&2
    exit 1
fi

"$python" -m zipfile -l dist/localign-*.whl | cut -d' ' -f1 | LC_ALL=C sort >"$lists/wheel"
git ls-files src/localign | cut -d/ -f2- | LC_ALL=C sort >"$lists/package"
LC_ALL=C comm -13 "$lists/wheel" "$lists/package" >"$lists/missing"
grep -vE '^(localign/|localign-[^/]*\.dist-info/|File$)' "$lists/wheel" >"$lists/extra" || true
for list in missing extra; do
    if [ -s "$lists/$list" ]; then
        echo "the wheel's $list files:" >&2
        cat "$lists/$list" >&2
        exit 1
    fi
done
echo "dist/ holds a complete source distribution and a wheel of the package alone"
