"""The loop that trains all heads."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from localign import rng
from localign.data.stream import SampleStream
from localign.engine.distributed import DistributedContext
from localign.engine.progress import ProgressCallback
from localign.errors import RunFailure, UserError
from localign.options.probe import HeadSpec, ProbeConfig
from localign.probing.features import Batch, Features, Rows
from localign.probing.heads import Geometry, build_head
from localign.probing.labels import PatchLabels
from localign.probing.training.losses import (
    SeededHead,
    chunks,
    counted_units,
    mean_losses,
    task_shares,
)
from localign.probing.training.schedule import HeadSchedule, check_steps, has_converged, learning_rate
from localign.results import CurvePoint, HeadConvergence, HeadLoss

CURVE_EVERY = 100
"""Steps between two points of the loss curves of a training of a fixed length."""
ORDER_SEED = 0
"""Seed of the order of the samples; it does not depend on the seeds of the heads."""
HELD_OUT = 5
"""A training until convergence holds out one in this number of training images."""


@dataclass
class TrainedHeads:
    """The heads of one seed and their loss curves."""

    seed: int
    heads: dict[HeadSpec, nn.Module]
    curve: list[CurvePoint]
    """Points with ``step``, and for each head and task the mean ``train`` loss since the last point and the
    ``validation`` loss. One every 100 steps; in a training until convergence, one for each check of the held-out
    images, and none for a head after its last step."""
    convergence: dict[str, dict[str, HeadConvergence]] = field(default_factory=dict)
    """By head and task."""


def _build(seed: int, spec: HeadSpec, geometry: Geometry, features: Features) -> nn.Module:
    classes = features.codes if spec.task == "majority" else features.classes
    # The key names the head, so that its initial weights do not depend on the other heads.
    with rng.seeded_globals(seed, f"probe head {spec.label} {spec.task}"):
        return build_head(spec.head, geometry, classes, spec.task, spec.intervention)


def train_heads(
    features: Features,
    specs: Iterable[HeadSpec],
    geometry: Geometry,
    config: ProbeConfig,
    context: DistributedContext,
    *,
    validation: Features | None = None,
    after_epoch: Callable[[int, Mapping[SeededHead, nn.Module]], None] | None = None,
    progress: ProgressCallback | None = None,
) -> list[TrainedHeads]:
    """Train all heads of all seeds over one stream of features.

    With several ranks each takes its share of every batch, and gradients are summed: the result is the result of one
    rank, up to rounding.

    Args:
        features: Tokens and targets of the training images.
        specs: The heads to train for every seed.
        geometry: Shape of the backbone's tokens.
        config: Seeds, steps, batch, learning rates and precision.
        context: The ranks and the device.
        validation: Features for the validation-loss curve of a training of a fixed length, which no choice depends on.
            A training until convergence takes a part of ``features`` instead.
        after_epoch: Called after each epoch of a training of a fixed length with its number, from 1, and all heads.
        progress: Called after each step.

    Returns:
        For each seed, its heads in eval mode: after the last step, or in a training until convergence with the weights
        that had the lowest loss on held-out images.

    Raises:
        UserError: The warm-up is as long as the training, the batch cannot be divided among the ranks, or there are too
            few images to hold some out.
        RunFailure: A loss is not finite.
    """
    keys = [(seed, spec) for spec in specs for seed in config.all_seeds]
    heads = {key: _build(*key, geometry, features).to(context.device) for key in keys}
    if config.until_converged:
        trained_on, held_out = held_out_rows(len(features), config)
        training = _Training(features, trained_on, heads, _HeldOut(features, held_out, config, context))
        training.run_until_converged(progress)
    else:
        shown = np.arange(0 if validation is None else min(len(validation), config.curve_images))
        training = _Training(
            features,
            np.arange(len(features)),
            heads,
            _HeldOut(features if validation is None else validation, shown, config, context),
        )
        training.run_fixed(after_epoch, progress)
    return [
        TrainedHeads(
            seed,
            {spec: heads[s, spec].eval() for s, spec in keys if s == seed},
            training.points[seed],
            training.convergence(seed),
        )
        for seed in config.all_seeds
    ]


def held_out_rows(images: int, config: ProbeConfig) -> tuple[Rows, Rows]:
    """The training images to train on and those to hold out: a fifth, at most ``curve_images``; both in order.

    Raises:
        UserError: There is no image to hold out.
    """
    count = min(config.curve_images, images // HELD_OUT)
    if not count:
        raise UserError(
            f"training heads until they converge holds out every fifth training image, and there are {images}; "
            "give more images, or a fixed length with --epochs or --steps"
        )
    order = rng.generator(ORDER_SEED, "held-out images of probing").permutation(images)
    return np.sort(order[count:]), np.sort(order[:count])


class _HeldOut:
    """Images whose loss says how well heads generalise. They stay in memory.

    Args:
        features: Features of the source.
        rows: The images; none for no losses.
        config: Images per batch, and precision.
        context: The ranks; each takes its part of the images.
    """

    def __init__(
        self, features: Features, rows: Rows, config: ProbeConfig, context: DistributedContext
    ) -> None:
        self.images, self.config, self.context = len(rows), config, context
        self._batches: list[Batch] = []
        if self.images:
            own_rows = rows[np.isin(rows, features.rank_rows())]
            self._batches = list(features.batches(chunks(own_rows, config.extract_batch)))
            units = [counted_units(labels) for _, labels in self._batches]
            own = torch.tensor(
                [sum(column) for column in zip((0, 0), *units, strict=True)], device=context.device
            )
            self._whole = context.all_reduce(own).tolist()

    @torch.no_grad()
    def losses(self, heads: Mapping[SeededHead, nn.Module]) -> dict[SeededHead, float]:
        """The mean loss of every head, the same on all ranks; empty without images."""
        if not self.images:
            return {}
        losses = torch.zeros(len(heads), device=self.context.device)
        for tokens, labels in self._batches:
            losses += mean_losses(heads, tokens, labels, self.config, task_shares(labels, self._whole))
        return dict(zip(heads, self.context.all_reduce(losses).tolist(), strict=True))


class _Training:
    """Heads, their optimiser and their curves.

    Args:
        features: Tokens and targets of the training images.
        rows: The images to train on.
        heads: On the device of the ranks.
        held_out: Images whose loss says whether heads have converged.
    """

    def __init__(
        self, features: Features, rows: Rows, heads: dict[SeededHead, nn.Module], held_out: _HeldOut
    ) -> None:
        self.features, self.rows, self.heads, self.held_out = features, rows, heads, held_out
        self.config, self.context = held_out.config, held_out.context
        self.points: dict[int, list[CurvePoint]] = {seed: [] for seed in self.config.all_seeds}
        self.steps, self.warmup = self.config.resolved(len(features))
        self.schedules = {
            key: HeadSchedule(self.config, check_steps(self.steps), self.warmup) for key in heads
        }
        groups = [{"params": list(head.parameters())} for head in heads.values()]
        self.optimizer = torch.optim.AdamW(
            groups, lr=self.config.lr, weight_decay=self.config.weight_decay, fused=True
        )
        self._sums = {key: torch.zeros((), device=self.context.device) for key in heads}
        self._summed = 0

    def run_fixed(
        self,
        after_epoch: Callable[[int, Mapping[SeededHead, nn.Module]], None] | None,
        progress: ProgressCallback | None,
    ) -> None:
        """Train every head for the same number of steps, and report it after the last."""
        ends, checks = self.config.epoch_ends(len(self.rows)), set(check_steps(self.steps))
        self._check(0, self.heads)
        for step, (tokens, labels) in enumerate(self.features.batches(self._rank_batches()), start=1):
            rate = learning_rate(step - 1, self.steps, self.warmup, self.config.lr, self.config.final_lr)
            self._step(tokens, labels, dict.fromkeys(self.heads, rate))
            shown = step % CURVE_EVERY == 0 or step == self.steps
            if shown or step in checks:
                losses = self.held_out.losses(self.heads)
            if shown:
                self._add_point(step, losses, self.heads)
            if step in checks:
                self._check(step, self.heads, losses)
            if after_epoch is not None and step in ends:
                after_epoch(ends[step], self.heads)
            if progress is not None:
                progress("heads", step, self.steps)

    def run_until_converged(self, progress: ProgressCallback | None) -> None:
        """Train each head until it has converged, and leave it with its best weights."""
        active, checks = dict(self.heads), set(check_steps(self.steps))
        best = {key: copy.deepcopy(head.state_dict()) for key, head in self.heads.items()}
        self._check(0, self.heads)
        for step, (tokens, labels) in enumerate(self.features.batches(self._rank_batches()), start=1):
            rates = {key: self.schedules[key].learning_rate(step - 1) for key in active}
            self._step(tokens, labels, rates)
            if progress is not None:  # the end comes nearer as heads converge
                progress("heads until converged", step, max(s.end for s in self.schedules.values()))
            if step not in checks:
                continue
            losses = self.held_out.losses(active)
            self._add_point(step, losses, active)
            for key in self._check(step, active, losses):
                best[key] = copy.deepcopy(self.heads[key].state_dict())
            active = {key: head for key, head in active.items() if step < self.schedules[key].end}
            if not active:
                break
        for key, head in self.heads.items():
            head.load_state_dict(best[key])

    def convergence(self, seed: int) -> dict[str, dict[str, HeadConvergence]]:
        """Whether each head of a seed has converged, by head and task."""
        found: dict[str, dict[str, HeadConvergence]] = {}
        for (head_seed, spec), schedule in self.schedules.items():
            if head_seed == seed:
                found.setdefault(spec.label, {})[spec.task] = self._convergence(schedule)
        return found

    def _convergence(self, schedule: HeadSchedule) -> HeadConvergence:
        if not schedule.curve:
            return {"converged": None, "steps": self.steps, "reported_step": self.steps}
        steps = schedule.curve[-1][0]
        if self.config.until_converged:
            converged, reported = schedule.converged_at is not None, schedule.best_step
        else:
            converged, reported = has_converged(schedule.curve), steps
        return {"converged": converged, "steps": steps, "reported_step": reported}

    def _rank_batches(self) -> list[Rows]:
        """This rank's images in every step."""
        stream, batch = SampleStream(ORDER_SEED, len(self.rows)), self.config.batch
        begins = range(0, self.steps * batch, batch)
        return [self.features.rank_share(self.rows[stream.indices(b, b + batch)]) for b in begins]

    def _step(self, tokens: Tensor, labels: PatchLabels, rates: Mapping[SeededHead, float]) -> None:
        """Train the heads that have a learning rate on one batch; the others stay as they are."""
        for key, group in zip(self.heads, self.optimizer.param_groups, strict=True):
            group["lr"] = rates.get(key, 0.0)
        self.optimizer.zero_grad()
        whole: Sequence[int] = [self.config.batch * labels.majority.shape[1], self.config.batch]
        if self.features.ignores:
            own = torch.tensor(counted_units(labels), device=self.context.device)
            whole = self.context.all_reduce(own).tolist()
        heads = {key: self.heads[key] for key in rates}
        losses = mean_losses(heads, tokens, labels, self.config, task_shares(labels, whole), learn=True)
        _sum_gradients([p for head in heads.values() for p in head.parameters()], self.context)
        self.optimizer.step()
        for key, loss in zip(heads, losses, strict=True):
            self._sums[key] = self._sums[key] + loss
        self._summed += 1

    def _check(
        self,
        step: int,
        heads: Mapping[SeededHead, nn.Module],
        losses: Mapping[SeededHead, float] | None = None,
    ) -> list[SeededHead]:
        """Add held-out losses to the schedules. Returns the heads with their lowest loss so far."""
        losses = self.held_out.losses(heads) if losses is None else losses
        return [key for key, loss in losses.items() if self.schedules[key].add(step, loss)]

    def _add_point(
        self, step: int, held_out: Mapping[SeededHead, float], heads: Mapping[SeededHead, nn.Module]
    ) -> None:
        """Add a point to every curve. Raises RunFailure if a loss is not finite."""
        sums = torch.stack([self._sums[key] for key in heads]) / self._summed
        trained = dict(zip(heads, self.context.all_reduce(sums).tolist(), strict=True))
        for seed, points in self.points.items():
            point: dict[str, dict[str, HeadLoss]] = {}
            for key in (key for key in heads if key[0] == seed):
                spec = key[1]
                if not math.isfinite(trained[key]):
                    name = f"{spec.label} head ({spec.task})"
                    raise RunFailure(f"the loss of the {name} is not finite at step {step}")
                losses: HeadLoss = {"train": trained[key]}
                if key in held_out:
                    losses["validation"] = held_out[key]
                point.setdefault(spec.label, {})[spec.task] = losses
            points.append({"step": step, **point})
        self._sums = {key: torch.zeros((), device=self.context.device) for key in self.heads}
        self._summed = 0


def _sum_gradients(parameters: list[nn.Parameter], context: DistributedContext) -> None:
    """Sum all gradients over ranks, in one all-reduce."""
    if context.size == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    total = context.all_reduce(torch.cat([g.reshape(-1) for g in gradients]))
    for parameter, part in zip(parameters, torch.split(total, [p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
