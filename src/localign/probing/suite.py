"""The probing benchmark in one pass: features once, all heads together, one JSON-able result.

The backbone is frozen and in eval mode throughout. Nothing is chosen on the data that is reported: every head is
judged as the last training step left it, and the validation loss in the curves only shows whether it converged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from localign import rng
from localign.data.loader import SampleStream
from localign.errors import RunFailure, UserError
from localign.probing.heads import Geometry, build_head
from localign.probing.labels import PatchLabels, reduce_labels
from localign.probing.metrics import MajorityCounts, MultiLabelCounts
from localign.probing.segmentation import LabelledSource, labelled_batches

if TYPE_CHECKING:
    from localign.backbones.backbone import Backbone

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
    """Tasks: ``local`` (classes in a patch), ``global`` (in the image), ``majority`` (of a patch's pixels)."""
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


@torch.no_grad()
def extract_features(
    backbone: Backbone,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    classes: int,
    attributes: NDArray[np.bool_] | None = None,
    count: int | None = None,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
    autocast: bool = False,
    progress: Progress | None = None,
) -> tuple[Tensor, PatchLabels]:
    """Last-layer tokens after the final norm, prefix tokens included, and the targets, of all images.

    Args:
        backbone: Put into eval mode for the pass, and back as it was.
        batches: uint8 ``(B, 3, H, W)`` images and integer ``(B, H, W)`` label maps.
        classes: C of the local and the global task.
        attributes: bool ``(codes, C)`` where label maps hold codes.
        count: How many images there will be; saves holding the features twice while they are put together.
        dtype: Of the cached features.
        device: Where the backbone is.
        autocast: Run the backbone in bfloat16 autocast.
        progress: Told of each batch.

    Returns:
        Features ``(N, P + n, d)`` and targets, on the CPU.

    Raises:
        RunFailure: features that are not finite in ``dtype``.
    """
    device = torch.device(device)
    table = None if attributes is None else torch.from_numpy(np.ascontiguousarray(attributes))
    was_training = backbone.training
    backbone.eval()
    parts: list[Tensor] = []
    targets: list[PatchLabels] = []
    store: Tensor | None = None
    done = 0
    try:
        for images, maps in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                tokens = backbone.tokens(backbone.normalise(images.to(device)))
            tokens = tokens.to("cpu", dtype)
            if not bool(torch.isfinite(tokens).all()):
                raise RunFailure(f"features of {backbone.name} are not finite in {dtype}; try float32")
            targets.append(reduce_labels(maps, backbone.patch_size, classes, table))
            if count is None:
                parts.append(tokens)
            else:
                store = tokens.new_empty(count, *tokens.shape[1:]) if store is None else store
                store[done : done + len(tokens)] = tokens
            done += len(tokens)
            if progress is not None:
                progress("features", done, count or 0)
    finally:
        backbone.train(was_training)
    if not targets or (count is not None and done != count):
        raise RunFailure(f"feature extraction got {done} images of {count}")
    return (torch.cat(parts) if store is None else store), PatchLabels.cat(targets)


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

    Heads share batches and optimiser and nothing else: AdamW works on each number alone and no gradient norm is
    taken, so a head trained among others equals the same head trained alone.

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
    if warmup >= steps > 1 or warmup < 0:
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


def _autocast(config: ProbeConfig, device: torch.device) -> torch.autocast:
    enabled = config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def _losses(
    heads: Mapping[HeadSpec, nn.Module],
    tokens: Tensor,
    labels: PatchLabels,
    config: ProbeConfig,
    device: torch.device,
) -> Tensor:
    """float32 ``(heads,)``."""
    tokens, labels = tokens.to(device).float(), labels.to(device)
    with _autocast(config, device):
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


@torch.no_grad()
def evaluate_heads(
    heads: Mapping[HeadSpec, nn.Module],
    features: Tensor,
    labels: PatchLabels,
    config: ProbeConfig,
    device: torch.device | str = "cpu",
) -> dict[str, dict[str, Any]]:
    """Every head's figures, ``{head label: {task: metrics}}``; see the metrics' ``compute``."""
    device = torch.device(device)
    counts: dict[HeadSpec, MajorityCounts | MultiLabelCounts] = {
        spec: MajorityCounts(labels.codes, device)
        if spec.task == "majority"
        else MultiLabelCounts(labels.classes, device)
        for spec in heads
    }
    for begin in range(0, len(features), config.extract_batch):
        rows = slice(begin, begin + config.extract_batch)
        tokens, target = features[rows].to(device).float(), labels[rows].to(device)
        for spec, head in heads.items():
            with _autocast(config, device):
                logits = head(tokens)
            count = counts[spec]
            if isinstance(count, MajorityCounts):
                count.update(logits, target.majority)
            elif spec.task == "local":
                count.update(logits, target.patch)
            else:
                count.update(logits, target.image, target.patch)
    results: dict[str, dict[str, Any]] = {}
    for spec, count in counts.items():
        results.setdefault(spec.label, {})[spec.task] = count.compute()
    return results


def probe(
    backbone: Backbone,
    train_source: LabelledSource,
    val_sources: LabelledSource | Mapping[str, LabelledSource],
    config: ProbeConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train heads on one labelled source and judge them on others.

    Args:
        backbone: Frozen; on ``device``.
        train_source: Labelled images for the heads.
        val_sources: Where the heads are judged, by name; one alone is called ``val``. The first also gives the
            validation-loss curve.
        config: Published settings where missing.
        device: Where features are made and heads are trained.
        progress: Told of each batch and step.

    Returns:
        JSON-able: ``config``, ``backbone``, ``classes``, ``train`` (images, steps, curve), ``results``
        (``{source: {head: {task: metrics}}}``), ``sources`` and ``seconds`` per stage.

    Raises:
        UserError: sources with different classes, or unreadable data.
        RunFailure: features or losses that are not finite.
    """
    config = config or ProbeConfig()
    sources = dict(val_sources) if isinstance(val_sources, Mapping) else {"val": val_sources}
    for name, source in sources.items():
        if source.classes != train_source.classes:
            raise UserError(f"the source {name!r} has other classes than the training source")
    if not sources:
        raise UserError("probing needs a source to judge the heads on")

    def features_of(source: LabelledSource) -> tuple[Tensor, PatchLabels]:
        return extract_features(
            backbone,
            labelled_batches(source, backbone.image_size, config.extract_batch, config.workers),
            classes=len(source.classes),
            attributes=getattr(source, "attributes", None),
            count=len(source),
            dtype=DTYPES[config.cache_dtype],
            device=device,
            autocast=_autocast(config, torch.device(device))._enabled,
            progress=progress,
        )

    clock = [time.monotonic()]
    features, labels = features_of(train_source)
    judged = {name: features_of(source) for name, source in sources.items()}
    clock.append(time.monotonic())
    geometry = Geometry.of(backbone)
    validation = next(iter(judged.values()))
    trained = train_heads(
        features,
        labels,
        config.specs(),
        geometry,
        config,
        validation=validation,
        device=device,
        progress=progress,
    )
    clock.append(time.monotonic())
    results = {name: evaluate_heads(trained.heads, *data, config, device) for name, data in judged.items()}
    clock.append(time.monotonic())
    steps, warmup = config.resolved(len(features))
    described = {"train": train_source, **sources}
    return {
        "config": {**asdict(config), "steps": steps, "warmup_steps": warmup},
        "backbone": backbone.name,
        "classes": list(train_source.classes),
        "train": {"images": len(features), "curve": trained.curve},
        "sources": {
            name: {"kind": s.kind, "images": len(s), "fingerprint": s.fingerprint()}
            for name, s in described.items()
        },
        "results": results,
        "seconds": dict(zip(("features", "training", "evaluation"), np.diff(clock).tolist(), strict=True)),
    }
