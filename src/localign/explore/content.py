"""From models and images to the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from localign._version import __version__
from localign.alignment.student import Student
from localign.alignment.teacher import Teacher
from localign.backbones import Backbone
from localign.engine.progress import ProgressCallback, progress_bars
from localign.explore.answers import Answers
from localign.explore.blob import Blob
from localign.explore.features import Colours, PageFeatures, joint_colours, page_features
from localign.explore.images import ShownImages, without_folders
from localign.explore.masked import MAX_ERROR, MaskedViews, masked_views
from localign.explore.page import build_page
from localign.explore.predictions import Predictions
from localign.options.export import ExploreConfig
from localign.text.printing import printable

Alignment = tuple[str, Student, Teacher]
"""Name of an aligned model, and what its masked views need."""


def assemble(
    config: ExploreConfig,
    models: Mapping[str, Backbone],
    shown: ShownImages,
    device: torch.device,
    *,
    alignment: Alignment | None = None,
    predictions: Predictions | None = None,
    answers: Answers | None = None,
    home: str = "",
) -> tuple[str, str]:
    """The page, and in words how many images and patches it holds and how exact it is.

    Args:
        config: The options.
        models: By name.
        shown: The images.
        device: Device to compute on.
        alignment: For masked views.
        predictions: Of the first images.
        answers: Of vision-language models.
        home: Address of a link at the top of the page; empty for none.
    """
    with progress_bars() as progress:
        features = [
            _features_of(backbone, shown.pixels[name], config, device, progress)
            for name, backbone in models.items()
        ]
        views = None
        if alignment is not None:
            _, student, teacher = alignment
            pixels = shown.pixels[next(iter(models))]
            views = masked_views(student, teacher, pixels, device=device, seed=config.seed, progress=progress)
    blob = Blob()
    colours = joint_colours(features)
    content: dict[str, Any] = {
        "version": __version__,
        "home": home,
        "models": [
            _model_facts(config, name, backbone, found, colour)
            for (name, backbone), found, colour in zip(models.items(), features, colours, strict=True)
        ],
        "images": [{"name": name, "uri": uri} for name, uri in zip(shown.names, shown.uris, strict=True)],
    }
    for number, (found, colour) in enumerate(zip(features, colours, strict=True)):
        _add_features(blob, number, found, colour)
    if predictions is not None:
        content["predictions"] = {"images": len(predictions.images), "classes": predictions.classes}
        blob.add("truth", predictions.truth.astype(np.uint8))
        for number, probability in enumerate(predictions.probabilities):
            blob.add(f"probability{number}", probability)
    if alignment is not None and views is not None:
        content["masks"] = _add_views(blob, alignment[0], views)
    if answers is not None:
        content["answers"] = asdict(answers) | {"models": [printable(name) for name in answers.models]}
    content["arrays"] = blob.places
    patches = sum(found.features.shape[0] * found.features.shape[1] for found in features)
    error = max(found.error for found in features)
    facts = f"{len(shown.names)} images, {patches:,} patches; similarities within {error:.4f}"
    return build_page(content, blob.bytes()), facts


def _features_of(
    backbone: Backbone,
    images: Sequence[Tensor],
    config: ExploreConfig,
    device: torch.device,
    progress: ProgressCallback,
) -> PageFeatures:
    found = page_features(
        backbone.to(device),
        images,
        dtype=config.dtype,
        attention=config.attention,
        batch_size=config.batch_size,
        progress=progress,
    )
    backbone.cpu()
    return found


def _model_facts(
    config: ExploreConfig, name: str, backbone: Backbone, found: PageFeatures, colour: Colours
) -> dict[str, Any]:
    return {
        "name": printable(name),
        "source": without_folders(config.named_models()[name]),
        "grid": list(backbone.grid),
        "size": list(backbone.image_size),
        "patch": list(backbone.patch_size),
        "mean": [round(value * 255) for value in backbone.mean],
        "error": found.error,
        "basis": colour.basis,
        "share": [round(value, 4) for value in colour.share],
    }


def _add_features(blob: Blob, number: int, found: PageFeatures, colour: Colours) -> None:
    blob.add(f"features{number}", found.features)
    blob.add(f"colours{number}", colour.rgb)
    if found.attention is not None:
        assert found.attention_peak is not None
        assert found.attention_prefix is not None
        blob.add(f"attention{number}", found.attention)
        blob.add(f"peak{number}", found.attention_peak)
        blob.add(f"prefix{number}", found.attention_prefix)


def _add_views(blob: Blob, name: str, views: MaskedViews) -> dict[str, Any]:
    blob.add("order", views.order)
    blob.add("target", views.target)
    blob.add("reconstruction", views.reconstruction)
    blob.add("patch_error", views.patch_error)
    blob.add("view_error", views.error)
    return {"hidden": views.hidden, "name": printable(name), "max_error": MAX_ERROR}
