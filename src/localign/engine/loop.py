"""The one training loop. It knows a Task; nothing about masks, labels or prompts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from localign import rng
from localign.engine import run as runs
from localign.engine.checkpoint import Checkpoints, load_module, load_optimizer_tensors
from localign.engine.config import TrainConfig
from localign.engine.distributed import World, world
from localign.engine.guards import NonFiniteGuard
from localign.engine.log import Bar, JsonLines, Log, Sink, Stopwatch, TensorBoard, WandB, say
from localign.engine.optim import build_optimizer, learning_rate
from localign.engine.task import BatchPlan, Task
from localign.errors import UserError

_INT64 = 1 << 63


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    folder: Path
    results: dict[str, Any]


def train(task: Task, config: TrainConfig, command: str) -> Outcome:
    """Train a task to its last step, from the start or from a checkpoint, and export the result.

    Args:
        task: The method, on the CPU, freshly built.
        config: The loop's options; the task's own are part of the same object and are saved with it.
        command: The localign command, named in the run folder.

    Raises:
        UserError: Bad options or data, or a run folder that does not fit.
        RunFailure: Training does not recover from non-finite losses, or a loader worker dies.
    """
    with world(config.device) as here:
        loop = Loop(task, config, command, here)
        try:
            return loop.run()
        finally:
            loop.log.close()


class Loop:
    """State of one run on one rank."""

    def __init__(self, task: Task, config: TrainConfig, command: str, here: World) -> None:
        self.task, self.config, self.command, self.world = task, config, command, here
        self.folder = Path(config.out)
        self.steps = total_steps(config, task.samples())
        self.per_rank, self.micro_batch = batch_shares(config, here.size)
        self.log = Log([])
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.keep_checkpoints)
        self.guard = NonFiniteGuard(self.folder, here.rank)
        self.step = 0
        self.digest = 0
        self.bad: dict[str, str] = {}
        self.seconds = 0.0
        self.best = math.inf

    # -- the run, top to bottom ------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Everything from opening the folder to the export."""
        task, config = self.task, self.config
        resumed_at = self._open_folder()
        task.to(self.world.device)
        self.optimizer = build_optimizer(task.module, config)
        self.ema = _average(task.module, config.ema)
        if resumed_at is not None:
            self._restore(resumed_at)
        else:
            task.start(self.world, self._plan(start=0))
        if config.grad_checkpointing:
            task.set_grad_checkpointing()
        if config.compile:
            task.compile()
        self.model = self.world.replicate(task.module)
        self._open_log(resumed_at)
        self._train()
        return self._finish()

    def _train(self) -> None:
        config, clock = self.config, Stopwatch()
        batches = self.task.batches(self._plan(start=self.step))
        totals = _Totals(self.world.device)
        while self.step < self.steps:
            rate = learning_rate(self.step, self.steps, config)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            taken = self._step(batches, totals, clock)
            self.step += 1
            if self._bar is not None:
                self._bar.advance()
            if self.step % config.log_every == 0 or self.step == self.steps:
                self._log_step(totals, clock, rate, taken)
            # Neither validation nor saving is training time; the last of both comes with the results.
            with clock.paused():
                if config.val_every and self.step % config.val_every == 0 and self.step < self.steps:
                    self._validate()
                if self.step % config.checkpoint_every == 0 and self.step < self.steps:
                    self._save(self.seconds + clock.elapsed)

    def _step(self, batches: Iterator[Any], totals: _Totals, clock: Stopwatch) -> Any:
        """One optimizer step over this rank's micro-batches; returns the last of them."""
        module, count = self.task.module, self.per_rank // self.micro_batch
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(2, device=self.world.device)
        seen: list[Any] = []
        for number in range(count):
            with clock.waiting():
                batch = to_device(next(batches), self.world.device)
            self._note(batch)
            seen.append(batch)
            with self.world.without_sync(self.model, skip=number < count - 1):
                with self._autocast():
                    result = self.task.step(self.model, batch)
                # Gradients of sums: dividing by what all ranks and micro-batches went over comes last.
                result.loss_sum.backward()
            sums += torch.stack([result.loss_sum.detach(), result.weight.detach()]).to(sums)
            totals.add(result.metrics)
        sums = self.world.sum(sums)
        grad_norm = self._scale_and_clip(module, sums[1])
        loss = sums[0] / sums[1].clamp(min=1)
        # Every rank has the same sums and, after their exchange, the same gradients: so they all agree.
        if bool(torch.isfinite(loss) & torch.isfinite(grad_norm)):
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update_parameters(module)
            self.guard.passed()
            totals.add_step(sums, grad_norm)
        else:
            totals.steps_seen += 1
            say(f"step {self.step}: loss {float(loss)}, gradient norm {float(grad_norm)}; skipped")
            self.guard.skip(self.step, seen, float(loss), float(grad_norm))
        return seen[-1]

    def _scale_and_clip(self, module: nn.Module, weight: Tensor) -> Tensor:
        """Turn gradients of the loss's sum into those of its mean, and bound their norm; returns the norm."""
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        # DDP has averaged over ranks what is to be summed.
        scale = self.world.size / weight.clamp(min=1)
        norm = torch.nn.utils.get_total_norm(gradients) * scale
        if self.config.clip_grad is not None:
            scale = scale * (self.config.clip_grad / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, scale)
        return norm

    # -- around a step ---------------------------------------------------------------------------------

    def _autocast(self) -> AbstractContextManager[Any]:
        device = self.world.device.type
        use = self.config.precision == "bf16" or (self.config.precision == "auto" and device == "cuda")
        return torch.autocast(device, dtype=torch.bfloat16, enabled=use)

    def _plan(self, start: int) -> BatchPlan:
        return BatchPlan(
            seed=self.config.seed,
            global_batch=self.config.batch_size,
            micro_batch=self.micro_batch,
            rank=self.world.rank,
            world_size=self.world.size,
            workers=self.config.workers,
            start_step=start,
            end_step=self.steps,
            pin_memory=self.world.device.type == "cuda",
        )

    def _note(self, batch: Any) -> None:
        self.digest = (self.digest + sample_digest(batch)) % (1 << 64)
        for name, reason in batch.bad:
            if name not in self.bad:
                self.bad[name] = reason
                say(f"skipped unreadable image {name}: {reason}")
                self.log.write(self.step, skipped_image=name, reason=reason)

    def _global_digest(self) -> int:
        """The digest over the samples of all ranks."""
        return sum(self.world.gather(self.digest)) % (1 << 64)

    def _log_step(self, totals: _Totals, clock: Stopwatch, rate: float, batch: Any) -> None:
        elapsed = max(clock.elapsed, 1e-9)
        self.seconds += elapsed
        entry = totals.means(self.world)
        entry |= {
            "lr": rate,
            "images_per_second": totals.steps_seen * self.config.batch_size / elapsed,
            "data_wait": clock.waited / elapsed,
            "samples": f"{self._global_digest():016x}",
        }
        if self.world.is_main:
            entry |= self.task.monitor(batch)
        self.log.write(self.step, **entry)
        self.task.check_skipped(self._gather_bad())
        totals.reset()
        clock.restart()

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Held-out metrics; the lowest ``val_loss`` so far marks the best checkpoint."""
        module = self.ema.module if self.ema is not None else self.task.module
        module.eval()
        with self._autocast():
            metrics = self.task.validate(module, self.world)
        module.train()
        if metrics:
            self.log.write(self.step, **metrics)
            value = metrics.get("val_loss", math.inf)
            if value < self.best and math.isfinite(value):
                self.best = value
                self._save()
                if self.world.is_main:
                    self.checkpoints.mark_best(self.step, value)
        return metrics

    # -- folders and checkpoints -----------------------------------------------------------------------

    def _open_folder(self) -> int | None:
        problem: Exception | None = None
        resumed_at: int | None = None
        # One rank looks and writes; all act on what it found, a refusal included.
        if self.world.is_main:
            try:
                resumed_at = runs.choose_start(self.folder, self.config.resume, self.checkpoints.steps())
                if self.config.resume != "no" and (self.folder / runs.CONFIG_FILE).is_file():
                    runs.check_same_config(self.folder, self.command, self.config)
                else:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    runs.save_config(self.folder, self.command, self.config)
                self.checkpoints.remove_leftovers()
            except Exception as error:
                problem = error
        problem, resumed_at = self.world.gather((problem, resumed_at))[0]
        if problem is not None:
            raise problem
        return resumed_at

    def _open_log(self, resumed_at: int | None) -> None:
        self._bar: Bar | None = None
        if not self.world.is_main:
            return
        self._bar = Bar(self.command, self.steps, self.step)
        sinks: list[Sink] = [JsonLines(self.folder, resumed_at), self._bar]
        if self.config.tensorboard:
            sinks.append(TensorBoard(self.folder))
        if self.config.wandb:
            sinks.append(WandB(self.folder, self.config.wandb, runs.plain(self.config)))
        self.log = Log(sinks)

    def _gather_bad(self) -> dict[str, str]:
        """The unreadable images that any rank has met."""
        return {name: reason for part in self.world.gather(self.bad) for name, reason in part.items()}

    def _save(self, seconds: float | None = None) -> None:
        bad, digest = self._gather_bad(), self._global_digest()
        if self.world.is_main:
            state = {
                "config": runs.plain(self.config),
                "fingerprint": self.task.fingerprint(),
                "task": self.task.state_dict(),
                "guard": self.guard.state_dict(),
                "digest": f"{digest:016x}",
                "bad_images": bad,
                "seconds": self.seconds if seconds is None else seconds,
                "best": self.best if math.isfinite(self.best) else None,
            }
            ema = self.ema.module if self.ema is not None else None
            self.checkpoints.save(self.step, self.task.module, self.optimizer, state, ema)
        self.world.barrier()

    def _restore(self, step: int) -> None:
        loaded = self.checkpoints.load(step)
        source = self.checkpoints.path(step)
        runs.check_same_fingerprint(self.folder, loaded.state["fingerprint"], self.task.fingerprint())
        load_module(self.task.module, loaded.model, source)
        load_optimizer_tensors(self.task.module, self.optimizer, loaded.optimizer, source)
        if self.ema is not None and loaded.ema is not None:
            load_module(self.ema.module, loaded.ema, source)
            self.ema.n_averaged.fill_(max(1, step))
        self.task.load_state_dict(loaded.state["task"])
        self.guard.load_state_dict(loaded.state["guard"])
        self.step = loaded.step
        # The whole digest is on one rank; the sum over ranks is what counts.
        self.digest = int(loaded.state["digest"], 16) if self.world.is_main else 0
        self.bad = dict(loaded.state["bad_images"])
        self.seconds = float(loaded.state["seconds"])
        self.best = loaded.state["best"] if loaded.state["best"] is not None else math.inf

    def _finish(self) -> Outcome:
        metrics = self._validate()
        self._save()
        self.bad = self._gather_bad()
        results = {
            "command": self.command,
            "config": runs.plain(self.config),
            "versions": runs.provenance(),
            "steps": self.step,
            "images": self.step * self.config.batch_size,
            "seconds": round(self.seconds, 3),
            "images_per_second": self.step * self.config.batch_size / self.seconds if self.seconds else None,
            "world_size": self.world.size,
            "samples_digest": f"{self._global_digest():016x}",
            "skipped_images": {"count": len(self.bad), "share": len(self.bad) / self.task.samples(), "images": self.bad},
            "skipped_steps": self.guard.skipped,
            "final": metrics,
            "best": self.checkpoints.best() if self.world.is_main else None,
            **self.task.summary(),
        }  # fmt: skip
        if self.world.is_main:
            module = self.ema.module if self.ema is not None else self.task.module
            facts = {"command": self.command, "run": runs.plain(self.config), "steps": self.step, **runs.provenance()}
            self.task.export(module, self.folder / "export", facts)
            runs.write_results(self.folder, results)
        self.world.barrier()
        return Outcome(self.folder, results)


class _Totals:
    """Sums since the last log line, kept on the device so that a step does not wait for the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        self.steps_seen = 0
        self._loss = torch.zeros(2, device=self.device)
        self._grad_norm = torch.zeros((), device=self.device)
        self._grad_steps = 0
        self._metrics: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, tuple[Tensor, Tensor]]) -> None:
        for name, (total, count) in metrics.items():
            pair = torch.stack([total.float(), count.float()]).to(self.device)
            self._metrics[name] = self._metrics.get(name, torch.zeros_like(pair)) + pair

    def add_step(self, sums: Tensor, grad_norm: Tensor) -> None:
        self.steps_seen += 1
        self._grad_steps += 1
        self._loss += sums
        self._grad_norm += grad_norm

    def means(self, here: World) -> dict[str, Any]:
        """Means over steps, ranks and micro-batches."""
        values: dict[str, Any] = {}
        if self._grad_steps:
            values["loss"] = float(self._loss[0] / self._loss[1].clamp(min=1))
            values["grad_norm"] = float(self._grad_norm / self._grad_steps)
        for name, pair in sorted(self._metrics.items()):
            total, count = here.sum(pair).tolist()
            values[name] = total / count if count else None
        return values


