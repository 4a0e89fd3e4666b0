"""scripts/floors.py prints the lowest version of every dependency in pyproject.toml."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "floors.py"


def name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


@pytest.mark.parametrize("extras", [[], ["dev"], ["wandb", "parquet"]])
def test_every_dependency_has_its_exact_floor(extras: list[str]) -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"]]
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    done = subprocess.run([sys.executable, str(SCRIPT), *extras], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [name(line) for line in lines] == [name(requirement) for requirement in wanted]
    for line, requirement in zip(lines, wanted, strict=True):
        assert re.fullmatch(r"[\w.-]+==[\w.]+(;.*)?", line), line
        assert requirement.startswith(line.partition(";")[0].replace("==", ">="))


def test_a_dependency_without_a_lower_bound_is_refused() -> None:
    code = f"import runpy; runpy.run_path({str(SCRIPT)!r})['floor']('torch<3')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "'torch<3' has no lower bound" in done.stderr
