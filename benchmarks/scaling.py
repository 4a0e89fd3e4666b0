"""What an alignment's step costs with more ranks, more images, more tokens: each case a run of its own.

As a program it is one rank of a case: `torchrun ... -m benchmarks.scaling '{"config": ..., "notes": ...}'`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
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

BACKBONE, IMAGE_SIZE, BATCH, STEPS, WARM = "vit_tiny_patch16_224", 224, 8, 8, 2
RANKS = (1, 2, 4)
_COUNTERS = Path("/proc/net/dev")


@dataclass(frozen=True)
class Case:
    """A run that is measured."""

    ranks: int
    images: int
    """Per step, over all ranks."""
    image_size: int
    """Pixels."""


def cases(config: ScalingConfig) -> list[Case]:
    """As many images on more ranks; then more images, and larger ones, on one."""
    base = Case(1, config.batch_size or BATCH, config.image_size or IMAGE_SIZE)
    more_ranks = [replace(base, ranks=ranks) for ranks in RANKS]
    more_images = [replace(base, images=times * base.images) for times in (2, 4)]
    return [*more_ranks, *more_images, replace(base, image_size=2 * base.image_size)]


def run_bench_scaling(config: ScalingConfig) -> None:
    """Measure, write the JSON file, show the tables."""
    content = write_measurements(config, bench_scaling(config))
    show(scaling_tables(content), config)


def bench_scaling(config: ScalingConfig) -> dict[str, Any]:
    """Measure all cases, each in processes of its own, one thread each.

    Raises:
        RunFailure: A case failed, as where there are fewer GPUs than ranks.
    """
    device = choose_device(config.device)
    with TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        draw = np.random.default_rng(config.seed)
        for number in range(16):
            small = Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            small.resize((256, 256), Image.Resampling.BICUBIC).save(images / f"{number}.png")
        rows = [
            _measured(case, config, images, Path(folder) / str(n)) for n, case in enumerate(cases(config))
        ]
    parameters = rows[0]["parameters"]
    return {
        "backbone": config.backbone or BACKBONE,
        "parameters": parameters,
        "hardware": hardware(device) | {"threads": 1},
        "cases": [row | {"foreseen_bytes": all_reduce_bytes(parameters, row["ranks"])} for row in rows],
    }


def all_reduce_bytes(parameters: int, ranks: int) -> int:
    """What all ranks together send in a ring's sum over gradients of 4 bytes: each 2 (N - 1) / N of them."""
    return 2 * (ranks - 1) * 4 * parameters


def _measured(case: Case, config: ScalingConfig, images: Path, folder: Path) -> dict[str, Any]:
    steps = config.steps or STEPS
    run = AlignConfig(
        backbone=config.backbone or BACKBONE, weights="none", image_size=case.image_size, data=str(images),
        seed=config.seed, batch_size=case.images, steps=WARM + steps + 1, workers=0, device=config.device,
        out=str(folder), log_every=10**6,
        loss="cosine",  # no search for a scale
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
            f"bench scaling with {case.ranks} ranks failed: {lines[-1] if lines else 'without a word'}"
        )
    notes = [json.loads(Path(f"{folder}.{rank}.json").read_text()) for rank in range(case.ranks)]
    first = notes[0]
    return {
        **asdict(case),
        "tokens": first["tokens"],
        "parameters": first["parameters"],
        "cpu_seconds": sum(_typical(note["cpu"]) for note in notes),
        "wall_seconds": _typical(first["wall"]),
        "sent_bytes": _typical(first["sent"]) if first["sent"] else None,
    }


def _typical(counts: list[float]) -> float:
    """The middle difference between steps, without the first ones."""
    return statistics.median(b - a for a, b in zip(counts[WARM:-1], counts[WARM + 1 :], strict=True))


class Noted(AlignTask):
    """An alignment that writes down what has been spent when a step begins."""

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
    """Bytes that processes of this machine have sent one another over the network, where the system counts them."""
    if _COUNTERS.is_file():
        for line in _COUNTERS.read_text().splitlines():
            if line.strip().startswith("lo:"):
                yield float(line.split(":")[1].split()[8])


def _rank(argument: str) -> None:
    values = json.loads(argument)
    torch.set_num_threads(1)
    config = AlignConfig(**values["config"])
    task = Noted(config)
    train(task, config, "align")
    facts = {
        "tokens": task.student.encoder.backbone.num_patches,
        "parameters": sum(p.numel() for p in task.student.parameters() if p.requires_grad),
        **task.notes,
    }
    Path(f"{values['notes']}.{os.environ.get('RANK', '0')}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    _rank(sys.argv[1])


def scaling_tables(content: dict[str, Any]) -> list[Table]:
    """What a step costs in each case, and what goes over the network."""
    title = "A step of aligning {backbone}, {parameters:,} trained parameters".format(**content)
    numbers = (
        "ranks",
        "images a step",
        "patches an image",
        "CPU, s, all ranks",
        "wall, s",
        "sent, MB",
        "foreseen",
    )
    table = timing_table(title, content, (), numbers)
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
