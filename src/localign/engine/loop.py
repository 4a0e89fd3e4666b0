"""The one training loop. It knows a Task; nothing about masks, labels or prompts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from localign import rng
from localign.engine import run_folder
from localign.engine.batch import sample_digest, to_device
from localign.engine.checkpoints.replicated import Checkpoints
from localign.engine.checkpoints.sharded import ShardedCheckpoints
from localign.engine.checkpoints.state import NEEDED_FIELDS, BestCheckpoint, LastValidation
from localign.engine.disk import writing
from localign.engine.distributed import DistributedContext, distributed_context
from localign.engine.hardware.cpu import fast_float32_matmul, keep_freed_memory
from localign.engine.hardware.memory import check_measurable
from localign.engine.hardware.microbatch import MicroBatchFinder
from localign.engine.log import Bar, Log, Stopwatch, say
from localign.engine.metrics import Totals
from localign.engine.nonfinite import NonFiniteGuard
from localign.engine.optim.build import (
    averaged,
    build_optimizer,
    decayed_names,
    learning_rate,
    scale_and_clip,
    set_rates,
)
from localign.engine.run_folder import Outcome, open_folder, open_log
from localign.engine.schedule import batch_shares, computes_in_bf16, total_steps, with_warmup_steps
from localign.engine.sharding import gather_full, meta_copy, reshard, shard_task
from localign.engine.task import BatchPlan, Task, batch_plan
from localign.errors import RunFailure, RunStopped, UserError
from localign.options.train import TrainConfig
from localign.signals import StopRequest, stop_requests


def train(task: Task, config: TrainConfig, command: str) -> Outcome:
    """Train a task to its last step, from the start or from a checkpoint, and export the result.

    Args:
        task: The method, on the CPU, freshly built.
        config: The loop's options; the task's own are part of the same object and are saved with it.
        command: The localign command, named in the run folder.

    Raises:
        UserError: Bad options or data, or a run folder that does not fit.
        RunFailure: Training does not recover from non-finite losses, a loader worker or another rank dies, or
            something cannot be written.
        RunStopped: SIGTERM or SIGUSR1 came; there is a checkpoint of the last step.
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
    """State of one run on one rank."""

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
        self.stop, self.stopping = stop, False  # the latter known to all ranks alike
        self.folder = Path(config.out)
        self.steps = total_steps(config, task.samples())
        self.log = Log([])
        self._bar: Bar | None = None
        self.mesh = context.mesh(per_node=config.sharding == "hybrid") if config.sharding != "none" else None
        if self.mesh is not None:
            task.shard_units(task.module)  # one that is not to be sharded refuses before anything is written
        self.checkpoints = self._store()
        self.guard = NonFiniteGuard(self.folder, context.rank)
        self.step = 0
        self.digest = 0
        self.bad: dict[str, str] = {}
        self.named: set[str] = set()  # the bad images that are in the log
        self.seconds = 0.0
        self.best: BestCheckpoint | None = None
        self.validation: LastValidation = {}  # the latest: step and metrics
        self.saved_at: int | None = None
        self._lock: TextIO | None = None

    def close(self) -> None:
        """Let go of the log and the folder; a checkpoint that is being written is finished, if it can be."""
        with suppress(RunFailure):
            self.checkpoints.wait()
        with suppress(OSError):  # what could not be written has been said already
            self.log.close()
        if self._lock is not None:
            self._lock.close()

    # -- the run, top to bottom ------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Everything from opening the folder to the export."""
        task, config = self.task, self.config
        resumed_at = self._open_folder()
        self.ema = averaged(task.module, config.ema) if config.ema is not None else None
        decayed = decayed_names(task.module)  # while every parameter is whole
        if self.mesh is not None:
            self._meta = meta_copy(task.module) if self.context.is_main else None
            modules = [task.module, *([self.ema.module] if self.ema is not None else [])]
            shard_task(task, modules, self.mesh, self.in_bf16, config, self.context)
        task.to(self.context.device)
        if self.ema is not None:
            self.ema.to(self.context.device)
        self.optimizer = build_optimizer(task.module, config, decayed, task.lr_factors())
        if resumed_at is not None:
            self._restore(resumed_at)
        else:
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
        # Dropout and the like draw from torch's generator; it is keyed by the step, and the caller's is kept.
        with torch.random.fork_rng([self.context.device] if self.context.device.type == "cuda" else []):
            self._train()
        return self._finish()

    def _train(self) -> None:
        config = self.config
        self.stopping = self.context.any_rank(self.stop.made)
        self._validate_if_due(self.seconds)  # a run that was stopped has put it off
        totals, clock = Totals(self.context.device), Stopwatch()
        batches = self.task.batches(self._plan(start=self.step))
        while self.step < self.steps and not self.stopping:
            rate = learning_rate(self.step, self.steps, config)
            set_rates(self.optimizer, rate)
            torch.manual_seed(rng.key(config.seed, "step", self.step, self.context.rank) >> 1)
            taken = self._step(batches, totals, clock)
            self.step += 1
            if self._bar is not None:
                self._bar.advance()
            if self.step % config.log_every == 0 or self.step == self.steps:
                self._log_step(totals, clock, rate, taken)
            # Neither validation nor saving is training time; the last of both comes with the results.
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
        """End the run where it is. Its checkpoint is there, if it has taken a step at all."""
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

    def _step(self, batches: Iterator[Any], totals: Totals, clock: Stopwatch) -> Any:
        """One optimizer step over this rank's micro-batches; returns the last of them."""
        module, count = self.task.module, self.per_rank // self.micro_batch
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(3, device=self.context.device)  # of the loss, of its weight, of requests to stop
        seen: list[Any] = []
        metrics: list[dict[str, tuple[Tensor, Tensor]]] = []
        for number in range(count):
            with clock.waiting():
                batch = to_device(next(batches), self.context.device)
            self._note(batch)
            totals.count(self.task.throughput(batch))
            seen.append(batch)
            with self.context.without_sync(self.model, skip=number < count - 1):
                with self._autocast():
                    result = self.task.step(self.model, batch)
                # Gradients of sums: dividing by what all ranks and micro-batches went over comes last.
                result.loss_sum.backward()
            sums[:2] += torch.stack([result.loss_sum.detach(), result.weight.detach()]).to(sums)
            metrics.append(result.metrics)
        sums[2] = float(self.stop.made)
        sums = self.context.all_reduce(sums)
        # The exchange has averaged over ranks what is to be summed.
        scale = self.context.size / sums[1].clamp(min=1)
        grad_norm = scale_and_clip(module, scale, self.config.clip_grad)
        loss = sums[0] / sums[1].clamp(min=1)
        # Every rank has the same sums and, after their exchange, the same gradients: so they all agree.
        if bool(torch.isfinite(loss) & torch.isfinite(grad_norm)):
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update_parameters(module)
            self.guard.passed()
            totals.add_step(sums[:2], grad_norm)
            for values in metrics:
                totals.add(values)
        else:
            totals.steps_seen += 1
            number = self.step + 1  # as the log counts
            if self.context.is_main:
                say(f"step {number}: loss {float(loss)}, gradient norm {float(grad_norm)}; skipped")
            with self._writing():
                self.guard.skip(number, seen, float(loss), float(grad_norm))
        # Ranks agree by what they have exchanged; one that is alone hears what came since.
        self.stopping = bool(sums[2] > 0) or (self.context.size == 1 and self.stop.made)
        return seen[-1]

    # -- around a step ---------------------------------------------------------------------------------

    def _plan(self, start: int) -> BatchPlan:
        return batch_plan(self.config, self.context, self.micro_batch, start, self.steps)

    def _note(self, batch: Any) -> None:
        self.digest = (self.digest + sample_digest(batch)) % (1 << 64)
        for name, reason in batch.bad:
            if name not in self.bad:
                self.bad[name] = reason
                say(f"skipped unreadable image {name}: {reason}")

    def _global_digest(self) -> int:
        """The digest over the samples of all ranks."""
        return sum(self.context.all_gather_object(self.digest)) % (1 << 64)

    def _log_step(self, totals: Totals, clock: Stopwatch, rate: float, batch: Any) -> None:
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
        """Held-out metrics; the lowest ``val_loss`` so far marks the best checkpoint."""
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
        # One rank looks and writes; all act on what it found, a refusal included.
        with self.context.raise_on_all_ranks():
            if self.context.is_main:
                resumed_at, self._lock = open_folder(
                    self.folder, self.command, self.config, self.checkpoints, self.guard.folder
                )
        return self.context.all_gather_object(resumed_at)[0]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Inside, what cannot be written ends the run with a line that says where it can be taken up again."""
        with writing(self.folder, self.checkpoints.resume_hint):
            run_folder.check_there(self.folder)
            yield

    def _gather_bad(self) -> dict[str, str]:
        """The unreadable images that any rank has met; those not in the log yet are named there."""
        bad = {
            name: reason for part in self.context.all_gather_object(self.bad) for name, reason in part.items()
        }
        for name in (n for n in bad if n not in self.named):
            with self._writing():
                self.log.write(self.step, skipped_image=name, reason=bad[name])
        self.named |= bad.keys()
        return bad

    def _save(self, seconds: float) -> None:
        if self.saved_at == self.step:
            return  # writing it again would be a moment without it
        bad, digest = self._gather_bad(), self._global_digest()
        ema = self.ema.module if self.ema is not None else None
        state: dict[str, Any] = {}
        if self.context.is_main:
            state = {
                "config": run_folder.to_dict(self.config),
                "fingerprint": self.task.fingerprint(),
                "task": self.task.state_dict(),
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
        if lacking := sorted(NEEDED_FIELDS - state.keys()):
            raise UserError(f"checkpoint {self.checkpoints.path(step)} does not say: {', '.join(lacking)}")
        ours = self.context.all_gather_object(self.task.fingerprint())[0]
        run_folder.check_same_fingerprint(self.folder, state["fingerprint"], ours)
        ema = self.ema.module if self.ema is not None else None
        self.checkpoints.restore(step, self.task.module, self.optimizer, ema)
        self.task.load_state_dict(state["task"])
        self.guard.load_state_dict(state["guard"])
        if self.ema is not None:
            self.ema.n_averaged.fill_(step - len(self.guard.skipped))
        self.step = self.saved_at = step
        # The whole digest is on one rank; the sum over ranks is what counts.
        self.digest = int(state["digest"], 16) if self.context.is_main else 0
        self.bad = dict(state["bad_images"])
        self.named = set(self.bad)
        self.seconds = float(state["seconds"])
        self.best, self.validation = state["best"], state["validation"]
        # A kill may have come between saving and marking; and what was marked later may be damaged.
        if self.context.is_main and self.checkpoints.best() != self.best:
            with self._writing():
                self.checkpoints.mark_best(**self.best) if self.best else self.checkpoints.unmark_best()

    def _finish(self) -> Outcome:
        # A run that was killed after its last checkpoint has validated already, and logged it.
        done = self.validation.get("step") == self.step
        metrics = self.validation["metrics"] if done else self._validate(self.seconds)
        self._save(self.seconds)
        self.checkpoints.wait()
        self.bad = self._gather_bad()
        results = {
            **run_folder.training_facts(self.command, self.config, self.step, self.seconds),
            "world_size": self.context.size,
            "micro_batch": self.micro_batch,
            "samples_digest": f"{self._global_digest():016x}",
            "skipped_images": run_folder.bad_images_facts(self.bad, self.task.samples()),
            "skipped_steps": self.guard.skipped,
            "final": metrics,
            "best": self.best,
            **self.task.summary(),
        }
        module = self.ema.module if self.ema is not None else self.task.module
        whole = gather_full(self._meta, module) if self.mesh is not None else module
        with self.context.raise_on_all_ranks(), self._writing():
            if self.context.is_main:
                assert whole is not None
                self.task.export(whole, self.folder / "export", run_folder.export_facts(results))
                run_folder.write_results(self.folder, results)
        return Outcome(self.folder, results, self.context.is_main)
