from __future__ import annotations

from pathlib import Path

import pytest
import torch
from threads import one_thread  # noqa: F401
from vlm_runs import trained, write_conversations


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
