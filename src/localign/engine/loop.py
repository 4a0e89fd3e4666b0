"""The one training loop. It knows a Task; nothing about masks, labels or prompts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from localign import rng
from localign.engine import run as runs
from localign.engine.checkpoint import (
    EMA_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    Checkpoints,
    load_module,
    load_optimizer_tensors,
    remove_leftovers,
)
from localign.engine.config import TrainConfig, batch_shares, total_steps, with_warmup_steps
from localign.engine.distributed import World, world
from localign.engine.guards import NonFiniteGuard
from localign.engine.lock import lock
from localign.engine.log import Bar, JsonLines, Log, Sink, Stopwatch, TensorBoard, WandB, say
from localign.engine.optim import build_optimizer, learning_rate
from localign.engine.task import BatchPlan, Task
from localign.engine.totals import Totals


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    folder: Path
    results: dict[str, Any]
    is_main: bool = True
    """Whether this process is the one that writes files and speaks."""


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
            loop.close()


class Loop:
    """State of one run on one rank."""

    def __init__(self, task: Task, config: TrainConfig, command: str, here: World) -> None:
        self.per_rank, self.micro_batch = batch_shares(config, here.size)
        config = with_warmup_steps(config, task.samples())
        self.task, self.config, self.command, self.world = task, config, command, here
        self.folder = Path(config.out)
        self.steps = total_steps(config, task.samples())
        self.log = Log([])
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.keep_checkpoints)
        self.guard = NonFiniteGuard(self.folder, here.rank)
        self.step = 0
        self.digest = 0
        self.bad: dict[str, str] = {}
        self.named: set[str] = set()  # the bad images that are in the log
        self.seconds = 0.0
        self.best: dict[str, Any] | None = None
        self.validation: dict[str, Any] = {}  # the latest: step and metrics
        self.saved_at: int | None = None
        self._lock: TextIO | None = None

    def close(self) -> None:
        """Let go of the log and the folder."""
        self.log.close()
        if self._lock is not None:
            self._lock.close()

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
        # Dropout and the like draw from torch's generator; it is keyed by the step, and the caller's is kept.
        cuda = [self.world.device] if self.world.device.type == "cuda" else []
        with torch.random.fork_rng(cuda):
            self._train()
        return self._finish()

    def _train(self) -> None:
        config, clock = self.config, Stopwatch()
        batches = self.task.batches(self._plan(start=self.step))
        totals = Totals(self.world.device)
        while self.step < self.steps:
            rate = learning_rate(self.step, self.steps, config)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed(rng.key(config.seed, "step", self.step, self.world.rank) >> 1)
            taken = self._step(batches, totals, clock)
            self.step += 1
            if self._bar is not None:
                self._bar.advance()
            if self.step % config.log_every == 0 or self.step == self.steps:
                self._log_step(totals, clock, rate, taken)
            # Neither validation nor saving is training time; the last of both comes with the results.
            spent = self.seconds + clock.elapsed
            with clock.paused():
                if config.val_every and self.step % config.val_every == 0 and self.step < self.steps:
                    self._validate(spent)
                if self.step % config.checkpoint_every == 0 and self.step < self.steps:
                    self._save(spent)

    def _step(self, batches: Iterator[Any], totals: Totals, clock: Stopwatch) -> Any:
        """One optimizer step over this rank's micro-batches; returns the last of them."""
        module, count = self.task.module, self.per_rank // self.micro_batch
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(2, device=self.world.device)
        seen: list[Any] = []
        metrics: list[dict[str, tuple[Tensor, Tensor]]] = []
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
            metrics.append(result.metrics)
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
            for values in metrics:
                totals.add(values)
        else:
            totals.steps_seen += 1
            number = self.step + 1  # as the log counts
            if self.world.is_main:
                say(f"step {number}: loss {float(loss)}, gradient norm {float(grad_norm)}; skipped")
            self.guard.skip(number, seen, float(loss), float(grad_norm))
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

    def _global_digest(self) -> int:
        """The digest over the samples of all ranks."""
        return sum(self.world.gather(self.digest)) % (1 << 64)

    def _log_step(self, totals: Totals, clock: Stopwatch, rate: float, batch: Any) -> None:
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
    def _validate(self, seconds: float) -> dict[str, float]:
        """Held-out metrics; the lowest ``val_loss`` so far marks the best checkpoint."""
        module = self.ema.module if self.ema is not None else self.task.module
        module.eval()
        with self._autocast():
            metrics = self.task.validate(module, self.world)
        module.train()
        self.validation = {"step": self.step, "metrics": metrics}
        if metrics:
            self.log.write(self.step, **metrics)
            value = metrics.get("val_loss", math.inf)
            if math.isfinite(value) and (self.best is None or value < self.best["val_loss"]):
                self.best = {"step": self.step, "val_loss": value}
                self._save(seconds)
                self._mark_best()
        return metrics

    def _mark_best(self) -> None:
        if self.world.is_main and self.best is not None and self.checkpoints.best() != self.best:
            self.checkpoints.mark_best(**self.best)

    # -- folders and checkpoints -----------------------------------------------------------------------

    def _open_folder(self) -> int | None:
        problem: Exception | None = None
        resumed_at: int | None = None
        # One rank looks and writes; all act on what it found, a refusal included.
        if self.world.is_main:
            try:
                resumed_at = runs.choose_start(self.folder, self.config.resume, self.checkpoints.steps())
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock = lock(self.folder)
                if self.config.resume != "never" and (self.folder / runs.CONFIG_FILE).is_file():
                    runs.check_same_config(self.folder, self.command, self.config)
                else:
                    runs.save_config(self.folder, self.command, self.config)
                remove_leftovers(self.folder, self.checkpoints.folder, self.guard.folder)
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
            sinks.append(TensorBoard(self.folder, resumed_at))
        if self.config.wandb:
            sinks.append(WandB(self.folder, self.config.wandb, runs.plain(self.config)))
        self.log = Log(sinks)

    def _gather_bad(self) -> dict[str, str]:
        """The unreadable images that any rank has met; those not in the log yet are named there."""
        bad = {name: reason for part in self.world.gather(self.bad) for name, reason in part.items()}
        for name in (n for n in bad if n not in self.named):
            self.log.write(self.step, skipped_image=name, reason=bad[name])
        self.named |= bad.keys()
        return bad

    def _save(self, seconds: float) -> None:
        if self.saved_at == self.step:
            return  # writing it again would be a moment without it
        bad, digest = self._gather_bad(), self._global_digest()
        if self.world.is_main:
            state = {
                "config": runs.plain(self.config),
                "fingerprint": self.task.fingerprint(),
                "task": self.task.state_dict(),
                "guard": self.guard.state_dict(),
                "digest": f"{digest:016x}",
                "bad_images": bad,
                "seconds": seconds,
                "best": self.best,
                "validation": self.validation,
            }
            ema = self.ema.module if self.ema is not None else None
            self.checkpoints.save(self.step, self.task.module, self.optimizer, state, ema)
        self.saved_at = self.step
        self.world.barrier()

    def _restore(self, step: int) -> None:
        loaded = self.checkpoints.load(step)
        source = self.checkpoints.path(step)
        runs.check_same_fingerprint(self.folder, loaded.state["fingerprint"], self.task.fingerprint())
        load_module(self.task.module, loaded.model, source / MODEL_FILE)
        load_optimizer_tensors(self.task.module, self.optimizer, loaded.optimizer, source / OPTIMIZER_FILE)
        self.task.load_state_dict(loaded.state["task"])
        self.guard.load_state_dict(loaded.state["guard"])
        if self.ema is not None:
            load_module(self.ema.module, loaded.ema or {}, source / EMA_FILE)
            self.ema.n_averaged.fill_(step - len(self.guard.skipped))
        self.step = self.saved_at = loaded.step
        # The whole digest is on one rank; the sum over ranks is what counts.
        self.digest = int(loaded.state["digest"], 16) if self.world.is_main else 0
        self.bad = dict(loaded.state["bad_images"])
        self.named = set(self.bad)
        self.seconds = float(loaded.state["seconds"])
        self.best, self.validation = loaded.state["best"], loaded.state["validation"]
        self._mark_best()  # a kill may have come between saving and marking

    def _finish(self) -> Outcome:
        # A run that was killed after its last checkpoint has validated already, and logged it.
        done = self.validation.get("step") == self.step
        metrics = self.validation["metrics"] if done else self._validate(self.seconds)
        self._save(self.seconds)
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
            "skipped_images": {
                "count": len(self.bad),
                "share": len(self.bad) / self.task.samples(),
                "images": self.bad,
            },
            "skipped_steps": self.guard.skipped,
            "final": metrics,
            "best": self.best,
            **self.task.summary(),
        }  # fmt: skip
        if self.world.is_main:
            module = self.ema.module if self.ema is not None else self.task.module
            facts = {
                "command": self.command,
                "run": runs.plain(self.config),
                "steps": self.step,
                **runs.provenance(),
            }
            self.task.export(module, self.folder / "export", facts)
            runs.write_results(self.folder, results)
        self.world.barrier()
        return Outcome(self.folder, results, self.world.is_main)


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
