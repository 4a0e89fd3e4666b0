"""Real weights and real photographs; tests that need what cannot be had here are skipped with the reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
MODELS = ROOT / "runs" / "real" / "models"
UNAVAILABLE = 3
"""Exit code of the script where a package cannot be downloaded."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.real)


@pytest.fixture(scope="session")
def models() -> Path:
    """The folder of the real models, which is made once and kept."""
    script = ROOT / "scripts" / "real_models.py"
    done = subprocess.run([sys.executable, str(script), str(MODELS)], capture_output=True, text=True)
    if done.returncode == UNAVAILABLE:
        pytest.skip(f"no real weights: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return MODELS


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real photographs, label maps and official files."""
    if not (DATA / "coco-things").is_dir():
        pytest.skip("no photographs: ../shared/data/coco-things is not there")
    return DATA


@pytest.fixture(scope="session")
def pictures() -> Path:
    """A folder for pictures to look at, which is kept."""
    folder = ROOT / "runs" / "real" / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
