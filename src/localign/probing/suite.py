"""The probing benchmark in one pass: features once, all heads together, one JSON-able result.

The backbone is frozen and in eval mode throughout. Nothing is chosen on the data that is reported: every head
is judged as the last training step left it, and the validation loss in the curves only shows whether it
converged.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from localign.errors import RunFailure, UserError
from localign.probing.heads import Geometry
from localign.probing.labels import PatchLabels, reduce_labels
from localign.probing.metrics import MajorityCounts, MultiLabelCounts
from localign.probing.segmentation import LabelledSource, labelled_batches
from localign.probing.training import (
    DTYPES,
    HeadSpec,
    ProbeConfig,
    Progress,
    TrainedHeads,
    train_heads,
    uses_bfloat16,
)

if TYPE_CHECKING:
    from localign.backbones.backbone import Backbone


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
            with torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(config, device)):
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
    """The result of :func:`probe_heads` without the heads."""
    return probe_heads(backbone, train_source, val_sources, config, device=device, progress=progress)[0]


def probe_heads(
    backbone: Backbone,
    train_source: LabelledSource,
    val_sources: LabelledSource | Mapping[str, LabelledSource],
    config: ProbeConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> tuple[dict[str, Any], TrainedHeads]:
    """Train heads on one labelled source and judge them on others.

    Args:
        backbone: Frozen; on ``device``.
        train_source: Labelled images for the heads.
        val_sources: Where the heads are judged, by name; one alone is called ``val``. The first also gives
            the validation-loss curve.
        config: Published settings where missing.
        device: Where features are made and heads are trained.
        progress: Told of each batch and step.

    Returns:
        JSON-able: ``config``, ``backbone``, ``classes``, ``train`` (images, steps, curve), ``results``
        (``{source: {head: {task: metrics}}}``), ``sources`` and ``seconds`` per stage. And the heads.

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
            autocast=uses_bfloat16(config, torch.device(device)),
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
    outcome = {
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
    return outcome, trained
