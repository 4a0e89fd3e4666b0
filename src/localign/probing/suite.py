"""The probing benchmark in one pass: frozen features, all heads and seeds together, one JSON-able result.

The backbone is frozen and in eval mode throughout. Under the ``fixed`` protocol nothing is chosen on the data
that is reported: every head is judged as the last training step left it, and the validation loss in the
curves only shows whether it converged. Under the ``published`` one each head is judged after every epoch and
its best is reported, which is what the benchmark's authors did; every outcome says which was used.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from localign.backbones.export import content_hash
from localign.engine.distributed import DistributedContext
from localign.engine.log import say
from localign.errors import UserError
from localign.options.names import Cache
from localign.options.probe import HeadSpec, ProbeConfig
from localign.probing.cache import extract_to_disk, gibibytes
from localign.probing.features import (
    DTYPES,
    Extraction,
    Features,
    LiveFeatures,
    extract_to_memory,
    free_ram,
    frozen,
    memory_place,
)
from localign.probing.heads import Geometry
from localign.probing.judging import BestEpochs, HeadMetrics, judge_heads, with_intervals
from localign.probing.segmentation import LabelledSource, labelled_batches
from localign.probing.training import Member, Progress, TrainedHeads, train_heads, uses_bfloat16

if TYPE_CHECKING:
    from localign.backbones.backbone import Backbone

Judged = tuple[str, HeadSpec]
"""A source's name and a head."""


class Probed(NamedTuple):
    """One seed on one backbone."""

    outcome: dict[str, Any]
    """JSON-able; see :func:`probe_heads`."""
    trained: TrainedHeads
    """Under the published protocol, the heads of the reported epochs."""
    recalls: dict[Judged, Tensor]
    """Macro recall in each bootstrap replicate, float64 ``(replicates,)``; images are drawn alike for all
    backbones and heads, so differences of two are paired."""


