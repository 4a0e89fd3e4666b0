"""Two ranks share the work and reach the results of one rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import probe_ranks
import pytest
from safetensors.torch import load_file

TOLERANCE = 1e-5


def figures(folder: Path, cache: str) -> list[dict[str, Any]]:
    outcomes: list[dict[str, Any]] = json.loads((folder / f"{cache}.json").read_text())
    return outcomes


def measured(outcome: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics of every source, head and task."""
    results = outcome["results"].values()
    return [metrics for heads in results for tasks in heads.values() for metrics in tasks.values()]


@pytest.mark.slow
def test_two_ranks_equal_one_in_every_mode(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    probe_ranks.run(one)
    probe_ranks.run_on_ranks(two, 2)
    for cache in probe_ranks.MODES:
        mine, other = (load_file(folder / f"{cache}.safetensors") for folder in (one, two))
        assert mine.keys() == other.keys()
        furthest = max((float((mine[k] - other[k]).abs().max()), k) for k in mine)
        assert furthest[0] < TOLERANCE, (cache, furthest)
        for first, second in zip(figures(one, cache), figures(two, cache), strict=True):
            for ours, theirs in zip(measured(first), measured(second), strict=True):
                assert ours["class_positives"] == theirs["class_positives"], cache
                # A logit on the threshold may fall on either side of it: one decision of a few hundred.
                assert ours["accuracy"] == pytest.approx(theirs["accuracy"], abs=0.01), cache
            for a, b in zip(first["train"]["curve"], second["train"]["curve"], strict=True):
                assert a["transformer"]["local"] == pytest.approx(b["transformer"]["local"], abs=TOLERANCE)
