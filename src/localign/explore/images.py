"""The images of a page, as each model sees them, and the bound on the page's size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from localign.backbones import Backbone
from localign.data.image_source import ImageSource
from localign.data.images import print_notice
from localign.data.sources import UnreadableImage, open_source
from localign.data.transforms import EvalTransform
from localign.engine.log import say
from localign.errors import UserError
from localign.explore.attention import shows_attention
from localign.explore.features import bytes_per_image
from localign.explore.page import data_uri
from localign.explore.predictions import Predictions
from localign.options.export import ExploreConfig
from localign.text.printing import printable

MIB = 2**20
_BASE64 = 4 / 3


@dataclass(frozen=True)
class ShownImages:
    """The images of a page."""

    names: list[str]
    uris: list[str]
    pixels: dict[str, list[Tensor]]
    """By model, uint8 ``(3, height, width)``; models with the same input share tensors."""


class ImageCollector:
    """Transforms images for every model, one after the other.

    Args:
        models: By name; all see the same part of an image.
    """

    def __init__(self, models: Mapping[str, Backbone]) -> None:
        self.models = models
        self.names: list[str] = []
        self._transforms: dict[Any, EvalTransform] = {
            (b.image_size, b.preprocessing): EvalTransform(b.image_size, "square", b.preprocessing)
            for b in models.values()
        }
        self._pixels: dict[Any, list[Tensor]] = {kind: [] for kind in self._transforms}

    def add(self, name: str, image: Image.Image) -> None:
        """Add an RGB image; its name is escaped here."""
        for kind, transform in self._transforms.items():
            self._pixels[kind].append(transform(image))
        self.names.append(printable(name))

    def add_pixels(self, name: str, pixels: Tensor) -> None:
        """Add uint8 ``(3, height, width)`` at the size of all models."""
        for stored in self._pixels.values():
            stored.append(pixels)
        self.names.append(printable(name))

    def shown(self) -> ShownImages:
        """The images so far; the page shows them at the size of the largest input."""
        largest = max(self._pixels, key=lambda kind: kind[0])
        pixels = {name: self._pixels[b.image_size, b.preprocessing] for name, b in self.models.items()}
        return ShownImages(self.names, [_uri(image) for image in self._pixels[largest]], pixels)


def gather_images(
    config: ExploreConfig, models: Mapping[str, Backbone], predictions: Predictions | None
) -> ShownImages:
    """Read the images of a command line; unreadable ones are left out, which is said.

    Raises:
        UserError: No image can be read, or the features alone would make the page too large.
    """
    found = ImageCollector(models)
    if predictions is not None:
        for number, image in enumerate(predictions.images):
            found.add_pixels(
                f"picture {number + 1} of {without_folders(config.probe or '')}", torch.from_numpy(image)
            )
    if not config.images or len(found.names) == config.limit:
        check_size(config, models, len(found.names))
        return found.shown()
    first = next(iter(models.values()))
    source = open_source(config.images, image_size=first.image_size, scaled_decode=False)
    print_notice(source)
    check_size(config, models, min(config.limit, len(found.names) + len(source)))
    bad: list[tuple[str, str]] = []
    for name, image in _loaded(source, bad):
        found.add(name, image)
        if len(found.names) == config.limit:
            break
    if bad:
        name, reason = map(printable, bad[0])
        say(f"{len(bad)} images cannot be read and are left out; the first is {name}: {reason}")
    if not found.names:
        raise UserError(f"none of the images of {printable(config.images)} can be read")
    return found.shown()


def _loaded(source: ImageSource, bad: list[tuple[str, str]]) -> Iterator[tuple[str, Image.Image]]:
    """The readable images with their names, in order; the others are added to ``bad`` with their reasons."""
    for index in range(len(source)):
        name = source.name(index)
        try:
            yield name, source.load(index)
        except UnreadableImage as error:
            bad.append((name, str(error)))


def without_folders(source: str) -> str:
    """A name to show; of a folder only its own, as pages are sent to others."""
    path = Path(source)
    return printable(path.resolve().name if path.is_dir() else source)


def _uri(pixels: Tensor) -> str:
    return data_uri(Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())))


def check_size(config: ExploreConfig, models: Mapping[str, Backbone], count: int) -> None:
    """Refuse a page that is too large before the models run.

    Raises:
        UserError: The features and attention of ``count`` images alone are above ``--max-mib``.
    """
    per_image = sum(
        bytes_per_image(b, config.dtype, config.attention and shows_attention(b)) for b in models.values()
    )
    size = per_image * count * _BASE64 / MIB
    if size > config.max_mib:
        raise UserError(too_large(size, config, "at least "))


def too_large(size: float, config: ExploreConfig, least: str = "") -> str:
    """The error line about a page of ``size`` MiB."""
    smaller = ["--dtype int8"] * (config.dtype != "int8") + ["--attention false"] * config.attention
    share = max(1, int(config.limit * config.max_mib / size))
    ways = ", ".join([f"--limit {share}" if share < config.limit else "a smaller --limit", *smaller])
    return (
        f"the page would have {least}{size:.1f} MiB, more than --max-mib {config.max_mib:g}; give {ways}, or "
        f"--max-mib {int(size) + 2}"
    )
