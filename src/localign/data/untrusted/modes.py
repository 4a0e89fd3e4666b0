"""Conversions to RGB that take several times the memory of an image, done by bands of rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

BAND_PIXELS = 2**22
"""Pixels of a band."""


def by_bands(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert an image to RGB; ``convert`` is called with bands of rows."""
    rows = max(1, BAND_PIXELS // image.width)
    if rows >= image.height:
        return convert(image)
    result = Image.new("RGB", image.size, None)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(image.height, top + rows))
        result.paste(convert(image.crop(box)), box)
    return result


def from_levels(image: Image.Image, shift: int) -> Image.Image:
    """Grey levels of up to 32 bits to RGB: levels outside 0..65535 are clipped, and the lowest bits dropped."""
    levels = np.asarray(image).clip(0, 65535) >> shift
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")


def over_white(image: Image.Image) -> Image.Image:
    """An image with transparency, drawn over white."""
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")
