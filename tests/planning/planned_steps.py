"""Real training steps for comparison with plans. As a program: measures the memory of a step."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from localign.alignment import AlignConfig, AlignTask
from localign.data.loader import Batch
from localign.options.plan import PlanConfig

SMALL_VIT: dict[str, Any] = {
    "backbone": "vit_tiny_patch16_224", "weights": "none", "model_kwargs": {"depth": 3}, "device": "cpu",
    "precision": "fp32", "attention": "eager", "scale_images": 1,
}  # fmt: skip


def planned(**options: Any) -> PlanConfig:
    """The options of a plan for the small ViT."""
    return PlanConfig(**{**SMALL_VIT, "steps": 1, "batch_size": 32, "gpus": 1, **options})


def task(**options: Any) -> AlignTask:
    """The alignment task of the small ViT; its images are not used."""
    return AlignTask(AlignConfig(**{**SMALL_VIT, "batch_size": 32, "steps": 1, **options}))


def step(chosen: AlignTask, images: int) -> float:
    """Run one forward and backward pass; returns CPU seconds."""
    pixels = torch.zeros(images, 3, 224, 224, dtype=torch.uint8)
    numbers = torch.arange(images)
    values: dict[str, Any] = {"images": pixels, "positions": numbers, "indices": numbers}
    batch = Batch(**{**dict.fromkeys(Batch._fields), **values})
    chosen.student.zero_grad(set_to_none=False)
    start = time.process_time()
    chosen.step(chosen.module, batch).loss_sum.backward()
    return time.process_time() - start


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def measured_bytes(images: int) -> int:
    """Peak resident memory of this process in a second step, beyond weights and gradients, in bytes."""
    torch.set_num_threads(1)
    chosen = task()
    step(chosen, images)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    step(chosen, images)
    return _status("VmHWM") - before


if __name__ == "__main__":
    print(json.dumps(measured_bytes(int(sys.argv[1]))))
