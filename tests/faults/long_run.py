"""A run of many tiny steps that prints its memory use at some steps as JSON.

python tests/faults/long_run.py '{"out": "/tmp/long", "steps": 20000}'
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from engine_runs import COMMAND, DisturbedAlignment, make_images, tiny
from sharded_runs import TokenTask, token
from torch import nn

from localign.engine import StepResult, train


def resident() -> float:
    """Resident memory of this process, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


class MemoryRecorder:
    """Records memory use at some steps, counted from 0."""

    def __init__(self, at: list[int]) -> None:
        self.at, self.seen = at, dict[str, float]()

    def record(self, batch: Any, batch_size: int) -> None:
        step = int(batch.positions[0]) // batch_size
        if step in self.at and str(step) not in self.seen:
            gc.collect()
            self.seen[str(step)] = round(resident(), 1)


class WatchedTokens(TokenTask):
    recorder: MemoryRecorder

    def step(self, model: nn.Module, batch: Any) -> StepResult:
        self.recorder.record(batch, self.config.batch_size)
        return super().step(model, batch)


class WatchedAlignment(DisturbedAlignment):
    recorder: MemoryRecorder

    def step(self, model: nn.Module, batch: Any) -> StepResult:
        self.recorder.record(batch, self.config.batch_size)
        return super().step(model, batch)


def main() -> None:
    torch.set_num_threads(1)
    options = json.loads(sys.argv[1])
    out, steps, at = Path(options["out"]), options["steps"], options["at"]
    common = {"steps": steps, "log_every": 10, "checkpoint_every": 500, "val_every": 1000}
    task: WatchedTokens | WatchedAlignment
    if options["task"] == "tokens":
        task = WatchedTokens(token(out, sharding="none", **common))
    else:
        (out.parent / "images").mkdir(parents=True)
        images = make_images(out.parent / "images", 20)
        config = tiny(
            out, images, **{**common, "batch_size": 2, "workers": 1, "val": str(images), "val_images": 4}
        )
        task = WatchedAlignment(config)
    task.recorder = MemoryRecorder(at)
    train(task, task.config, COMMAND)
    sizes = {p.name: p.stat().st_size for p in out.iterdir() if p.is_file()}
    checkpoints = sorted(p.name for p in (out / "checkpoints").iterdir())
    print(json.dumps({"MiB at step": task.recorder.seen, "bytes": sizes, "checkpoints": checkpoints}))


if __name__ == "__main__":
    main()
