from __future__ import annotations

from pathlib import Path

import pytest
from engine_runs import make_images
from threads import one_thread  # noqa: F401


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 20 tiny PNG files."""
    return make_images(tmp_path_factory.mktemp("images"), 20)


@pytest.fixture(scope="session")
def val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 4 other tiny PNG files."""
    return make_images(tmp_path_factory.mktemp("val"), 4, seed=1)
