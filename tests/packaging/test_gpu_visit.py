"""The script for a visit to a GPU: every part runs on a CPU, in small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_visit.sh"


def visit(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env={**os.environ, "PYTHON": sys.executable, "TINY": "1", **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("arguments", [(), ("d",), ("a", "b")])
def test_only_the_three_visits_are_known(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = visit(*arguments, OUT=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == "usage: bash scripts/gpu_visit.sh a|b|c\n"


@pytest.mark.thorough
@pytest.mark.parametrize("part", ["a", "b", "c"])
def test_every_part_ends_well_and_gives_figures(part: str, tmp_path: Path) -> None:
    done = visit(part, OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout[-4000:]
    content = json.loads((tmp_path / f"visit-{part}.json").read_text())
    assert content["visit"] == part
    assert content["tiny"]
    for found in content["parts"]:
        assert found["rc"] == 0, found
        if found["name"] not in ("tests", "profile", "run-eager", "run-flex"):  # their output is in the file
            assert found["figures"], found
