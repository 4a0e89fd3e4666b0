"""Tiny alignment runs for tests of the training loop, in this process or in new processes.

As a program it takes the options of a run and its disturbances as one JSON object.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from localign.alignment import AlignConfig, AlignTask
from localign.cli import exit_code
from localign.data.loader import Batch
from localign.engine import Outcome, StepResult, train
from localign.engine.checkpoints.checksums import FILES, SEAL, files_info, sealed_text
from localign.engine.checkpoints.state import STATE_FILE
from localign.engine.log import LOG_FILE, read_log

COMMAND = "align"
TINY_VIT = {"img_size": 24, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def make_images(folder: Path, count: int, seed: int = 0, truncated: tuple[int, ...] = ()) -> Path:
    """Write smooth random PNG files. Those with a number in ``truncated`` lack their second half."""
    draw = np.random.default_rng(seed)
    for i in range(count):
        path = folder / f"{i:04d}.png"
        small = Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        small.resize((24, 24), Image.Resampling.BICUBIC).save(path)
        if i in truncated:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return folder


def tiny(out: Path, data: Path, **options: Any) -> AlignConfig:
    """Options of a run whose steps take some hundredths of a second."""
    values: dict[str, Any] = {
        "backbone": "vit_tiny_patch16_224", "weights": "none", "model_kwargs": TINY_VIT, "data": str(data),
        "out": str(out), "steps": 8, "batch_size": 8, "lr": 1e-3, "scale_images": 16, "workers": 0,
        "log_every": 1, "checkpoint_every": 2, "device": "cpu", "decoder_layer_scale": 0.1, "warmup_steps": 2,
    }  # fmt: skip
    return AlignConfig(**{**values, **options})


class Stopped(Exception):
    """Stands for an external event that ends a run."""


class DisturbedAlignment(AlignTask):
    """An alignment with simulated disturbances.

    Args:
        config: As for AlignTask.
        stop_before: Raise :class:`Stopped` before this step, counted from 0 since the start of the run.
        poison: Steps that get a NaN loss, in their first micro-batch on rank 0 only.
        poison_gradient: Steps that get a NaN gradient but a finite loss, likewise.
        sleep: Seconds added to each step.
        room: For each rank, the largest micro-batch that fits in memory.
    """

    def __init__(
        self,
        config: AlignConfig,
        stop_before: int | None = None,
        poison: tuple[int, ...] = (),
        poison_gradient: tuple[int, ...] = (),
        sleep: float = 0.0,
        room: tuple[int, ...] = (),
    ) -> None:
        super().__init__(config)
        self.room = room[int(os.environ.get("RANK", "0"))] if room else None
        self.stop_before, self.sleep = stop_before, sleep
        self.poison, self.poison_gradient = poison, poison_gradient

    def step(self, model: nn.Module, batch: Batch) -> StepResult:
        number, within = divmod(int(batch.positions[0]), self.config.batch_size)
        if number == self.stop_before:
            raise Stopped
        if self.room is not None and len(batch.positions) > self.room:
            raise torch.OutOfMemoryError("simulated")
        time.sleep(self.sleep)
        result = super().step(model, batch)
        if number in self.poison and within == 0:
            result.loss_sum = result.loss_sum * float("nan")
        if number in self.poison_gradient and within == 0:
            assert self.student.decoder is not None
            weight = self.student.decoder.head.weight[0, 0]
            result.loss_sum = result.loss_sum + (weight * 0).sqrt()  # its derivative is 0 times infinity
        return result


def run(config: AlignConfig, **disturbances: Any) -> Outcome:
    """Train in this process."""
    return train(DisturbedAlignment(config, **disturbances), config, COMMAND)


def run_until(config: AlignConfig, step: int, **disturbances: Any) -> None:
    """Train in this process and end the run before ``step``."""
    try:
        run(config, stop_before=step, **disturbances)
    except Stopped:
        return
    raise AssertionError(f"the run ended before step {step}")


def launch(ranks: int, config: dict[str, Any], **disturbances: Any) -> subprocess.Popen[bytes]:
    """Start a run in new processes."""
    return start(ranks, __file__, json.dumps({"config": config, "disturbances": disturbances}))


def start(ranks: int, program: str, argument: str) -> subprocess.Popen[bytes]:
    """Start a program in new processes, with torchrun if there are several ranks."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*command, program, argument], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def family(process: int) -> list[int]:
    """A process and all its descendants, parents first."""
    found = [process]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with suppress(OSError):  # the process has just ended
                found += [int(child) for child in task.read_text().split()]
    return found


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """kill -9 the launcher, the ranks and the loader workers. torchrun gives ranks their own process groups."""
    for pid in family(process.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def last_step(folder: Path) -> int:
    """The last step in a run's log; 0 without a log."""
    return max((e["step"] for e in read_log(folder)), default=0) if (folder / LOG_FILE).is_file() else 0


def run_ranks(ranks: int, config: dict[str, Any], **disturbances: Any) -> None:
    """Run to the end in new processes.

    Raises:
        AssertionError: The run failed; the message is its output.
    """
    process = launch(ranks, config, **disturbances)
    output, _ = process.communicate(timeout=400)  # processes start slowly on a busy machine
    assert process.returncode == 0, output.decode()


def weights(folder: Path, step: int, file: str = "model.safetensors") -> dict[str, Tensor]:
    """The tensors in a file of a checkpoint."""
    return load_file(folder / "checkpoints" / f"step-{step:07d}" / file)


def reseal(checkpoint: Path) -> None:
    """Update the checksums of a checkpoint that a test has changed."""
    file = checkpoint / STATE_FILE
    state = {k: v for k, v in json.loads(file.read_text()).items() if k not in (FILES, SEAL)}
    file.write_text(sealed_text(state, files_info(checkpoint.glob("*.safetensors"))))


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are bitwise equal."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def max_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest absolute difference between two sets of tensors."""
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def logged(folder: Path, field: str) -> dict[int, Any]:
    """A field of the log by step. Fails if a step was logged twice."""
    found = [(e["step"], e[field]) for e in read_log(folder) if field in e]
    assert len(dict(found)) == len(found), f"{field} was logged twice for a step"
    return dict(found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    options = json.loads(sys.argv[1])

    def work() -> None:
        run(AlignConfig(**options["config"]), **options["disturbances"])

    sys.exit(exit_code(work))