def probe(
    backbone: Backbone,
    train_source: LabelledSource,
    val_sources: LabelledSource | Mapping[str, LabelledSource],
    config: ProbeConfig | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """The outcomes of :func:`probe_heads`, one per seed, without the heads."""
    return [p.outcome for p in probe_heads(backbone, train_source, val_sources, config, **options)]


def probe_heads(
    backbone: Backbone,
    train_source: LabelledSource,
    val_sources: LabelledSource | Mapping[str, LabelledSource],
    config: ProbeConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    context: DistributedContext | None = None,
    cache_folder: Path | None = None,
    replace_cache: bool = True,
    progress: Progress | None = None,
) -> list[Probed]:
    """Train heads on one labelled source and judge them on others, all seeds in one pass.

    Args:
        backbone: Frozen; on the device of the world.
        train_source: Labelled images for the heads.
        val_sources: Where the heads are judged, by name; one alone is called ``val``. The first also gives
            the validation-loss curve.
        config: Published settings where missing.
        device: Where features are made and heads are trained, without ``world``.
        context: The ranks that share the work.
        cache_folder: Of a disk cache, with a folder for each source.
        replace_cache: Replace a cache of something else that is there, rather than refuse.
        progress: Told of each batch and step.

    Returns:
        Per seed the heads, and an outcome, JSON-able: ``config``, ``seed``, ``protocol``, ``backbone``,
        ``backbone_sha256``, ``classes``, ``class_kinds``, ``train`` (images, curve), ``results``
        (``{source: {head: {task: metrics}}}``), ``sources`` and ``seconds`` per stage, which all seeds share.
        The metrics have ``macro_recall_interval`` and, under the published protocol, ``best_epoch``.

    Raises:
        UserError: sources with different classes or without labels, unreadable data, features without a
            place, or another backbone's cache.
        RunFailure: features or losses that are not finite.
    """
    config = config or ProbeConfig()
    context = context or DistributedContext(0, 1, 0, torch.device(device))
    judges = dict(val_sources) if isinstance(val_sources, Mapping) else {"val": val_sources}
    sources = {"train": train_source, **judges}
    _check(backbone, sources, config, context)
    sha256 = content_hash(backbone.vit.state_dict())
    clock = [time.monotonic()]
    with frozen(backbone):
        extractions = {name: _extraction(backbone, sha256, s, config, context) for name, s in sources.items()}
        mode, place = _mode(list(extractions.values()), config, cache_folder)
        features = _features(extractions, mode, place, cache_folder, replace_cache, progress)
        training = features.pop("train")
        clock.append(time.monotonic())
        first = next(iter(features.values()))
        best = BestEpochs(first, config, context) if config.protocol == "published" else None
        trained = train_heads(
            training,
            config.specs(),
            Geometry.of(backbone),
            config,
            context,
            validation=first,
            after_epoch=best,
            progress=progress,
        )
        clock.append(time.monotonic())
        heads = {(one.seed, spec): head for one in trained for spec, head in one.heads.items()}
        judged = {
            name: judge_heads(heads, f, config, context, progress) if best is None else best.restored(heads)
            for name, f in features.items()
        }
    verdicts = {name: with_intervals(judgements) for name, judgements in judged.items()}
    clock.append(time.monotonic())
    steps, warmup = config.resolved(len(train_source))
    shared = {
        "config": {**asdict(config), "steps": steps, "warmup_steps": warmup, "cache": mode},
        "protocol": config.protocol,
        "backbone": backbone.name,
        "backbone_sha256": sha256,
        "classes": list(train_source.classes),
        "class_kinds": _kinds(train_source),
        "sources": {
            name: {"kind": s.kind, "images": len(s), "fingerprint": s.fingerprint()}
            for name, s in sources.items()
        },
        "seconds": dict(zip(("features", "training", "evaluation"), np.diff(clock).tolist(), strict=True)),
    }
    return [_probed(one, len(train_source), shared, verdicts) for one in trained]


def _probed(
    trained: TrainedHeads,
    images: int,
    shared: dict[str, Any],
    verdicts: Mapping[str, Mapping[Member, HeadMetrics]],
) -> Probed:
    """One seed's part of the results."""
    results: dict[str, dict[str, dict[str, Any]]] = {}
    recalls: dict[Judged, Tensor] = {}
    for source, heads in verdicts.items():
        results[source] = {}
        for (seed, spec), verdict in heads.items():
            if seed == trained.seed:
                results[source].setdefault(spec.label, {})[spec.task] = verdict.figures
                recalls[source, spec] = verdict.recalls
    train = {"images": images, "curve": trained.curve}
    return Probed({"seed": trained.seed, **shared, "train": train, "results": results}, trained, recalls)


def _kinds(source: LabelledSource) -> list[str] | None:
    kinds = getattr(source, "class_kinds", None)
    return None if kinds is None else list(kinds)


def _extraction(
    backbone: Backbone, sha256: str, source: LabelledSource, config: ProbeConfig, context: DistributedContext
) -> Extraction:
    return Extraction(
        backbone=backbone,
        sha256=sha256,
        source=source,
        dtype=DTYPES[config.cache_dtype],
        autocast=uses_bfloat16(config.precision, context.device),
        batch=config.extract_batch,
        workers=config.workers,
        context=context,
    )


def _check(
    backbone: Backbone,
    sources: Mapping[str, LabelledSource],
    config: ProbeConfig,
    context: DistributedContext,
) -> None:
    """Refuse what cannot be probed, before features are made."""
    if len(sources) < 2:
        raise UserError("probing needs a source to judge the heads on")
    if config.protocol == "published" and len(sources) > 2:
        raise UserError(
            "the published protocol chooses epochs on what it reports; give one source to judge on"
        )
    if config.batch % context.size:
        raise UserError(f"a batch of {config.batch} does not divide into {context.size} processes")
    for name, source in sources.items():
        if source.classes != sources["train"].classes:
            raise UserError(f"the source {name!r} has other classes than the training source")
        if len(source) < context.size:
            raise UserError(f"the source {name!r} has {len(source)} images for {context.size} processes")
        check_labels(name, source, backbone.image_size)
    config.resolved(len(sources["train"]))


def check_labels(name: str, source: LabelledSource, image_size: tuple[int, int]) -> None:
    """Refuse a source in which no image holds any class but class 0, "unlabeled".

    Looks at images one after the other until one does: usually at the first alone.

    Raises:
        UserError: there is none, or an image or label map is bad.
    """
    attributes = getattr(source, "attributes", None)
    for _, maps in labelled_batches(source, image_size, 1):
        codes = np.unique(maps.numpy())
        if attributes[codes][:, 1:].any() if attributes is not None else codes.any():
            return
    raise UserError(
        f"no image of the source {name!r} ({len(source)} images) has a positive label: "
        f"its label maps hold nothing but {source.classes[0]!r}"
    )


def _features(
    extractions: dict[str, Extraction],
    mode: Cache,
    place: torch.device,
    cache_folder: Path | None,
    replace_cache: bool,
    progress: Progress | None,
) -> dict[str, Features]:
    """The features of every source in a mode of :func:`_mode`."""

    def told(done: int, total: int) -> None:
        if progress is not None:
            progress("features", done, total)

    features: dict[str, Features] = {}
    for name, extraction in extractions.items():
        if mode == "none":
            features[name] = LiveFeatures(extraction)
        elif mode == "device":
            features[name] = extract_to_memory(extraction, place, told)
        else:
            assert cache_folder is not None
            features[name] = extract_to_disk(
                extraction, cache_folder / name, replace=replace_cache, told=told
            )
    return features


def _mode(
    extractions: list[Extraction], config: ProbeConfig, cache_folder: Path | None
) -> tuple[Cache, torch.device]:
    """``none``, ``disk`` or ``device``, and where in memory features are kept."""
    context, cpu = extractions[0].context, torch.device("cpu")
    if config.cache in ("none", "disk"):
        if config.cache == "disk" and cache_folder is None:
            raise UserError("a disk cache needs a folder")
        return config.cache, cpu
    needed = sum(e.bytes_per_image * len(e.source) for e in extractions)
    place = memory_place(needed, context)
    sizes = f"features take {gibibytes(needed)}, and {gibibytes(free_ram())} of memory are free"
    if place is not None:
        return "device", place
    if config.cache == "device":
        if needed > free_ram():
            raise UserError(f"{sizes}; --cache disk or --cache none")
        return "device", cpu
    if cache_folder is None:
        raise UserError(f"{sizes}; give a cache folder, or cache none")
    if context.is_main:
        say(f"{sizes}: keeping them on the disk")
    return "disk", cpu
