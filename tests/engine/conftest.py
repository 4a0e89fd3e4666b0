from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_runs import make_images


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread, so that all runs sum in the same order and can be compared bit by bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 20 tiny PNG files."""
    return make_images(tmp_path_factory.mktemp("images"), 20)


@pytest.fixture(scope="session")
def val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 4 other tiny PNG files."""
    return make_images(tmp_path_factory.mktemp("val"), 4, seed=1)
