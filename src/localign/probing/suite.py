"""The probing benchmark in one pass: frozen features, all heads and seeds together, and results for JSON.

The backbone is frozen and in eval mode throughout. With the ``fixed`` protocol nothing is chosen on the reported
images. A training of a fixed length is evaluated as its last step left it, and the validation loss only shows whether
a head has converged; a training until convergence is steered by a held-out part of the training images. With the
``published`` protocol each head is evaluated after every epoch and its best epoch is reported, as the benchmark's
authors did. Every outcome names its protocol.
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
from localign.backbones.native import check_native
from localign.data.transforms import NativeView
from localign.engine.distributed import DistributedContext
from localign.engine.log import say
from localign.engine.progress import ProgressCallback
from localign.engine.schedule import computes_in_bf16
from localign.errors import UserError
from localign.options.names import Cache
from localign.options.probe import HeadSpec, ProbeConfig
from localign.probing.cache import extract_to_disk, format_bytes
from localign.probing.evaluation import BestEpochs, HeadMetrics, evaluate_heads, with_intervals
from localign.probing.features import (
    DTYPES,
    Extraction,
    Features,
    LiveFeatures,
    eval_mode,
    extract_to_memory,
)
from localign.probing.heads import Geometry
from localign.probing.memory import free_ram, memory_device
from localign.probing.segmentation import LabelledSource, ignores_pixels, labelled_batches
from localign.probing.training import SeededHead, TrainedHeads, held_out_rows, train_heads
from localign.results import Metrics, ProbeOutcome, RecallDifference, all_converged
from localign.statistics.bootstrap import percentile_interval

if TYPE_CHECKING:
    from localign.backbones.backbone import Backbone

TEST_SOURCE = "test"
"""Name of the test images in the results of commands."""

SourceHead = tuple[str, HeadSpec]
"""The name of a source, and a head that was evaluated on it."""


class Probed(NamedTuple):
    """The results of one seed on one backbone."""

    outcome: ProbeOutcome
    """Results for JSON, see :func:`probe_heads`."""
    trained: TrainedHeads
    """The heads; with the published protocol, as they were after the reported epochs."""
    recalls: dict[SourceHead, Tensor]
    """Macro recall in each bootstrap replicate, float64 ``(replicates,)``. All backbones and heads are evaluated on the
    same draws of images, so that differences are paired."""


def probe(
    backbone: Backbone,
    train_source: LabelledSource,
    val_sources: LabelledSource | Mapping[str, LabelledSource],
    config: ProbeConfig | None = None,
    **options: Any,
) -> list[ProbeOutcome]:
    """Like :func:`probe_heads`, but returns only the outcomes, one per seed."""
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
    progress: ProgressCallback | None = None,
    max_patches: int | None = None,
) -> list[Probed]:
    """Train heads on one labelled source and evaluate them on others, all seeds in one pass.

    Args:
        backbone: The frozen backbone, on the device of ``context`` or ``device``.
        train_source: Labelled images to train heads on.
        val_sources: Sources to evaluate heads on, by name; a single source gets the name ``val``. The first source
            also gives the validation-loss curve.
        config: Default: the published settings.
        device: Device of features and heads, if there is no ``context``.
        context: The ranks that share the work; default: this process alone.
        cache_folder: Folder of the disk cache, with a subfolder for each source.
        replace_cache: If the folder holds other features, delete them instead of raising an error.
        progress: Called after each batch and step.
        max_patches: Each image keeps its aspect ratio and is resized to at most this many patches; linear and MLP heads
            only. Default: one size for all images.

    Returns:
        For each seed the heads and an outcome: ``config``, ``seed``, ``protocol``, ``backbone``, ``backbone_sha256``,
        ``classes``, ``class_kinds``, ``train`` (images, held_out, convergence, curve), ``results``
        (``{source: {head: {task: metrics}}}``), ``sources``, and ``seconds`` by stage, which all seeds share. The
        metrics include ``macro_recall_interval`` and, with the published protocol, ``best_epoch``.

    Raises:
        UserError: Sources differ in their classes, a source has no labels, data cannot be read, there is no room for
            the features, or the cache belongs to another backbone.
        RunFailure: Features or losses are not finite.
    """
    config = config or ProbeConfig()
    context = context or DistributedContext(0, 1, 0, torch.device(device))
    val_sources = dict(val_sources) if isinstance(val_sources, Mapping) else {"val": val_sources}
    sources = {"train": train_source, **val_sources}
    _check(backbone, sources, config, context)
    native = None if max_patches is None else _native_view(backbone, config, max_patches)
    sha256 = content_hash(backbone.vit.state_dict())
    clock = [time.monotonic()]
    with eval_mode(backbone):
        extractions = {
            name: _extraction(backbone, sha256, s, config, context, native) for name, s in sources.items()
        }
        mode, storage = _cache_mode(list(extractions.values()), config, cache_folder)
        features = _features(extractions, mode, storage, cache_folder, replace_cache, progress)
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
            validation=None if config.until_converged else first,
            after_epoch=best,
            progress=progress,
        )
        clock.append(time.monotonic())
        heads = {(t.seed, spec): head for t in trained for spec, head in t.heads.items()}
        counts = {
            name: evaluate_heads(heads, f, config, context, progress) if best is None else best.restore(heads)
            for name, f in features.items()
        }
    metrics = {name: with_intervals(source_counts) for name, source_counts in counts.items()}
    clock.append(time.monotonic())
    steps, warmup = config.resolved(len(train_source))
    if config.until_converged:
        steps = max(c["steps"] for t in trained for tasks in t.convergence.values() for c in tasks.values())
        held_out = len(held_out_rows(len(train_source), config)[1])
    else:
        held_out = min(config.curve_images, len(first))
    shared: ProbeOutcome = {
        "config": {**asdict(config), "steps": steps, "warmup_steps": warmup, "cache": mode},
        "protocol": config.protocol,
        "backbone": backbone.name,
        "backbone_sha256": sha256,
        "classes": list(train_source.classes),
        "class_kinds": None if train_source.class_kinds is None else list(train_source.class_kinds),
        "sources": {
            name: {"kind": s.kind, "images": len(s), "fingerprint": s.fingerprint()}
            for name, s in sources.items()
        },
        "seconds": dict(zip(("features", "training", "evaluation"), np.diff(clock).tolist(), strict=True)),
    }
    images = {"images": len(train_source), "held_out": held_out}
    return [_probed(t, images, shared, metrics) for t in trained]


def differences(name: str, ours: list[Probed], against: str, theirs: list[Probed]) -> list[RecallDifference]:
    """The gain of one backbone over another: means over seeds, with paired bootstrap intervals over images.

    Args:
        name, against: The names of the two backbones in results.
        ours, theirs: Their seeds, with the same heads judged on the same images.

    Returns:
        One entry for each source, head and task.
    """
    found: list[RecallDifference] = []
    for source, spec in ours[0].recalls:
        means = [_mean_recall(seeds, source, spec) for seeds in (ours, theirs)]
        replicates = [
            torch.stack([p.recalls[source, spec] for p in seeds]).mean(0) for seeds in (ours, theirs)
        ]
        found.append(
            {
                "name": name,
                "against": against,
                "head": spec.label,
                "task": spec.task,
                "source": source,
                "difference": None if means[0] is None or means[1] is None else means[0] - means[1],
                "interval": percentile_interval(replicates[0] - replicates[1]),
                "converged": all_converged([p.outcome for p in (*ours, *theirs)], spec.label, spec.task),
            }
        )
    return found


def _mean_recall(seeds: list[Probed], source: str, spec: HeadSpec) -> float | None:
    """Macro recall, mean over seeds; None if it is undefined for a seed."""
    recalls = [p.outcome["results"][source][spec.label][spec.task]["macro_recall"] for p in seeds]
    defined = [recall for recall in recalls if recall is not None]
    return float(np.mean(defined)) if len(defined) == len(recalls) else None


def _probed(
    trained: TrainedHeads,
    images: Mapping[str, int],
    shared: ProbeOutcome,
    metrics: Mapping[str, Mapping[SeededHead, HeadMetrics]],
) -> Probed:
    """The results of one seed."""
    results: dict[str, dict[str, dict[str, Metrics]]] = {}
    recalls: dict[SourceHead, Tensor] = {}
    for source, heads in metrics.items():
        results[source] = {}
        for (seed, spec), head_metrics in heads.items():
            if seed == trained.seed:
                results[source].setdefault(spec.label, {})[spec.task] = head_metrics.metrics
                recalls[source, spec] = head_metrics.recalls
    outcome: ProbeOutcome = {
        "seed": trained.seed,
        **shared,
        "train": {
            "images": images["images"],
            "held_out": images["held_out"],
            "convergence": trained.convergence,
            "curve": trained.curve,
        },
        "results": results,
    }
    return Probed(outcome, trained, recalls)


def _native_view(backbone: Backbone, config: ProbeConfig, max_patches: int) -> NativeView:
    """Raises UserError if the backbone or a head takes images of one size only."""
    check_native(backbone)
    if any(spec.head == "transformer" for spec in config.specs()):
        raise UserError(
            "transformer heads have positions of one grid; with --max-patches give --heads mlp linear"
        )
    if "global" in config.tasks and not backbone.num_prefix_tokens:
        raise UserError(
            f"{backbone.name} has no class token, and the mean token would count padding; with --max-patches give "
            "--tasks local majority"
        )
    return NativeView(backbone.patch_size, max_patches, backbone.preprocessing.interpolation or "bilinear")


def _extraction(
    backbone: Backbone,
    sha256: str,
    source: LabelledSource,
    config: ProbeConfig,
    context: DistributedContext,
    native: NativeView | None,
) -> Extraction:
    return Extraction(
        backbone=backbone,
        sha256=sha256,
        source=source,
        dtype=DTYPES[config.cache_dtype],
        autocast=computes_in_bf16(config, context.device.type),
        batch=config.extract_batch,
        workers=config.workers,
        context=context,
        native=native,
    )


def _check(
    backbone: Backbone,
    sources: Mapping[str, LabelledSource],
    config: ProbeConfig,
    context: DistributedContext,
) -> None:
    """Raise UserError for input that cannot be probed, before features are computed."""
    if len(sources) < 2:
        raise UserError("probing needs a source to evaluate the heads on")
    if config.protocol == "published" and len(sources) > 2:
        raise UserError(
            "the published protocol chooses epochs on the reported images; give one source to evaluate on"
        )
    if config.batch % context.size:
        raise UserError(f"a batch of {config.batch} cannot be divided evenly among {context.size} processes")
    for name, source in sources.items():
        if source.classes != sources["train"].classes:
            raise UserError(
                f"the classes of the source {name!r} differ from the classes of the training source"
            )
        if len(source) < context.size:
            raise UserError(
                f"the source {name!r} has {len(source)} images, too few for {context.size} processes"
            )
        check_labels(name, source, backbone.image_size)
    config.resolved(len(sources["train"]))
    if config.until_converged:
        held_out_rows(len(sources["train"]), config)


def check_labels(name: str, source: LabelledSource, image_size: tuple[int, int]) -> None:
    """Check that some image of a source has a class other than class 0, "unlabeled".

    Reads images until it finds one: usually only the first.

    Raises:
        UserError: No image has another class, or an image or label map is bad.
    """
    for _, maps in labelled_batches(source, image_size, 1):
        codes = np.unique(maps.numpy())
        if ignores_pixels(source):
            codes = codes[
                codes < (len(source.classes) if source.attributes is None else len(source.attributes))
            ]
        if codes.any() if source.attributes is None else source.attributes[codes][:, 1:].any():
            return
    raise UserError(
        f"no image of the source {name!r} ({len(source)} images) has a positive label: "
        f"all pixels are {source.classes[0]!r}{' or ignored' if ignores_pixels(source) else ''}"
    )


def _features(
    extractions: dict[str, Extraction],
    mode: Cache,
    storage: torch.device,
    cache_folder: Path | None,
    replace_cache: bool,
    progress: ProgressCallback | None,
) -> dict[str, Features]:
    """The features of every source, in the mode and storage that :func:`_cache_mode` has chosen."""

    def on_progress(done: int, total: int) -> None:
        if progress is not None:
            progress("features", done, total)

    features: dict[str, Features] = {}
    for name, extraction in extractions.items():
        if mode == "none":
            features[name] = LiveFeatures(extraction)
        elif mode == "device":
            features[name] = extract_to_memory(extraction, storage, on_progress)
        else:
            assert cache_folder is not None
            features[name] = extract_to_disk(
                extraction, cache_folder / name, replace=replace_cache, on_progress=on_progress
            )
    return features


def _cache_mode(
    extractions: list[Extraction], config: ProbeConfig, cache_folder: Path | None
) -> tuple[Cache, torch.device]:
    """The mode, ``none``, ``disk`` or ``device``, and for ``device`` the device that stores the features."""
    context, cpu = extractions[0].context, torch.device("cpu")
    if config.cache in ("none", "disk"):
        if config.cache == "disk" and cache_folder is None:
            raise UserError("the disk cache needs a folder")
        return config.cache, cpu
    needed = sum(e.bytes_per_image * len(e.source) for e in extractions)
    storage = memory_device(needed, context)
    sizes = f"the features need {format_bytes(needed)}, and {format_bytes(free_ram())} of memory are free"
    if storage is not None:
        return "device", storage
    if config.cache == "device":
        if needed > free_ram():
            raise UserError(f"{sizes}; give --cache disk or --cache none")
        return "device", cpu
    if cache_folder is None:
        raise UserError(f"{sizes}; give a cache folder, or the cache mode none")
    if context.is_main:
        say(f"{sizes}: the features are stored on disk")
    return "disk", cpu
