"""Training probing heads: all of them together, over one stream of cached features."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from localign import rng
from localign.data.loader import SampleStream
from localign.errors import RunFailure, UserError
from localign.probing.heads import Geometry, build_head
from localign.probing.labels import PatchLabels

CURVE_EVERY = 100
"""Steps between two points of the loss curves."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Progress = Callable[[str, int, int], None]
"""Told (what is being done, how much is done, of how much)."""


@dataclass(frozen=True)
class HeadSpec:
    """One head to train."""

    head: str
    """``linear``, ``mlp`` or ``transformer``."""
    task: str
    """``local``, ``global`` or ``majority``."""
    intervention: str = "none"
    """``none``, ``cls-only`` or ``anonymous``; transformer heads with a prediction per patch only."""

    @property
    def label(self) -> str:
        """The head's name in results, ``transformer`` or ``transformer-anonymous``."""
        return self.head if self.intervention == "none" else f"{self.head}-{self.intervention}"


@dataclass(frozen=True)
class ProbeConfig:
    """What is trained on the frozen features, and how; the defaults are the published settings."""

    heads: tuple[str, ...] = ("transformer", "mlp", "linear")
    """Head names; an intervention is written behind its head, as in ``transformer-cls-only``."""
    tasks: tuple[str, ...] = ("local", "global")
    """``local`` (the classes in a patch), ``global`` (in the image), ``majority`` (of a patch's pixels)."""
    seed: int = 0
    """Seed of initialisation and sample order."""
    epochs: float = 5.0
    """Passes over the training images; not used where ``steps`` is given."""
    steps: int | None = None
    """Optimiser steps; empty: as many as ``epochs`` asks for."""
    batch: int = 32
    """Images per optimiser step."""
    lr: float = 1e-3
    """Peak learning rate."""
    final_lr: float = 1e-4
    """Learning rate at the last step."""
    warmup_steps: int | None = None
    """Optimiser steps of linear warm-up; empty: 500, or a tenth of all steps where that is less."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on all parameters."""
    precision: str = "auto"
    """``float32``, ``bfloat16`` (autocast), or ``auto``: bfloat16 on CUDA, float32 elsewhere."""
    cache_dtype: str = "float16"
    """How cached features are kept in memory: ``float32``, ``float16`` or ``bfloat16``."""
    extract_batch: int = 64
    """Images per forward pass of the backbone."""
    workers: int = 0
    """Processes that load images; 0 loads in the main process."""
    curve_images: int = 512
    """Validation images behind each point of the validation-loss curve."""

    def __post_init__(self) -> None:
        if self.cache_dtype not in DTYPES:
            raise UserError(f"unknown cache_dtype {self.cache_dtype!r}; known: {', '.join(DTYPES)}")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise UserError(f"unknown precision {self.precision!r}; known: auto, float32, bfloat16")
        for name in ("batch", "extract_batch", "curve_images"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.epochs <= 0 or (self.steps is not None and self.steps < 1):
            raise UserError("probing needs at least one step: epochs > 0 and steps >= 1")
        if not 0 < self.final_lr <= self.lr:
            raise UserError(f"learning rates must satisfy 0 < final_lr <= lr, got {self.final_lr}, {self.lr}")
        self.specs()

    def specs(self) -> tuple[HeadSpec, ...]:
        """All heads x tasks; an intervention only with tasks that predict per patch."""
        specs = []
        for name in self.heads:
            head, _, intervention = name.partition("-")
            for task in self.tasks:
                if intervention and task == "global":
                    continue
                specs.append(HeadSpec(head, task, intervention or "none"))
        for spec in specs:
            with torch.device("meta"):  # a misspelt name fails here, before hours of feature extraction
                build_head(spec.head, Geometry(8, 1, 1, 1), 2, spec.task, spec.intervention)
        if not specs or len(set(specs)) != len(specs):
            raise UserError(f"probing needs heads and tasks, each once: {self.heads}, {self.tasks}")
        return tuple(specs)

    def resolved(self, images: int) -> tuple[int, int]:
        """(steps, warm-up steps) for a number of training images."""
        steps = self.steps or max(1, int(self.epochs * images) // self.batch)
        warmup = min(500, steps // 10) if self.warmup_steps is None else self.warmup_steps
        return steps, warmup


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
    """Heads with their loss curves."""

    heads: dict[HeadSpec, nn.Module]
    curve: list[dict[str, Any]]
    """Every 100 steps: ``step``, and per head and task the mean ``train`` loss since the last point and the
    ``validation`` loss."""


def _build(spec: HeadSpec, geometry: Geometry, labels: PatchLabels, seed: int) -> nn.Module:
    classes = labels.codes if spec.task == "majority" else labels.classes
    # Keyed by what the head is: it starts the same whichever others are trained beside it.
    with rng.seeded_globals(seed, f"probe head {spec.label} {spec.task}"):
        return build_head(spec.head, geometry, classes, spec.task, spec.intervention)


def train_heads(
    features: Tensor,
    labels: PatchLabels,
    specs: Iterable[HeadSpec],
    geometry: Geometry,
    config: ProbeConfig,
    *,
    validation: tuple[Tensor, PatchLabels] | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> TrainedHeads:
    """Train all heads over one stream of cached features.

    Heads share batches and optimiser and nothing else: AdamW works on each number alone and no gradient norm
    is taken, so a head trained among others equals the same head trained alone.

    Args:
        features: ``(N, P + n, d)``.
        labels: Of the same images.
        specs: What to train.
        geometry: Of the backbone the features come from.
        config: Seed, steps, batch, rates and precision.
        validation: Features and labels for the validation-loss curve; no choice is made with it.
        device: Where to train; features stay where they are and go over batch by batch.
        progress: Told of each step.

    Raises:
        UserError: the warm-up is longer than the training.
        RunFailure: a loss is not finite.
    """
    device = torch.device(device)
    steps, warmup = config.resolved(len(features))
    if not 0 <= warmup < steps:
        raise UserError(f"warm-up of {warmup} steps must be shorter than the training of {steps} steps")
    heads = {spec: _build(spec, geometry, labels, config.seed).to(device) for spec in specs}
    parameters = [p for head in heads.values() for p in head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    stream = SampleStream(config.seed, len(features))
    running, since = torch.zeros(len(heads), device=device), 0
    curve: list[dict[str, Any]] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, warmup, config.lr, config.final_lr)
        rows = torch.from_numpy(stream.indices(step * config.batch, (step + 1) * config.batch))
        losses = _losses(heads, features[rows], labels[rows], config, device)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        running, since = running + losses.detach(), since + 1
        if (step + 1) % CURVE_EVERY == 0 or step + 1 == steps:
            held_out = _validation_losses(heads, validation, config, device)
            curve.append(_curve_point(step + 1, heads, running / since, held_out))
            running, since = torch.zeros_like(running), 0
        if progress is not None:
            progress("heads", step + 1, steps)
    return TrainedHeads({spec: head.eval() for spec, head in heads.items()}, curve)


def uses_bfloat16(config: ProbeConfig, device: torch.device) -> bool:
    """Whether to compute in bfloat16 autocast."""
    return config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")


def _losses(
    heads: Mapping[HeadSpec, nn.Module],
    tokens: Tensor,
    labels: PatchLabels,
    config: ProbeConfig,
    device: torch.device,
) -> Tensor:
    """float32 ``(heads,)``."""
    tokens, labels = tokens.to(device).float(), labels.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(config, device)):
        return torch.stack([head_loss(spec, head(tokens), labels) for spec, head in heads.items()])


@torch.no_grad()
def _validation_losses(
    heads: Mapping[HeadSpec, nn.Module],
    validation: tuple[Tensor, PatchLabels] | None,
    config: ProbeConfig,
    device: torch.device,
) -> Tensor | None:
    if validation is None:
        return None
    features, labels = validation
    total = min(len(features), config.curve_images)
    losses = torch.zeros(len(heads), device=device)
    for begin in range(0, total, config.extract_batch):
        rows = slice(begin, min(begin + config.extract_batch, total))
        share = (rows.stop - rows.start) / total
        losses += share * _losses(heads, features[rows], labels[rows], config, device)
    return losses


def _curve_point(
    step: int, heads: Mapping[HeadSpec, nn.Module], train: Tensor, validation: Tensor | None
) -> dict[str, Any]:
    point: dict[str, Any] = {"step": step}
    for i, spec in enumerate(heads):
        if not math.isfinite(float(train[i])):
            raise RunFailure(f"the loss of the {spec.label} head ({spec.task}) is not finite by step {step}")
        losses = {"train": float(train[i])}
        if validation is not None:
            losses["validation"] = float(validation[i])
        point.setdefault(spec.label, {})[spec.task] = losses
    return point
