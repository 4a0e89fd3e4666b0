"""Models on the Hub, from a cache that the test fills: results name the commit, and commits do not share answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_files import WRITERS
from bench_models import save_tiny_llava
from safetensors.torch import load_file, save_file

from localign.errors import UserError
from localign.vlm.evaluation.models import fingerprint_of, hub_commit

OLD, NEW = "a" * 40, "b" * 40
MODEL = "someone/tiny"
PROGRAM = """
import shlex, sys
from localign.cli import main
for line in sys.stdin:
    print("exit", main(shlex.split(line)), flush=True)
"""


def fill_cache(home: Path) -> None:
    """Two commits with different weights: ``main`` is the newer one, ``v1`` the older."""
    root = home / "hub" / f"models--{MODEL.replace('/', '--')}"
    old, new = (root / "snapshots" / commit for commit in (OLD, NEW))
    save_tiny_llava(old)
    shutil.copytree(old, new)
    weights = load_file(new / "model.safetensors")
    changed = {name: weight.flip(0).contiguous() for name, weight in weights.items()}
    save_file(changed, new / "model.safetensors", {"format": "pt"})
    (root / "refs").mkdir()
    for name, commit in (("v1", OLD), ("main", NEW)):
        (root / "refs" / name).write_text(commit)


def model_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())["model"]
    return found


def test_branches_and_tags_become_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / f"models--{MODEL.replace('/', '--')}"
    for name, commit in (("v1", OLD), ("main", NEW)):
        (root / "snapshots" / commit).mkdir(parents=True)
        (root / "snapshots" / commit / "config.json").write_text("{}")
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / name).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert [hub_commit(MODEL, revision) for revision in (None, "main", "v1", NEW)] == [NEW, NEW, OLD, NEW]
    assert fingerprint_of(MODEL) == fingerprint_of(MODEL, NEW) == f"{MODEL}@{NEW}"
    assert fingerprint_of(MODEL, OLD) == f"{MODEL}@{OLD}"
    with pytest.raises(UserError, match=f"cannot load the model {MODEL}"):
        hub_commit(MODEL, "v2")


@pytest.mark.slow
def test_a_revision_is_recorded_pinned_and_part_of_the_answers_keys(tmp_path: Path) -> None:
    fill_cache(tmp_path / "home")
    WRITERS["gqa"](tmp_path / "data")
    common = f"--benchmarks gqa --data {tmp_path / 'data'} --allow-partial --device cpu"
    runs = [("", "one"), (f"--revision {NEW}", "one"), ("--revision v1", "one"), ("--revision v1", "other")]
    commands = [f"vlm eval {MODEL} {version} {common} --out {tmp_path / out}" for version, out in runs]
    commands.append(f"vlm eval {MODEL} --revision v2 {common} --out {tmp_path / 'none'}")
    responses, models = tmp_path / "one" / "responses" / "rank0.jsonl", []
    counts = []
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        for command in commands:
            if "v2" in command:
                before = (tmp_path / "stderr").stat().st_size
            process.stdin.write(command + "\n")
            process.stdin.flush()
            said = next((line for line in process.stdout if line.startswith("exit ")), "it died")
            assert said.strip() == ("exit 2" if "v2" in command else "exit 0")
            models.append(model_of(tmp_path / "one"))
            counts.append(len(responses.read_text().splitlines()))
        process.stdin.close()
    refusal = (tmp_path / "stderr").read_text()[before:]
    assert f"cannot load the model {MODEL}" in refusal
    assert refusal.strip().count("\n") == 0
    assert [model["revision"] for model in models] == [NEW, NEW, OLD, OLD, OLD]
    assert models[0]["weights"] == f"{MODEL}@{NEW}"
    # A branch and its commit are the same model; another commit is another model.
    assert counts == [counts[0], counts[0], *[2 * counts[0]] * 3]
    one, other = ((tmp_path / name / "answers.jsonl").read_text() for name in ("one", "other"))
    assert one == other
    answers = [json.loads(line)["text"] for line in responses.read_text().splitlines()]
    assert answers[: counts[0]] != answers[counts[0] :]
