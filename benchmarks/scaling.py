"""The cost of an alignment step with more ranks, more images and more tokens; each case is a separate run.

`torchrun ... -m benchmarks.scaling '{"config": ..., "notes": ...}'` runs one rank of a case.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from torch import nn

from benchmarks.config import ScalingConfig
from localign import rng
from localign.alignment import AlignConfig, AlignTask
from localign.bench.show import show, timing_table, write_measurements
from localign.bench.timing import hardware
from localign.data.loader import Batch
from localign.engine import StepResult, train
from localign.engine.distributed import choose_device
from localign.errors import RunFailure

BACKBONE, IMAGE_SIZE, BATCH, STEPS, WARMUP_STEPS = "vit_tiny_patch16_224", 224, 8, 8, 2
RANKS = (1, 2, 4)
_COUNTERS = Path("/proc/net/dev")


@dataclass(frozen=True)
class Case:
    """One measured run."""

    ranks: int
    images: int
    """Images per step, over all ranks."""
    image_size: int
    """Side of the images, pixels."""


def cases(config: ScalingConfig) -> list[Case]:
    """The same number of images on more ranks; then more images, and larger images, on one rank."""
    base = Case(1, config.batch_size or BATCH, config.image_size or IMAGE_SIZE)
    more_ranks = [replace(base, ranks=ranks) for ranks in RANKS]
    more_images = [replace(base, images=times * base.images) for times in (2, 4)]
    return [*more_ranks, *more_images, replace(base, image_size=2 * base.image_size)]


def run_bench_scaling(config: ScalingConfig) -> None:
    """Run the benchmark, write its JSON file, and print its tables."""
    content = write_measurements(config, bench_scaling(config))
    show(scaling_tables(content), config)


def bench_scaling(config: ScalingConfig) -> dict[str, Any]:
    """Measure all cases, each in its own processes with one thread per process.

    Cases with more ranks than GPUs are left out, with the reason.

    Raises:
        RunFailure: A case failed.
    """
    device = choose_device(config.device)
    possible, left_out = fitting(cases(config), device)
    with TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        draw = np.random.default_rng(config.seed)
        for number in range(16):
            small = Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            small.resize((256, 256), Image.Resampling.BICUBIC).save(images / f"{number}.png")
        rows = [_measure(case, config, images, Path(folder) / str(n)) for n, case in enumerate(possible)]
    parameters = rows[0]["parameters"]
    return {
        "backbone": config.backbone or BACKBONE,
        "parameters": parameters,
        "hardware": hardware(device) | {"threads": 1},
        "left_out": left_out,
        "cases": [row | {"foreseen_bytes": all_reduce_bytes(parameters, row["ranks"])} for row in rows],
    }


def fitting(wanted: Sequence[Case], device: torch.device) -> tuple[list[Case], list[str]]:
    """The cases that this machine can run, and for each other case why it is left out."""
    gpus = torch.cuda.device_count() if device.type == "cuda" else None
    possible = [case for case in wanted if gpus is None or case.ranks <= gpus]
    left_out = [f"{case.ranks} ranks need {case.ranks} GPUs; there is {gpus}" if gpus == 1 else
                f"{case.ranks} ranks need {case.ranks} GPUs; there are {gpus}"
                for case in wanted if case not in possible]  # fmt: skip
    return possible, left_out


def all_reduce_bytes(parameters: int, ranks: int) -> int:
    """Bytes that all ranks send in a ring all-reduce of float32 gradients; each sends 2 (N - 1) / N of them."""
    return 2 * (ranks - 1) * 4 * parameters


def _measure(case: Case, config: ScalingConfig, images: Path, folder: Path) -> dict[str, Any]:
    steps = config.steps or STEPS
    run = AlignConfig(
        backbone=config.backbone or BACKBONE, weights="none", image_size=case.image_size, data=str(images),
        seed=config.seed, batch_size=case.images, steps=WARMUP_STEPS + steps + 1, workers=0, device=config.device,
        out=str(folder), log_every=10**6,
        loss="cosine",  # cosine needs no scale of the targets
    )  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.ranks)]
    argument = json.dumps({"config": asdict(run), "notes": str(folder)})
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "benchmarks.scaling", argument],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RunFailure(
            f"bench scaling with {case.ranks} ranks failed: {lines[-1] if lines else 'no message'}"
        )
    notes = [json.loads(Path(f"{folder}.{rank}.json").read_text()) for rank in range(case.ranks)]
    first = notes[0]
    return {
        **asdict(case),
        "tokens": first["tokens"],
        "parameters": first["parameters"],
        "cpu_seconds": sum(_median_step(note["cpu"]) for note in notes),
        "wall_seconds": _median_step(first["wall"]),
        # nccl does not send over the loopback interface, whose counter this is.
        "sent_bytes": _median_step(first["sent"]) if first["sent"] and first["backend"] == "gloo" else None,
    }


def _median_step(counts: list[float]) -> float:
    """The median difference between consecutive steps after the warm-up."""
    measured = counts[WARMUP_STEPS:]
    return statistics.median(b - a for a, b in itertools.pairwise(measured))


class RecordingTask(AlignTask):
    """An alignment task that records the time and network traffic at the beginning of each step."""

    def __init__(self, config: AlignConfig) -> None:
        with rng.seeded_globals(config.seed, "bench"):
            super().__init__(config)
        self.notes: dict[str, list[float]] = {"wall": [], "cpu": [], "sent": []}

    def step(self, model: nn.Module, batch: Batch) -> StepResult:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.notes["wall"].append(time.perf_counter())
        self.notes["cpu"].append(time.process_time())
        self.notes["sent"] += loopback_bytes()
        return super().step(model, batch)


def loopback_bytes() -> Iterator[float]:
    """Bytes sent over the loopback interface so far; yields nothing if the system has no counter."""
    if _COUNTERS.is_file():
        for line in _COUNTERS.read_text().splitlines():
            if line.strip().startswith("lo:"):
                yield float(line.split(":")[1].split()[8])


def _rank(argument: str) -> None:
    values = json.loads(argument)
    torch.set_num_threads(1)
    config = AlignConfig(**values["config"])
    task = RecordingTask(config)
    train(task, config, "align")
    facts = {
        "tokens": task.student.encoder.backbone.num_patches,
        "parameters": sum(p.numel() for p in task.student.parameters() if p.requires_grad),
        "backend": "nccl" if task.device.type == "cuda" else "gloo",
        **task.notes,
    }
    Path(f"{values['notes']}.{os.environ.get('RANK', '0')}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    _rank(sys.argv[1])


def scaling_tables(content: dict[str, Any]) -> list[Table]:
    """A table of the cost and the network traffic of a step in each case."""
    title = "A step of aligning {backbone}, {parameters:,} trained parameters".format(**content)
    numbers = (
        "ranks",
        "images/step",
        "patches/image",
        "CPU of all ranks, s",
        "wall, s",
        "sent, MB",
        "expected, MB",
    )
    table = timing_table(title, content, (), numbers)
    notes = list(content["left_out"])
    if any(row["sent_bytes"] is None for row in content["cases"]):
        notes.append(
            "sent bytes are counted on the loopback interface of Linux, which gloo uses and nccl does not"
        )
    table.caption = "\n".join([*filter(None, [str(table.caption or "")]), *notes])
    for row in content["cases"]:
        sent = row["sent_bytes"]
        table.add_row(
            *(str(row[name]) for name in ("ranks", "images", "tokens")),
            f"{row['cpu_seconds']:.2f}",
            f"{row['wall_seconds']:.2f}",
            "–" if sent is None else f"{sent / 1e6:.1f}",
            f"{row['foreseen_bytes'] / 1e6:.1f}",
        )
    return [table]
