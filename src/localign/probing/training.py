"""Training probing heads: all heads, tasks and seeds together, over one stream of frozen features.

Heads share batches and optimiser and nothing else: AdamW works on each number alone and no gradient norm is
taken, so a head trained among others equals the same head trained alone, bit for bit. A seed decides how a
head is initialised. The order of the samples is the same for all seeds, in this run and in any other: so
seeds share each batch's features, and a seed's figures do not depend on which seeds ran beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from localign import rng
from localign.data.stream import SampleStream
from localign.engine.distributed import DistributedContext
from localign.errors import RunFailure
from localign.options.names import Precision
from localign.options.probe import HeadSpec, ProbeConfig
from localign.probing.features import Batch, Features, Rows
from localign.probing.heads import Geometry, build_head
from localign.probing.labels import PatchLabels

CURVE_EVERY = 100
"""Steps between two points of the loss curves."""
ORDER_SEED = 0
"""Of the order of the samples, whatever the seeds of the heads."""

Progress = Callable[[str, int, int], None]
"""Told (what is being done, how much is done, of how much)."""


Member = tuple[int, HeadSpec]
"""One head of a run: its seed and what it is."""


def learning_rate(step: int, steps: int, warmup_steps: int, lr: float, final_lr: float) -> float:
    """The rate of a 0-based step: linear up to ``lr`` in the warm-up, else on the cosine over all steps."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    return final_lr + (lr - final_lr) * 0.5 * (1 + math.cos(math.pi * step / steps))


def head_loss(spec: HeadSpec, logits: Tensor, labels: PatchLabels) -> Tensor:
    """Binary cross-entropy over classes, or cross-entropy of the majority label; float32 mean."""
    if spec.task == "majority":
        return F.cross_entropy(logits.float().flatten(0, 1), labels.majority.flatten())
    targets = labels.patch if spec.task == "local" else labels.image
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float())


@dataclass
class TrainedHeads:
    """The heads of one seed with their loss curves."""

    seed: int
    heads: dict[HeadSpec, nn.Module]
    curve: list[dict[str, Any]]
    """Every 100 steps: ``step``, and per head and task the mean ``train`` loss since the last point and the
    ``validation`` loss."""


