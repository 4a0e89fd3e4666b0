"""Opening images and bringing them to the vision tower's input size."""

from __future__ import annotations

import base64
import http.client
import os
import urllib.request
from collections.abc import Sequence
from typing import Any, Literal, get_args

from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from localign.backbones.preprocessing import Preprocessing
from localign.data.decoding import MAX_BYTES, UnreadableImage, decode_image, read_image, upright_rgb
from localign.data.transforms import EvalTransform, to_tensor
from localign.errors import UserError, did_you_mean
from localign.text.printing import printable

TIMEOUT = 30.0
"""Seconds without an answer after which a URL counts as unreadable."""

Resize = Literal["naive", "letterbox", "crop"]


class ImageTransform:
    """Brings an image to the vision tower's input size, without normalisation.

    Args:
        image_size: Rows and columns, pixels.
        resize: ``naive`` stretches (the paper's), ``letterbox`` pads the shorter side at both ends and then resizes,
            ``crop`` resizes until the image covers the target and then crops the centre.
        mean: RGB fill colour of letterbox padding, 0..1.
        interpolation: Resampling filter.

    Raises:
        UserError: ``resize`` is unknown.
    """

    def __init__(
        self,
        image_size: Sequence[int],
        resize: str,
        mean: Sequence[float],
        interpolation: str = "bicubic",
    ) -> None:
        if resize not in get_args(Resize):
            known = get_args(Resize)
            raise UserError(
                f"unknown resize {resize!r}; known: {', '.join(known)}{did_you_mean(resize, known)}"
            )
        rows, columns = image_size
        self.image_size = (int(rows), int(columns))
        self.resize = resize
        red, green, blue = (int(255 * m) for m in mean)
        self.fill = (red, green, blue)
        stated = Preprocessing(interpolation)
        self._filter = InterpolationMode(interpolation)
        self._crop = EvalTransform(self.image_size, "crop", stated)

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB image -> uint8 ``(3, rows, columns)``."""
        if self.resize == "crop":
            return self._crop(image)
        if self.resize == "letterbox":
            image = self._pad(image)
        return to_tensor(F.resize(image, list(self.image_size), self._filter))

    def _pad(self, image: Image.Image) -> Image.Image:
        rows, columns = self.image_size
        width = max(image.width, round(image.height * columns / rows))
        height = max(image.height, round(image.width * rows / columns))
        padded = Image.new("RGB", (width, height), self.fill)
        padded.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        return padded


def open_image(image: Any) -> Image.Image:
    """An RGB image, upright, from a PIL image, a path, a URL or a data URL. All are decoded in the same way.

    Raises:
        UserError: The image cannot be read.
        RunFailure: The machine is at fault: no memory, or a disk that fails.
    """
    try:
        if isinstance(image, Image.Image):
            return upright_rgb(image, "the image")
        if isinstance(image, str) and image.startswith("data:"):
            # binascii.Error is a ValueError
            return decode_image(base64.b64decode(image.partition(",")[2].encode()), "the data URL")
        if isinstance(image, str) and image.startswith(("http://", "https://")):
            return decode_image(_fetched(image), image)
        return read_image(os.fspath(image), str(image))
    except (UnreadableImage, TypeError, ValueError) as error:
        raise UserError(f"cannot read an image: {printable(error)}") from None


def _fetched(url: str) -> bytes:
    """The file at a URL, read up to the bound on files. Raises UnreadableImage if it cannot be fetched."""
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "localign"})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            content: bytes = response.read(MAX_BYTES + 1)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UnreadableImage(url, f"it cannot be fetched: {error}") from None
    return content
