#!/bin/sh
# Build the source distribution and the wheel of the last commit into dist/, and check their contents: sh scripts/package.sh
# Needs the package `build` in the Python that it runs (PYTHON=..., default python3).
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# A copy, because setuptools also packs what an earlier build left in the egg-info folder.
rm -rf dist
mkdir "$work/tree"
git archive HEAD | tar -x -C "$work/tree"
"$python" -m build --outdir dist "$work/tree"

tar -tzf dist/localign-*.tar.gz | cut -d/ -f2- | LC_ALL=C sort >"$work/sdist"
git ls-tree -r --name-only HEAD src tests docs benchmarks scripts LICENSE Makefile pyproject.toml \
    README.md CHANGELOG.md CONTRIBUTING.md RELEASING.md | LC_ALL=C sort >"$work/tracked"
LC_ALL=C comm -13 "$work/sdist" "$work/tracked" >"$work/missing"
if [ -s "$work/missing" ]; then
    echo "the source distribution lacks:" >&2
    cat "$work/missing" >&2
    exit 1
fi

"$python" -m zipfile -l dist/localign-*.whl | cut -d' ' -f1 | LC_ALL=C sort >"$work/wheel"
git ls-tree -r --name-only HEAD src/localign | cut -d/ -f2- | LC_ALL=C sort >"$work/package"
LC_ALL=C comm -13 "$work/wheel" "$work/package" >"$work/missing"
grep -vE '^(localign/|localign-[^/]*\.dist-info/|File$)' "$work/wheel" >"$work/extra" || true
for list in missing extra; do
    if [ -s "$work/$list" ]; then
        echo "the wheel's $list files:" >&2
        cat "$work/$list" >&2
        exit 1
    fi
done
echo "dist/ holds a complete source distribution and a wheel of the package alone"
