"""Print the lowest version of every dependency that pyproject.toml allows, one exact requirement a line.

    python scripts/floors.py [EXTRA ...] > floors.txt && pip install -r floors.txt

A continuous-integration job installs these versions and runs the tests, so the lower bounds stay true. The script
needs no installed package: Python 3.10 has no tomllib, so it uses pip's own copy of tomli there.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:
    from pip._vendor import tomli as tomllib

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def floor(requirement: str) -> str:
    """``torch>=2.9,<3; marker`` as ``torch==2.9; marker``."""
    specifiers, semicolon, marker = requirement.partition(";")
    found = re.fullmatch(r"([\w.-]+)>=([\w.]+)(,.*)?", specifiers.replace(" ", ""))
    if found is None:
        raise SystemExit(f"{PYPROJECT.name}: {requirement!r} has no lower bound")
    return f"{found[1]}=={found[2]}{semicolon}{marker}"


def main(extras: list[str]) -> None:
    """Print the floors of the dependencies and of the named extras."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"]]
    for extra in extras:
        requirements += project["optional-dependencies"][extra]
    print("\n".join(floor(requirement) for requirement in requirements))


if __name__ == "__main__":
    main(sys.argv[1:])
