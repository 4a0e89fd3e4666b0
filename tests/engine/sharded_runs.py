"""Tiny sharded runs: a causal language model with a frozen tower, in this process or in new processes.

As a program it takes a JSON list of runs, `python sharded_runs.py '[{"config": ..., "events": ...}, ...]'`, and runs
them one after another.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from localign import rng
from localign.data.stream import SampleStream
from localign.engine import BatchPlan, Outcome, StepResult, Task, TrainConfig, train
from localign.engine.checkpoints import sharded as sharded
from localign.engine.distributed import DistributedContext, is_main_process

SAMPLES, VOCABULARY, WIDTH, LENGTH = 40, 19, 5, 6
"""The width is odd and some parameters have one row, so that ranks get unequal parts or no part."""


@dataclass(frozen=True, kw_only=True)
class Events:
    """Simulated events in a run."""

    stop_before: int | None = None
    """Raise :class:`Stopped` before this step, counted from 0."""
    sleep: float = 0.0
    """Seconds added to each step."""
    zero_loss: bool = False
    """Multiply the loss by zero, so that only weight decay changes the weights."""
    poison: int | None = None
    """The step that gets a NaN loss on rank 0."""
    save_frozen: bool = False
    """Save frozen tensors in checkpoints too."""
    die_writing: list[int] | None = None
    """[step, rank]: kill -9 this rank while it writes its part of a checkpoint."""
    die_publishing: int | None = None
    """Step: kill -9 the main rank after all parts of a checkpoint are written and before it is renamed."""
    slow_writing: float = 0.0
    """Seconds added to the writing of each part of a checkpoint."""
    meta_device: bool = False
    """Build the module on the meta device on ranks other than rank 0."""


class Stopped(Exception):
    """Stands for an external event that ends a run."""


class TokenBatch(NamedTuple):
    input_ids: Tensor
    labels: Tensor
    features: Tensor
    positions: Tensor
    indices: Tensor
    bad: tuple[tuple[str, str], ...]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * torch.tanh(self.linear(self.norm(x)))


class TokenModel(nn.Module):
    """Tied embedding and head, one frozen block, a frozen tower, one saved and one unsaved buffer."""

    gain: Tensor
    ramp: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Linear(3, WIDTH).requires_grad_(False)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block(), Block()])
        self.blocks[1].requires_grad_(False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.grad_checkpointing = False
        self.register_buffer("gain", torch.tensor(1.5))
        self.register_buffer("ramp", torch.linspace(0, 1, LENGTH)[:, None], persistent=False)

    def forward(self, input_ids: Tensor, features: Tensor) -> Tensor:
        with torch.no_grad():
            seen = self.tower(features)
        x = self.embedding(input_ids) + seen[:, None] + self.ramp
        for part in (*self.blocks, self.head):
            x = checkpoint(part, x, use_reentrant=False) if self.grad_checkpointing else part(x)
        scaled: Tensor = x * self.gain
        return scaled


def sample(index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels and features of one sample. Every third sample has no label."""
    draw = torch.Generator().manual_seed(rng.key(0, "token sample", index) >> 1)
    ids = torch.randint(0, VOCABULARY, (LENGTH,), generator=draw)
    labels = ids.roll(-1)
    labels[-1] = -100
    labels[: index % 4] = -100
    if index % 3 == 0:
        labels[:] = -100
    return ids, labels, torch.randn(3, generator=draw)


def collate(positions: Sequence[int], indices: Sequence[int]) -> TokenBatch:
    ids, labels, features = (torch.stack(t) for t in zip(*map(sample, indices), strict=True))
    return TokenBatch(ids, labels, features, torch.tensor(positions), torch.tensor(indices), ())


