"""A long run does not use more memory at the end than at the start, and its files stay small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("long_run.py")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads memory from /proc"),
]


@pytest.mark.parametrize(
    ("task", "steps"),
    [
        ("tokens", 1_000),
        pytest.param("tokens", 20_000, marks=pytest.mark.thorough),
        pytest.param("alignment", 20_000, marks=pytest.mark.thorough),
    ],
)
def test_memory_and_files_stay_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, steps: int
) -> None:
    at = [steps // 10, steps // 2, steps - 1]
    argument = {"out": str(tmp_path / "run"), "task": task, "steps": steps, "at": at}
    path = os.pathsep.join(
        [*map(str, (PROGRAM.parents[1] / "engine", PROGRAM.parent)), *filter(None, sys.path)]
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    command = [sys.executable, str(PROGRAM), json.dumps(argument)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    if steps > 1_000:
        with capsys.disabled():
            print(f"\n{task}: {facts}")
    early, _, late = facts["MiB at step"].values()
    assert late - early < 8, facts
    assert facts["bytes"]["log.jsonl"] < 400 * (steps / 10 + steps / 1000), "some hundred bytes per line"
    assert len(facts["checkpoints"]) <= 4, "the two newest, the best, and its mark"
