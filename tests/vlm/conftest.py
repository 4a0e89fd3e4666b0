from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from vlm_runs import trained, write_conversations


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread, so that all runs sum in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set of conversations with images."""
    return write_conversations(tmp_path_factory.mktemp("conversations"))


@pytest.fixture(scope="session")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run on one rank, packed, in one micro-batch."""
    out = tmp_path_factory.mktemp("whole") / "run"
    torch.set_num_threads(1)
    trained(data, out)
    return out
