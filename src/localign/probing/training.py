"""Training of probing heads: all heads, tasks and seeds together, over one stream of frozen features.

Heads share only the batches and the optimiser. AdamW updates every parameter element independently and no gradient
norm is taken, so a head trained together with others equals the same head trained alone, bit for bit. The seed decides
the initial weights of a head. The order of the samples is the same for all seeds and all runs. Therefore seeds share
each batch's features, and the results of a seed do not depend on the other seeds.

The schedule is the published benchmark's: its cosine spans the warm-up too, and the warm-up starts above 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from localign import rng
from localign.data.stream import SampleStream
from localign.engine.distributed import DistributedContext
from localign.engine.optim.build import cosine_decay
from localign.engine.progress import ProgressCallback
from localign.engine.schedule import computes_in_bf16
from localign.errors import RunFailure
from localign.options.probe import HeadSpec, ProbeConfig
from localign.probing.features import Batch, Features, Rows
from localign.probing.heads import Geometry, build_head
from localign.probing.labels import PatchLabels
from localign.results import CurvePoint, HeadLoss

CURVE_EVERY = 100
"""Steps between two points of the loss curves."""
ORDER_SEED = 0
"""Seed of the order of the samples; it does not depend on the seeds of the heads."""

SeededHead = tuple[int, HeadSpec]
"""Identifies one head of a run by its seed and its spec."""


def learning_rate(step: int, steps: int, warmup_steps: int, lr: float, final_lr: float) -> float:
    """The learning rate of a step, 0-based: linear up to ``lr`` during warm-up, then a cosine over all steps."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    return final_lr + (lr - final_lr) * cosine_decay(step / steps)


def head_loss(spec: HeadSpec, logits: Tensor, labels: PatchLabels) -> Tensor:
    """The mean loss, float32: cross-entropy for the task ``majority``, else binary cross-entropy over classes.

    The mean is over the patches, or for the task ``global`` the images, that count; 0 if none does.
    """
    logits, counted = logits.float(), labels.counted
    targets = {"local": labels.patch, "global": labels.image, "majority": labels.majority}[spec.task]
    if counted is not None:
        kept = counted.any(dim=1) if spec.task == "global" else counted
        if not bool(kept.any()):
            return logits.sum() * 0.0
        logits, targets = logits[kept], targets[kept]
    if spec.task == "majority":
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    return F.binary_cross_entropy_with_logits(logits, targets.float())


def _counted_units(labels: PatchLabels) -> tuple[int, int]:
    """The patches and the images of a batch that count."""
    if labels.counted is None:
        return labels.majority.numel(), len(labels)
    return int(labels.counted.sum()), int(labels.counted.any(dim=1).sum())


def _shares(labels: PatchLabels, whole: Sequence[int]) -> dict[str, float]:
    """For each task, a batch's part of the patches or images that the caller averages over."""
    patches, images = (own / max(1, all_) for own, all_ in zip(_counted_units(labels), whole, strict=True))
    return {"local": patches, "majority": patches, "global": images}


@dataclass
class TrainedHeads:
    """The heads of one seed and their loss curves."""

    seed: int
    heads: dict[HeadSpec, nn.Module]
    curve: list[CurvePoint]
    """A point every 100 steps: ``step``, and for each head and task the mean ``train`` loss since the last point and
    the ``validation`` loss."""


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
        validation: Features for the validation-loss curve, which no choice depends on.
        after_epoch: Called after each epoch with its number, from 1, and all heads.
        progress: Called after each step.

    Returns:
        For each seed, its heads in eval mode.

    Raises:
        UserError: The warm-up is as long as the training, or the batch cannot be divided among the ranks.
        RunFailure: A loss is not finite.
    """
    steps, warmup = config.resolved(len(features))
    ends = config.epoch_ends(len(features))
    keys = [(seed, spec) for spec in specs for seed in config.all_seeds]
    heads = {key: _build(*key, geometry, features).to(context.device) for key in keys}
    parameters = [p for head in heads.values() for p in head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    curves = _Curves(heads, validation, config, context)
    for step, (tokens, labels) in enumerate(
        features.batches(_rank_batches(features, steps, config)), start=1
    ):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, steps, warmup, config.lr, config.final_lr)
        optimizer.zero_grad()
        whole = [config.batch * labels.majority.shape[1], config.batch]
        if features.ignores:
            whole = context.all_reduce(torch.tensor(_counted_units(labels), device=context.device)).tolist()
        losses = _losses(heads, tokens, labels, config, _shares(labels, whole), learn=True)
        _sum_gradients(parameters, context)
        optimizer.step()
        curves.add(losses)
        if step % CURVE_EVERY == 0 or step == steps:
            curves.add_point(step)
        if after_epoch is not None and step in ends:
            after_epoch(ends[step], heads)
        if progress is not None:
            progress("heads", step, steps)
    return [
        TrainedHeads(
            seed, {spec: heads[s, spec].eval() for s, spec in keys if s == seed}, curves.points[seed]
        )
        for seed in config.all_seeds
    ]


def _rank_batches(features: Features, steps: int, config: ProbeConfig) -> list[Rows]:
    """This rank's images in every step."""
    stream = SampleStream(ORDER_SEED, len(features))
    begins = range(0, steps * config.batch, config.batch)
    return [features.rank_share(stream.indices(begin, begin + config.batch)) for begin in begins]


