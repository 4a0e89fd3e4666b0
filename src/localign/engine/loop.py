"""The one training loop. It knows a Task; nothing about masks, labels or prompts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localign import rng
from localign.engine import run_folder
from localign.engine.batch import sample_digest, to_device
from localign.engine.checkpoints.data_files import check_same_data, save_data_files
from localign.engine.checkpoints.replicated import Checkpoints
from localign.engine.checkpoints.sharded import ShardedCheckpoints
from localign.engine.checkpoints.state import NEEDED_FIELDS, LastValidation, RunState
from localign.engine.distributed import DistributedContext, distributed_context
from localign.engine.hardware.cpu import fast_float32_matmul, keep_freed_memory
from localign.engine.hardware.memory import check_measurable
from localign.engine.hardware.microbatch import MicroBatchFinder
from localign.engine.hardware.profiling import profiled
from localign.engine.log import Log, Stopwatch, say
from localign.engine.metrics import Totals
from localign.engine.nonfinite import NonFiniteGuard
from localign.engine.optim.build import (
    Average,
    build_optimizer,
    decayed_names,
    learning_rate,
    scale_and_clip,
    set_rates,
)
from localign.engine.progress import Bar
from localign.engine.run_folder import Outcome, open_folder, open_log
from localign.engine.schedule import batch_shares, computes_in_bf16, total_steps, with_warmup_steps
from localign.engine.sharding import gather_full, meta_copy, reshard, shard_task
from localign.engine.task import BatchPlan, Task, batch_plan
from localign.engine.unreadable import UnreadableImages
from localign.engine.verdict import Reading, Verdict, Verdicts
from localign.errors import RunFailure, RunStopped, UserError
from localign.files.disk import writing
from localign.files.output import OutputFolder
from localign.options.train import TrainConfig
from localign.results import BestCheckpoint, TrainingResults
from localign.signals import StopRequest, stop_requests


def train(task: Task, config: TrainConfig, command: str) -> Outcome:
    """Train a task to its last step, from the start or from a checkpoint, and export the result.

    Args:
        task: Newly built, on the CPU.
        config: The options of the loop and of the task. It is saved in the run folder.
        command: The name of the localign command, saved with the config.

    Raises:
        UserError: Options or data are bad, or the run folder does not fit.
        RunFailure: Losses stay non-finite, a loader worker or another rank died, or a file cannot be written.
        RunStopped: SIGTERM or SIGUSR1 was received. The last step is in a checkpoint.
    """
    sharded = config.sharding != "none"
    with stop_requests() as stop, distributed_context(config.device, sharded, config.timeout) as context:
        loop = Loop(task, config, command, context, stop)
        try:
            with keep_freed_memory(context.device), fast_float32_matmul(context.device):
                return loop.run()
        finally:
            loop.close()


class Loop:
    """One rank's part of a run."""

    def __init__(
        self, task: Task, config: TrainConfig, command: str, context: DistributedContext, stop: StopRequest
    ) -> None:
        self.per_rank, self.micro_batch = batch_shares(config, context.size)
        config = with_warmup_steps(config, task.samples())
        self.task, self.config, self.command, self.context = task, config, command, context
        check_measurable(config, context.device)
        task.micro_batch = self.micro_batch if isinstance(config.micro_batch, int) else None
        self.in_bf16 = computes_in_bf16(config, context.device.type)
        self._autocast = partial(torch.autocast, context.device.type, torch.bfloat16, self.in_bf16)
        self.stop, self.stopping = stop, False  # a signal to this rank; whether all ranks have agreed to stop
        self.folder = Path(config.out)
        self.steps = total_steps(config, task.samples())
        self.log = Log([])
        self._bar: Bar | None = None
        self.mesh = context.mesh(per_node=config.sharding == "hybrid") if config.sharding != "none" else None
        if self.mesh is not None:
            task.shard_units(task.module)  # raises before any file is written if the task cannot be sharded
        self.checkpoints = self._store()
        self.guard = NonFiniteGuard(self.folder, context.rank)
        self.totals = Totals(context.device)
        self.step = self.digest = 0
        self.unreadable = UnreadableImages(context)
        self.seconds = 0.0
        self.best: BestCheckpoint | None = None
        self.validation: LastValidation = {}
        self.saved_at: int | None = None
        self._output: OutputFolder | None = None

    def close(self) -> None:
        """Finish a checkpoint that is being written, and release the log and the folder."""
        with suppress(RunFailure):
            self.checkpoints.wait()
        with suppress(OSError):  # reported before
            self.log.close()
        if self._output is not None:
            self._output.close()

    def run(self) -> Outcome:
        """Run from opening the folder to the export."""
        task, config = self.task, self.config
        resumed_at = self._open_folder()
        self.ema = Average(task.module, config.ema_decay) if config.ema_decay is not None else None
        decayed = decayed_names(task.module)  # before parameters are sharded
        if self.mesh is not None:
            self._export_copy = meta_copy(task.module) if self.context.is_main else None
            modules = [task.module, *([self.ema.module] if self.ema is not None else [])]
            shard_task(task, modules, self.mesh, self.in_bf16, config, self.context)
        task.to(self.context.device)
        if self.ema is not None:
            self.ema.to(self.context.device)
        self.optimizer = build_optimizer(task.module, config, decayed, task.lr_factors())
        self.verdicts = Verdicts(
            task.module, self.optimizer, self.ema, self.totals, self.guard, self.context, self._writing
        )
        if resumed_at is not None:
            self._restore(resumed_at)
        else:
            save_data_files(self.folder, task, self.context)
            task.on_train_start(self.context, self._plan(start=0))
        if config.grad_checkpointing:
            task.set_grad_checkpointing()
        replicas = self.mesh is None
        self.model = self.context.wrap_ddp(task.module, config.ddp_bucket_mb) if replicas else task.module
        if self.context.is_main:
            with self._writing():
                validated = self.validation.get("step") == resumed_at
                self.log, self._bar = open_log(self.command, config, self.steps, resumed_at, validated)
        if config.micro_batch == "auto":
            finder = MicroBatchFinder(
                task, self.model, self.context, self.per_rank, self._autocast, not replicas
            )
            self.micro_batch = task.micro_batch = finder.find()
            with self.context.raise_on_all_ranks(), self._writing():
                self.log.write(self.step, micro_batch=self.micro_batch)
        if config.compile:
            task.compile()
        # Dropout draws from torch's generator: each step seeds it, and the caller's state is restored.
        cuda = [self.context.device] if self.context.device.type == "cuda" else []
        profiling = profiled(self.folder, config.profile, self.steps - self.step, self.context, self._writing)
        with torch.random.fork_rng(cuda), profiling as self._profile_step:
            self._train()
        return self._finish()

    def _train(self) -> None:
        config = self.config
        self.stopping = self.context.any_rank(self.stop.made)
        self._validate_if_due(self.seconds)  # a stopped run saved without validating
        clock = Stopwatch()
        batches = self.task.batches(self._plan(start=self.step))
        while self.step < self.steps and not self.stopping:
            rate = learning_rate(self.step, self.steps, config)
            set_rates(self.optimizer, rate)
            torch.manual_seed(rng.key(config.seed, "step", self.step, self.context.rank) >> 1)
            taken = self._step(batches, clock)
            self.step += 1
            self._profile_step()
            if self._bar is not None:
                self._bar.advance()
            logs = self.step % config.log_every == 0 or self.step == self.steps
            every = (config.val_every or self.steps, config.checkpoint_every)
            if logs or self.stopping or any(self.step % number == 0 for number in every):
                self.verdicts.settle()
                self.stopping |= self.verdicts.stops
            if logs:
                self._log_step(clock, rate, taken)
            # Validation and saving are not training time. _finish does both after the last step.
            spent = self.seconds + clock.elapsed
            with clock.paused():
                if self.stopping:
                    self._save(spent)
                    break
                self._validate_if_due(spent)
                if self.step % config.checkpoint_every == 0 and self.step < self.steps:
                    self._save(spent)
        if self.stopping:
            self._stop()

    def _stop(self) -> None:
        """End the run after a signal. Its last step, if any, is in a checkpoint."""
        self.checkpoints.wait()
        by = next(filter(None, self.context.all_gather_object(self.stop.by)))
        line = f"{by}: stopped after step {self.step} of {self.steps}; --resume auto continues {self.folder}"
        if self.context.is_main:
            say(line)
        raise RunStopped(line)

    def _validate_if_due(self, spent: float) -> None:
        every = self.config.val_every
        due = every and 0 < self.step < self.steps and self.step % every == 0 and not self.stopping
        if due and self.validation.get("step") != self.step:
            self._validate(spent)

    def _step(self, batches: Iterator[Any], clock: Stopwatch) -> Any:
        """Take one optimizer step over this rank's micro-batches. Returns the last micro-batch."""
        module, count = self.task.module, self.per_rank // self.micro_batch
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(3, device=self.context.device)  # losses, weights, stop requests
        seen: list[Any] = []
        metrics: list[dict[str, tuple[Tensor, Tensor]]] = []
        for number in range(count):
            with clock.waiting():
                batch = to_device(next(batches), self.context.device)
            self.digest = (self.digest + sample_digest(batch)) % (1 << 64)
            self.unreadable.add(batch.bad)
            self.totals.count(self.task.throughput(batch))
            seen.append(batch)
            with self.context.without_sync(self.model, skip=number < count - 1):
                with self._autocast():
                    result = self.task.step(self.model, batch)
                # The gradient of a sum; it is divided by the weight of all ranks and micro-batches below.
                torch.autograd.backward(result.loss_sum)
            sums[:2] += torch.stack([result.loss_sum.detach(), result.weight.detach()]).to(sums)
            metrics.append(result.metrics)
        sums[2] = float(self.stop.made)
        sums = self.context.all_reduce(sums)
        # DDP and FSDP average gradients over ranks; we need their sum.
        scale = self.context.size / sums[1].clamp(min=1)
        grad_norm = scale_and_clip(module, scale, self.config.clip_grad)
        loss = sums[0] / sums[1].clamp(min=1)
        reading = Reading(torch.stack([loss, grad_norm, sums[2]]))
        verdict = Verdict(self.step + 1, seen, metrics, sums[:2], grad_norm, reading)
        self.verdicts.take(verdict)
        # With several ranks only the exchanged request counts; a single rank can also react to a later signal.
        self.stopping |= self.verdicts.stops or (self.context.size == 1 and self.stop.made)
        return seen[-1]

    # -- around a step ---------------------------------------------------------------------------------

    def _plan(self, start: int) -> BatchPlan:
        return batch_plan(self.config, self.context, self.micro_batch, start, self.steps)

    def _global_digest(self) -> int:
        """The digest of the samples of all ranks."""
        return sum(self.context.all_gather_object(self.digest)) % (1 << 64)

    def _log_step(self, clock: Stopwatch, rate: float, batch: Any) -> None:
        totals = self.totals
        elapsed = max(clock.elapsed, 1e-9)
        self.seconds += elapsed
        entry = totals.means(self.context)
        entry |= {
            "lr": rate,
            "images_per_second": totals.steps_seen * self.config.batch_size / elapsed,
            **totals.rates(self.context, elapsed),
            "data_wait": clock.waited / elapsed,
            "samples": f"{self._global_digest():016x}",
        }
        if self.context.is_main:
            entry |= self.task.monitor(batch)
        with self.context.raise_on_all_ranks(), self._writing():
            self.log.write(self.step, **entry)
        self.task.check_skipped(self._gather_bad())
        totals.reset()
        clock.restart()

    @torch.no_grad()
    def _validate(self, seconds: float) -> dict[str, float]:
        """Validate, log the metrics, and save a checkpoint if ``val_loss`` is the lowest so far."""
        module = self.ema.module if self.ema is not None else self.task.module
        module.eval()
        with self._autocast():
            metrics = self.task.validate(module, self.context)
        if self.mesh is not None:
            reshard(module)
        module.train()
        self.validation = {"step": self.step, "metrics": metrics}
        if metrics:
            with self.context.raise_on_all_ranks(), self._writing():
                self.log.write(self.step, **metrics)
            value = metrics.get("val_loss", math.inf)
            if math.isfinite(value) and (self.best is None or value < self.best["val_loss"]):
                self.best = {"step": self.step, "val_loss": value}
                self._save(seconds)
        return metrics

    # -- folders and checkpoints -----------------------------------------------------------------------

    def _store(self) -> Checkpoints:
        config, included = self.config, self.task.checkpointed
        for name, parameter in self.task.module.named_parameters():
            assert included(name) or not parameter.requires_grad, f"{name} is trained, but in no checkpoint"
        folder = self.folder / "checkpoints"
        if self.mesh is not None:
            return ShardedCheckpoints(folder, config.keep_checkpoints, included, self.context)
        return Checkpoints(folder, config.keep_checkpoints, included)

    def _open_folder(self) -> int | None:
        resumed_at: int | None = None
        # Only the main rank reads and writes the folder. An error there ends all ranks.
        with self.context.raise_on_all_ranks():
            if self.context.is_main:
                resumed_at, self._output = open_folder(
                    self.folder, self.command, self.config, self.checkpoints, self.guard.folder
                )
        return self.context.all_gather_object(resumed_at)[0]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn write errors inside the block into a RunFailure that says how to resume."""
        with writing(self.folder, self.checkpoints.resume_hint):
            run_folder.check_exists(self.folder)
            yield

    def _gather_bad(self) -> dict[str, str]:
        """The unreadable images of all ranks. New ones are logged."""
        images, new = self.unreadable.gather()
        for name, reason in new.items():
            with self._writing():
                self.log.write(self.step, skipped_image=name, reason=reason)
        return images

    def _save(self, seconds: float) -> None:
        if self.saved_at == self.step:
            return  # replacing it would leave a moment without a checkpoint
        bad, digest = self._gather_bad(), self._global_digest()
        ema = self.ema.module if self.ema is not None else None
        state: RunState = {
            "config": run_folder.to_dict(self.config),
            "fingerprint": self.task.fingerprint() if self.context.is_main else {},
            "task": self.task.state_dict() if self.context.is_main else {},
            "guard": self.guard.state_dict(),
            "digest": f"{digest:016x}",
            "bad_images": bad,
            "seconds": seconds,
            "best": self.best,
            "validation": self.validation,
        }
        with self.context.raise_on_all_ranks(), self._writing():
            if self.context.is_main or self.mesh is not None:
                self.checkpoints.save(self.step, self.task.module, self.optimizer, state, ema)
        self.saved_at = self.step

    def _restore(self, step: int) -> None:
        state = self.checkpoints.state(step)
        if missing := sorted(NEEDED_FIELDS - state.keys()):
            raise UserError(f"checkpoint {self.checkpoints.path(step)} lacks: {', '.join(missing)}")
        check_same_data(self.folder, state["fingerprint"], self.task, self.config, self.context)
        ema = self.ema.module if self.ema is not None else None
        self.checkpoints.restore(step, self.task.module, self.optimizer, ema)
        self.task.load_state_dict(state["task"])
        self.guard.load_state_dict(state["guard"])
        if self.ema is not None:
            self.ema.updates = step - len(self.guard.skipped)
        self.step = self.saved_at = step
        # The digest of all ranks so far. Only their sum is used, so one rank takes it.
        self.digest = int(state["digest"], 16) if self.context.is_main else 0
        self.unreadable = UnreadableImages(self.context, state["bad_images"])
        self.seconds = float(state["seconds"])
        self.best, self.validation = state["best"], state["validation"]
        # A kill between saving and marking, or a damaged newer checkpoint, leaves a wrong mark.
        if self.context.is_main and self.checkpoints.best() != self.best:
            with self._writing():
                self.checkpoints.mark_best(**self.best) if self.best else self.checkpoints.unmark_best()

    def _finish(self) -> Outcome:
        # A run that was killed after its last checkpoint may have validated and logged before.
        done = self.validation.get("step") == self.step
        metrics = self.validation["metrics"] if done else self._validate(self.seconds)
        self._save(self.seconds)
        self.checkpoints.wait()
        results: TrainingResults = {
            **run_folder.training_results(self.command, self.config, self.step, self.seconds),
            "world_size": self.context.size,
            "micro_batch": self.micro_batch,
            "samples_digest": f"{self._global_digest():016x}",
            "skipped_images": run_folder.summarize_skipped(self._gather_bad(), self.task.samples()),
            "skipped_steps": self.guard.skipped,
            "final": metrics,
            "best": self.best,
        }
        content = {**results, **self.task.summary()}
        module = self.ema.module if self.ema is not None else self.task.module
        full = gather_full(self._export_copy, module) if self.mesh is not None else module
        with self.context.raise_on_all_ranks(), self._writing():
            if self.context.is_main:
                assert full is not None
                self.task.export(full, self.folder / "export", run_folder.export_provenance(results))
                run_folder.write_results(self.folder, content)
        return Outcome(self.folder, content, self.context.is_main)
