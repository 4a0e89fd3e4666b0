"""The example in the docstring of Task runs and learns."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from engine_runs import logged
from torch import Tensor, nn

from localign import engine, rng

NAMES: dict[str, Any] = {
    **{name: getattr(engine, name) for name in engine.__all__},
    "Iterator": Iterator, "NamedTuple": NamedTuple, "torch": torch, "Tensor": Tensor, "nn": nn, "rng": rng,
}  # fmt: skip
"""What the example needs imported."""


def example() -> str:
    """The indented block after `::` in the docstring."""
    match = re.search(r"::\n\n((?: {8}.*\n|\n)+)", engine.Task.__doc__ or "")
    assert match
    return textwrap.dedent(match.group(1))


def test_the_example_learns_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = dict(NAMES)
    exec(example(), names)
    assert (tmp_path / "runs" / "line" / "results.json").is_file()
    losses = list(logged(tmp_path / "runs" / "line", "loss").values())
    assert losses[-1] < 0.1 * losses[0]