def _losses(
    heads: Mapping[SeededHead, nn.Module],
    tokens: Tensor,
    labels: PatchLabels,
    config: ProbeConfig,
    shares: Mapping[str, float],
    *,
    learn: bool = False,
) -> Tensor:
    """Mean losses of the heads on a batch, multiplied by the share of their task.

    Args:
        heads: On the tokens' device.
        tokens, labels: One batch.
        config: Precision.
        shares: For each task, see :func:`_shares`.
        learn: Add gradients to the parameters. The backward pass of each head directly follows its forward pass, so
            that only one head's activations exist at a time.

    Returns:
        float32 ``(heads,)``, zeros for an empty batch.
    """
    losses = torch.zeros(len(heads), device=tokens.device)
    if not len(tokens):
        return losses
    tokens = tokens.float()
    in_bf16 = computes_in_bf16(config, tokens.device.type)
    for i, ((_, spec), head) in enumerate(heads.items()):
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=in_bf16):
            loss = shares[spec.task] * head_loss(spec, head(tokens), labels)
        if learn:
            torch.autograd.backward(loss)
        losses[i] = loss.detach()
    return losses


def _sum_gradients(parameters: list[nn.Parameter], context: DistributedContext) -> None:
    """Sum all gradients over ranks, in one all-reduce."""
    if context.size == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    total = context.all_reduce(torch.cat([g.reshape(-1) for g in gradients]))
    for parameter, part in zip(parameters, torch.split(total, [p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


class _Curves:
    """The loss curves of all heads.

    Args:
        heads: In the order of the losses.
        validation: Features whose first ``curve_images`` images are evaluated for each point. They stay in memory.
        config: Number of images, and precision.
        context: The ranks.
    """

    def __init__(
        self,
        heads: Mapping[SeededHead, nn.Module],
        validation: Features | None,
        config: ProbeConfig,
        context: DistributedContext,
    ) -> None:
        self.heads, self.config, self.context = heads, config, context
        self.points: dict[int, list[CurvePoint]] = {seed: [] for seed in config.all_seeds}
        self._running, self._steps = torch.zeros(len(heads), device=context.device), 0
        self._validation_batches: list[Batch] = []
        self._images = 0 if validation is None else min(len(validation), config.curve_images)
        if validation is not None and self._images:
            rows = validation.rank_rows()
            rows = rows[rows < self._images]
            self._validation_batches = list(validation.batches(chunks(rows, config.extract_batch)))
            units = [_counted_units(labels) for _, labels in self._validation_batches]
            own = torch.tensor(
                [sum(column) for column in zip((0, 0), *units, strict=True)], device=context.device
            )
            self._whole = context.all_reduce(own).tolist()

    def add(self, losses: Tensor) -> None:
        """Add the training losses of a step: this rank's share of the means."""
        self._running, self._steps = self._running + losses, self._steps + 1

    def add_point(self, step: int) -> None:
        """Add a point to every curve. Raises RunFailure if a loss is not finite."""
        train = self.context.all_reduce(self._running / self._steps).tolist()
        validation = self._validation_losses().tolist() if self._images else None
        for seed, points in self.points.items():
            heads: dict[str, dict[str, HeadLoss]] = {}
            for i, (head_seed, spec) in enumerate(self.heads):
                if head_seed != seed:
                    continue
                if not math.isfinite(train[i]):
                    name = f"{spec.label} head ({spec.task})"
                    raise RunFailure(f"the loss of the {name} is not finite at step {step}")
                losses: HeadLoss = {"train": train[i]}
                if validation is not None:
                    losses["validation"] = validation[i]
                heads.setdefault(spec.label, {})[spec.task] = losses
            points.append({"step": step, **heads})
        self._running, self._steps = torch.zeros_like(self._running), 0

    @torch.no_grad()
    def _validation_losses(self) -> Tensor:
        losses = torch.zeros(len(self.heads), device=self.context.device)
        for tokens, labels in self._validation_batches:
            losses += _losses(self.heads, tokens, labels, self.config, _shares(labels, self._whole))
        return self.context.all_reduce(losses)


def chunks(rows: Rows, size: int) -> list[Rows]:
    """Consecutive pieces of at most ``size`` rows."""
    return [rows[begin : begin + size] for begin in range(0, len(rows), size)]