def _build(seed: int, spec: HeadSpec, geometry: Geometry, features: Features) -> nn.Module:
    classes = features.codes if spec.task == "majority" else features.classes
    # Keyed by what the head is: it starts the same whichever others are trained beside it.
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
    after_epoch: Callable[[int, Mapping[Member, nn.Module]], None] | None = None,
    progress: Progress | None = None,
) -> list[TrainedHeads]:
    """Train all heads of all seeds over one stream of features.

    Over several ranks each takes its share of every batch and gradients are summed, so that the result is
    that of one rank up to rounding.

    Args:
        features: What to train on.
        specs: What to train.
        geometry: Of the backbone the features come from.
        config: Seeds, steps, batch, rates and precision.
        context: The ranks, and the device to train on.
        validation: Features for the validation-loss curve; no choice is made with it.
        after_epoch: Called with the number of the epoch that is over, from 1, and all heads.
        progress: Told of each step.

    Returns:
        Per seed, its heads in eval mode.

    Raises:
        UserError: the warm-up is longer than the training, or the batch does not divide among ranks.
        RunFailure: a loss is not finite.
    """
    steps, warmup = config.resolved(len(features))
    ends = config.epoch_ends(len(features))
    members = [(seed, spec) for spec in specs for seed in config.all_seeds]
    heads = {m: _build(*m, geometry, features).to(context.device) for m in members}
    parameters = [p for head in heads.values() for p in head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    curves = _Curves(heads, validation, config, context)
    for step, (tokens, labels) in enumerate(features.batches(_shares(features, steps, config)), start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, steps, warmup, config.lr, config.final_lr)
        optimizer.zero_grad()
        losses = _losses(heads, tokens, labels, config, share=len(tokens) / config.batch, learn=True)
        _sum_gradients(parameters, context)
        optimizer.step()
        curves.add(losses)
        if step % CURVE_EVERY == 0 or step == steps:
            curves.mark(step)
        if after_epoch is not None and step in ends:
            after_epoch(ends[step], heads)
        if progress is not None:
            progress("heads", step, steps)
    return [
        TrainedHeads(
            seed, {spec: heads[s, spec].eval() for s, spec in members if s == seed}, curves.points[seed]
        )
        for seed in config.all_seeds
    ]


def _shares(features: Features, steps: int, config: ProbeConfig) -> list[Rows]:
    """This rank's images of every step."""
    stream = SampleStream(ORDER_SEED, len(features))
    begins = range(0, steps * config.batch, config.batch)
    return [features.share(stream.indices(begin, begin + config.batch)) for begin in begins]


def uses_bfloat16(precision: Precision, device: torch.device) -> bool:
    """Whether to compute in bfloat16 autocast."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def _losses(
    heads: Mapping[Member, nn.Module],
    tokens: Tensor,
    labels: PatchLabels,
    config: ProbeConfig,
    *,
    share: float,
    learn: bool = False,
) -> Tensor:
    """Mean losses times ``share``, the batch's part of what a mean is over; with ``learn`` gradients too.

    Each head is gone back through at once: its activations are still near, and no two heads' exist together.

    Returns:
        float32 ``(heads,)``, zeros for an empty batch.
    """
    losses = torch.zeros(len(heads), device=tokens.device)
    if not len(tokens):
        return losses
    tokens = tokens.float()
    bfloat16 = uses_bfloat16(config.precision, tokens.device)
    for i, ((_, spec), head) in enumerate(heads.items()):
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bfloat16):
            loss = share * head_loss(spec, head(tokens), labels)
        if learn:
            loss.backward()
        losses[i] = loss.detach()
    return losses


def _sum_gradients(parameters: list[nn.Parameter], context: DistributedContext) -> None:
    """Each gradient's sum over ranks, in one exchange."""
    if context.size == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    total = context.all_reduce(torch.cat([g.reshape(-1) for g in gradients]))
    for parameter, part in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


class _Curves:
    """The loss curves of all heads.

    Args:
        heads: In the order of the losses.
        validation: Its first ``curve_images`` images are looked at again for each point, and kept in memory.
        config: How losses are computed.
        context: The ranks.
    """

    def __init__(
        self,
        heads: Mapping[Member, nn.Module],
        validation: Features | None,
        config: ProbeConfig,
        context: DistributedContext,
    ) -> None:
        self.heads, self.config, self.context = heads, config, context
        self.points: dict[int, list[dict[str, Any]]] = {seed: [] for seed in config.all_seeds}
        self._running, self._steps = torch.zeros(len(heads), device=context.device), 0
        self._held: list[Batch] = []
        self._images = 0 if validation is None else min(len(validation), config.curve_images)
        if validation is not None and self._images:
            rows = validation.own()
            rows = rows[rows < self._images]
            self._held = list(validation.batches(chunks(rows, config.extract_batch)))

    def add(self, losses: Tensor) -> None:
        """Note a step's training losses: this rank's share of their means."""
        self._running, self._steps = self._running + losses, self._steps + 1

    def mark(self, step: int) -> None:
        """Add a point. Raises RunFailure where a loss is not finite."""
        train = self.context.all_reduce(self._running / self._steps).tolist()
        held_out = self._validation().tolist() if self._images else None
        for seed, points in self.points.items():
            point: dict[str, Any] = {"step": step}
            for i, (own, spec) in enumerate(self.heads):
                if own != seed:
                    continue
                if not math.isfinite(train[i]):
                    name = f"{spec.label} head ({spec.task})"
                    raise RunFailure(f"the loss of the {name} is not finite by step {step}")
                losses = {"train": train[i]}
                if held_out is not None:
                    losses["validation"] = held_out[i]
                point.setdefault(spec.label, {})[spec.task] = losses
            points.append(point)
        self._running, self._steps = torch.zeros_like(self._running), 0

    @torch.no_grad()
    def _validation(self) -> Tensor:
        losses = torch.zeros(len(self.heads), device=self.context.device)
        for tokens, labels in self._held:
            losses += _losses(self.heads, tokens, labels, self.config, share=len(tokens) / self._images)
        return self.context.all_reduce(losses)


def chunks(rows: Rows, size: int) -> list[Rows]:
    """Consecutive pieces of at most ``size``."""
    return [rows[begin : begin + size] for begin in range(0, len(rows), size)]
