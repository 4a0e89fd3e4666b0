"""Outcomes on the disk keep what differences between backbones need."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch

from localign.errors import UserError
from localign.options.probe import HeadSpec
from localign.probing.stored import read_probed, write_probed
from localign.probing.suite import Probed
from localign.probing.training import TrainedHeads
from localign.results import ProbeOutcome

SPECS = (HeadSpec("linear", "local"), HeadSpec("transformer", "majority", "anonymous"))


def probed() -> Probed:
    outcome = {"seed": 3, "train": {"images": 5, "curve": [{"step": 100}], "convergence": {}}, "results": {}}
    recalls = {("test", spec): torch.rand(10, dtype=torch.float64) for spec in SPECS}
    return Probed(cast(ProbeOutcome, outcome), TrainedHeads(3, {}, []), recalls)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    found = probed()
    write_probed(found, tmp_path / "a.json", tmp_path / "a.npz")
    again = read_probed(tmp_path / "a.json", tmp_path / "a.npz")
    assert again.outcome == found.outcome
    assert again.recalls.keys() == found.recalls.keys()
    assert all(torch.equal(again.recalls[key], value) for key, value in found.recalls.items())
    assert (again.trained.seed, again.trained.heads, again.trained.curve) == (3, {}, [{"step": 100}])


def test_an_outcome_without_replicates_has_none(tmp_path: Path) -> None:
    write_probed(probed(), tmp_path / "a.json", tmp_path / "a.npz")
    (tmp_path / "a.npz").unlink()
    assert read_probed(tmp_path / "a.json", tmp_path / "a.npz").recalls == {}


def test_a_damaged_outcome_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"seed": ')
    with pytest.raises(UserError, match=r"a\.json"):
        read_probed(tmp_path / "a.json", tmp_path / "a.npz")