class TokenTask(Task):
    """Next-token prediction with simulated events."""

    def __init__(self, config: TrainConfig, **events: Any) -> None:
        self.config, self.events = config, Events(**events)
        self.seed, self.device = config.seed, torch.device("cpu")
        empty = self.events.meta_device and not is_main_process()
        with torch.device("meta" if empty else "cpu"), rng.seeded_globals(config.seed, "token weights"):
            self.model = TokenModel()

    @property
    def module(self) -> TokenModel:
        return self.model

    def samples(self) -> int:
        return SAMPLES

    def fingerprint(self) -> dict[str, str]:
        return {"data": "tokens"}

    def batches(self, plan: BatchPlan) -> Iterator[TokenBatch]:
        stream = SampleStream(plan.seed, SAMPLES)
        for positions in plan.micro_batches():
            yield collate(positions, [stream(p)[1] for p in positions])

    def step(self, model: nn.Module, batch: TokenBatch) -> StepResult:
        number, within = divmod(int(batch.positions[0]), self.config.batch_size)
        if number == self.events.stop_before:
            raise Stopped
        time.sleep(self.events.sleep)
        total, count = self._loss(model, batch)
        if number == self.events.poison and within == 0:
            total = total * float("nan")
        return StepResult(total * 0 if self.events.zero_loss else total, count)

    def _loss(self, model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        logits = model(batch.input_ids, batch.features).float()
        total = F.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="sum"
        )
        return total, (batch.labels != -100).sum()

    def throughput(self, batch: TokenBatch) -> dict[str, int]:
        return {"tokens": batch.input_ids.numel()}

    @torch.no_grad()
    def validate(self, module: nn.Module, context: DistributedContext) -> dict[str, float]:
        total, count = self._loss(module, collate(range(8), range(100, 108)))
        return {"val_loss": float(total / count)}

    def shard_units(self, module: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(module, TokenModel)
        return list(module.blocks)

    def unsharded(self, module: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(module, TokenModel)
        return [module.tower]

    def checkpointed(self, name: str) -> bool:
        return self.events.save_frozen or not name.startswith(("tower.", "blocks.1."))

    def set_grad_checkpointing(self) -> None:
        self.model.grad_checkpointing = True

    def export(self, module: nn.Module, folder: Path, provenance: dict[str, Any]) -> None:
        assert type(module) is TokenModel, "the gathered module has the class from before sharding"
        assert module.head.weight is module.embedding.weight
        folder.mkdir(exist_ok=True)
        save_file({k: v.clone() for k, v in module.state_dict().items()}, folder / "model.safetensors")
        loss = self.validate(module.eval(), DistributedContext(0, 1, 0, torch.device("cpu")))["val_loss"]
        (folder / "loss.json").write_text(json.dumps(loss))


def token(out: Path, **options: Any) -> TrainConfig:
    """Options of a run whose steps take milliseconds."""
    values: dict[str, Any] = {
        "out": str(out), "steps": 8, "batch_size": 8, "lr": 1e-2, "weight_decay": 0.1, "ema_decay": 0.9, "eps": 1e-5,
        "log_every": 1, "checkpoint_every": 2, "device": "cpu", "sharding": "full", "clip_grad": 0.5,
    }  # fmt: skip
    return TrainConfig(**{**values, **options})


def run(config: TrainConfig, task: type[TokenTask] = TokenTask, **events: Any) -> Outcome:
    """Train in this process, which may be one of several ranks."""
    sharded._Writer = Writer  # type: ignore[misc]
    Writer.events = Events(**events)
    return train(task(config, **events), config, "tokens")


def run_until(config: TrainConfig, step: int, **events: Any) -> None:
    """Train in this process and end the run before ``step``."""
    try:
        run(config, stop_before=step, **events)
    except Stopped:
        return
    raise AssertionError(f"the run ended before step {step}")


class Writer(sharded._Writer):
    """A writer that is slow or dies."""

    events = Events()

    def write_data(self, plan: Any, planner: Any) -> Any:
        time.sleep(self.events.slow_writing)
        if self.events.die_writing == [self._step, self.rank]:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"shard-{self.rank:05d}.safetensors").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write_data(plan, planner)

    def finish(self, metadata: Any, results: Any) -> None:
        if self.events.die_publishing == self._step:
            os.kill(os.getpid(), signal.SIGKILL)
        super().finish(metadata, results)

    @property
    def _step(self) -> int:
        return int(self.folder.name.split(".")[1].removeprefix("step-"))


def part(config: TrainConfig, **events: Any) -> dict[str, Any]:
    """A run in the form that :func:`run_parts` takes."""
    return {"config": asdict(config), "events": events}


def run_parts(parts: list[dict[str, Any]]) -> None:
    """Do runs one after another, on all ranks of the launch."""
    size = os.environ.get("WORLD_SIZE", "1")
    distributed = int(size) > 1
    if distributed:  # one process group for all runs
        dist.init_process_group("gloo")
    for values in parts:
        os.environ["LOCAL_WORLD_SIZE"] = str(values["events"].pop("local_size", size))
        config, events = TrainConfig(**values["config"]), values["events"]
        if "stop_before" in events:
            run_until(config, events.pop("stop_before"), **events)
        else:
            run(config, **events)
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_parts(json.loads(sys.argv[1]))
