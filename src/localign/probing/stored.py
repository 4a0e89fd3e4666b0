"""The outcome of a probing on the disk, with the bootstrap replicates that differences need, and without the heads."""

from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path
from typing import cast

import numpy as np
import torch

from localign.files import replace_text, replacing
from localign.options.probe import HeadSpec
from localign.probing.suite import Probed, SourceHead
from localign.probing.training import TrainedHeads
from localign.results import ProbeOutcome
from localign.text.reading import read_json_object


def write_probed(probed: Probed, outcome: Path, recalls: Path) -> None:
    """Write both files; ``outcome`` is written last, so where it exists the other does too.

    Args:
        probed: Of one backbone and seed.
        outcome: A JSON file.
        recalls: An npz file with an array per source and head.
    """
    arrays = {"/".join((name, *astuple(spec))): v.numpy() for (name, spec), v in probed.recalls.items()}
    with replacing(recalls) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    replace_text(outcome, json.dumps(probed.outcome))


def read_probed(outcome: Path, recalls: Path) -> Probed:
    """Read what :func:`write_probed` wrote; the recalls are empty if their file is missing, as beside old outcomes.

    Raises:
        UserError: The outcome cannot be read.
    """
    found = cast(ProbeOutcome, read_json_object(outcome))
    replicates: dict[SourceHead, torch.Tensor] = {}
    if recalls.is_file():
        with np.load(recalls, allow_pickle=False) as arrays:
            for name in arrays.files:
                source, *spec = name.split("/")
                replicates[source, HeadSpec(*spec)] = torch.from_numpy(arrays[name])
    trained = found.get("train", {})
    heads = TrainedHeads(
        seed=found["seed"],
        heads={},
        curve=[dict(point) for point in trained.get("curve", [])],
        convergence=trained.get("convergence", {}),
    )
    return Probed(found, heads, replicates)
