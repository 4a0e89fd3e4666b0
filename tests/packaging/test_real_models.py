"""The script that makes real models says in one line what it could not get, and leaves nothing half made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "real_models.py"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.slow
def test_packages_that_cannot_be_downloaded_are_named(tmp_path: Path) -> None:
    done = run(str(tmp_path / "models"), PIP_NO_INDEX="1")
    assert done.returncode == 3
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("real_models: pip cannot get onnx, ml_dtypes, protobuf, gguf: ERROR: ")
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.slow
def test_a_complete_folder_needs_no_download(tmp_path: Path) -> None:
    for name in ("dinov2-small", "dinov2-timm", "smollm2-135m"):
        (tmp_path / name).mkdir()
    assert run(str(tmp_path), PIP_NO_INDEX="1").returncode == 0
    assert run().returncode == 1