def total_steps(config: TrainConfig, samples: int) -> int:
    """Optimizer steps of a run.

    Args:
        config: Has steps or epochs; one epoch without either.
        samples: Training images.
    """
    if config.steps is not None:
        return config.steps
    return max(1, round((config.epochs or 1.0) * samples / config.batch_size))


def batch_shares(config: TrainConfig, ranks: int) -> tuple[int, int]:
    """Images per rank and step, and per forward pass.

    Raises:
        UserError: The batch does not divide.
    """
    per_rank, rest = divmod(config.batch_size, ranks)
    micro = config.micro_batch or per_rank
    if rest or not per_rank or per_rank % micro:
        raise UserError(
            f"batch size {config.batch_size} does not divide into {ranks} ranks times micro-batches of {micro}"
        )
    return per_rank, micro


def sample_digest(batch: Any) -> int:
    """A number for a set of (position, image index) pairs; the sum over sets is that of their union."""
    pairs = rng.mix_pairs(batch.positions, batch.indices)
    return int(pairs.sum()) % (1 << 64)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with its images on the device; positions and indices stay with the host, which uses them."""
    return batch._replace(images=batch.images.to(device, non_blocking=True))


def _average(module: nn.Module, decay: float | None) -> AveragedModel | None:
    if decay is None:
        return None
    return AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=False)


def with_defaults(config: TrainConfig, **values: Any) -> TrainConfig:
    """The config with values filled in where it has None."""
    missing = {k: v for k, v in values.items() if getattr(config, k) is None}
    return replace(config, **missing)
