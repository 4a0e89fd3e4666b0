"""`localign explore`: gathers what the page shows, and writes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from localign._version import __version__
from localign.backbones import Backbone, create_backbone
from localign.data.images import print_notice
from localign.data.sources import UnreadableImage, open_source
from localign.data.transforms import EvalTransform
from localign.engine.distributed import choose_device
from localign.engine.log import say
from localign.engine.progress import ProgressCallback, progress_bars
from localign.errors import UserError
from localign.explore.answers import Answers, read_common_answers
from localign.explore.attention import shows_attention
from localign.explore.blob import Blob
from localign.explore.features import Colours, PageFeatures, bytes_per_image, joint_colours, page_features
from localign.explore.masked import MAX_ERROR, MaskedViews, aligned_student, masked_views
from localign.explore.page import build_page, data_uri
from localign.explore.predictions import Predictions, read_predictions
from localign.files import replace_text
from localign.options.export import ExploreConfig
from localign.options.names import EMBEDDED
from localign.text.printing import printable

_MIB = 2**20
_BASE64 = 4 / 3


def run_explore(config: ExploreConfig) -> None:
    """Write the page.

    Raises:
        UserError: A model, image source, probing or evaluation cannot be read or does not fit, or the page would be
            larger than ``--max-mib``.
    """
    page, facts = explore(config)
    size = len(page.encode()) / _MIB
    say(f"page       {size:.1f} MiB ({facts})")
    if size > config.max_mib:
        raise UserError(_too_large(size, config))
    replace_text(config.out, page)
    print(f"explore    {printable(config.out)}: open it in a browser; it needs no network")


def explore(config: ExploreConfig) -> tuple[str, str]:
    """The page, and in words how many images and patches it holds and how exact it is."""
    device = choose_device(config.device)
    answers = read_common_answers(config.named_answers(), config.questions) if config.vlm else None
    models = _load_models(config)
    predictions = None if config.probe is None else read_predictions(config.probe, models, config.limit)
    shown = _gather_images(config, list(models.values()), predictions)
    with progress_bars() as progress:
        features = [
            _features_of(backbone, shown.pixels[name], config, device, progress)
            for name, backbone in models.items()
        ]
        views = _views(config, models, shown, device, progress) if config.masks else None
    blob = Blob()
    colours = joint_colours(features)
    content: dict[str, Any] = {
        "version": __version__,
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
    if views is not None:
        content["masks"] = _add_views(blob, *views)
    if answers is not None:
        content["answers"] = asdict(answers) | {"models": [printable(name) for name in answers.models]}
        _say_unreadable(answers)
    content["arrays"] = blob.places
    patches = sum(found.features.shape[0] * found.features.shape[1] for found in features)
    error = max(found.error for found in features)
    facts = f"{len(shown.names)} images, {patches:,} patches; similarities within {error:.4f}"
    return build_page(content, blob.bytes()), facts


def _load_models(config: ExploreConfig) -> dict[str, Backbone]:
    """Raises UserError if a model cannot be loaded, or models see different parts of an image."""
    loaded: dict[str, Backbone] = {}
    options: dict[str, Any] = {
        "weights": config.weights,
        "model_kwargs": config.model_kwargs,
        "seed": config.seed,
    }
    for name, source in config.named_models().items():
        own = (
            {} if Path(source).is_dir() or source == EMBEDDED else options
        )  # folders have weights of their own
        loaded[name] = create_backbone(source, image_size=config.image_size, **own).eval()
    first, *others = loaded.items()
    for name, backbone in others:
        (rows, columns), (other_rows, other_columns) = first[1].image_size, backbone.image_size
        if rows * other_columns != columns * other_rows:
            raise UserError(
                f"{printable(first[0])} takes images of {rows} x {columns} pixels and {printable(name)} of "
                f"{other_rows} x {other_columns}; they would see different parts of an image: give one --image-size"
            )
    return loaded


@dataclass(frozen=True)
class _Shown:
    """The images of a page."""

    names: list[str]
    uris: list[str]
    pixels: dict[str, list[Tensor]]
    """By model, uint8 ``(3, height, width)``; models with the same input share tensors."""


def _gather_images(
    config: ExploreConfig, models: Sequence[Backbone], predictions: Predictions | None
) -> _Shown:
    """Read the images; unreadable ones are left out, which is said.

    Raises:
        UserError: No image can be read, or the features alone would make the page too large.
    """
    names, pictures = [], []
    if predictions is not None:
        pictures = [torch.from_numpy(image) for image in predictions.images]
        names = [f"picture {number + 1} of {printable(config.probe)}" for number in range(len(pictures))]
    kinds = {
        (b.image_size, b.preprocessing): EvalTransform(b.image_size, "square", b.preprocessing)
        for b in models
    }
    inputs: dict[Any, list[Tensor]] = {kind: list(pictures) for kind in kinds}
    left = config.limit - len(pictures)
    bad: list[tuple[str, str]] = []
    if config.images and left > 0:
        source = open_source(config.images, image_size=models[0].image_size, scaled_decode=False)
        print_notice(source)
        _check_size(config, models, len(pictures) + min(left, len(source)))
        for index in range(len(source)):
            if len(names) == config.limit:
                break
            try:
                image = source.load(index)
            except UnreadableImage as error:
                bad.append((source.name(index), str(error)))
                continue
            for kind, transform in kinds.items():
                inputs[kind].append(transform(image))
            names.append(printable(source.name(index)))
    else:
        _check_size(config, models, len(pictures))
    if bad:
        name, reason = bad[0]
        say(
            f"{len(bad)} images cannot be read and are left out; the first is {printable(name)}: {printable(reason)}"
        )
    if not names:
        raise UserError(f"none of the images of {printable(config.images)} can be read")
    largest = max(kinds, key=lambda kind: kind[0])
    uris = [_uri(image) for image in inputs[largest]]
    named = config.named_models()
    return _Shown(
        names,
        uris,
        {name: inputs[b.image_size, b.preprocessing] for name, b in zip(named, models, strict=True)},
    )


def _uri(pixels: Tensor) -> str:
    return data_uri(Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())))


def _check_size(config: ExploreConfig, models: Sequence[Backbone], count: int) -> None:
    """Refuse a page that is too large before the models run."""
    per_image = sum(bytes_per_image(b, config.dtype, config.attention and shows_attention(b)) for b in models)
    size = per_image * count * _BASE64 / _MIB
    if size > config.max_mib:
        raise UserError(_too_large(size, config, "at least "))


def _too_large(size: float, config: ExploreConfig, least: str = "") -> str:
    smaller = ["--dtype int8"] * (config.dtype != "int8") + ["--attention false"] * config.attention
    share = max(1, int(config.limit * config.max_mib / size))
    ways = ", ".join([f"--limit {share}" if share < config.limit else "a smaller --limit", *smaller])
    return (
        f"the page would have {least}{size:.1f} MiB, more than --max-mib {config.max_mib:g}; give {ways}, or "
        f"--max-mib {int(size) + 2}"
    )


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


def _views(
    config: ExploreConfig,
    models: dict[str, Backbone],
    shown: _Shown,
    device: torch.device,
    progress: ProgressCallback,
) -> tuple[str, MaskedViews] | None:
    """The name and masked views of the first model that is an alignment of the page's first model."""
    baseline, *others = models
    reasons = []
    for name in others:
        found = aligned_student(config.named_models()[name], models[name], models[baseline])
        if isinstance(found, str):
            reasons.append(f"{printable(name)} {found}")
            continue
        student, teacher = found
        views = masked_views(
            student, teacher, shown.pixels[baseline], device=device, seed=config.seed, progress=progress
        )
        return name, views
    say(f"no masked views: {'; '.join(reasons)}")
    return None


def _model_facts(
    config: ExploreConfig, name: str, backbone: Backbone, found: PageFeatures, colour: Colours
) -> dict[str, Any]:
    return {
        "name": printable(name),
        "source": printable(config.named_models()[name]),
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


def _say_unreadable(answers: Answers) -> None:
    if answers.unreadable:
        say(f"{answers.unreadable} of {len(answers.questions)} questions have no image that can be read here")
