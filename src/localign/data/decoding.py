"""Decodes image files to RGB pixels, or says why a file cannot be decoded.

The files are untrusted: only bitmap formats are tried (Pillow starts other programs for some formats), sizes are
checked before decoding, and every failure of a file raises the same exception. Faults of the machine raise RunFailure.
"""

from __future__ import annotations

import io
import math
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from localign.data.untrusted.bounds import (
    BYTES_VARIABLE,
    PARTS_VARIABLE,
    PIXELS_VARIABLE,
    SCANS_VARIABLE,
    TEXT_VARIABLE,
    bound,
    has_more_parts,
    jpeg_scans,
)
from localign.data.untrusted.faults import machine_faults, retried
from localign.data.untrusted.modes import by_bands, from_levels, over_white
from localign.errors import RunFailure, RunStopped, UserError
from localign.text.reading import is_lfs_pointer

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # a later torchvision will remove it; Pillow decodes to the same pixels
    decode_jpeg = None

MAX_PIXELS = bound(PIXELS_VARIABLE, 2**27)
"""Images with more pixels, such as decompression bombs, are refused before decoding."""

MAX_BYTES = bound(BYTES_VARIABLE, 2**28)
"""Larger files are refused before they are read."""

MAX_SCANS = bound(SCANS_VARIABLE, 100)
"""JPEGs with more scans are refused before decoding, which takes time for each scan. Encoders write 1 to 20."""

MAX_PARTS = bound(PARTS_VARIABLE, 20_000)
"""Files with more chunks or segments besides the pixels' own are refused: 250 MB of empty ones take four minutes."""

MAX_TEXT = bound(TEXT_VARIABLE, PngImagePlugin.MAX_TEXT_CHUNK)
"""Bytes to which a compressed text or colour profile of a PNG may expand; all texts together have 64 times as many."""

CROP_MARGIN = 1.25
"""A crop is decoded at a size that leaves each side at least this many times its target. On average, crops of
photographs then differ by 0.5 to 1.2 of 255 levels from crops of a full decode (with a margin of 1: 0.6 to 1.6; with
1.5: 0.3 to 0.8, but 10 % slower)."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""Pillow's names of the formats that are tried, whatever a file's suffix."""

_JPEG = ("JPEG", "MPO")
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_UNDONE = _UPRIGHT | {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
# Orientations whose upright image starts, in x and in y, at the stored right or lower end.
_STARTS_AT_END_X, _STARTS_AT_END_Y = frozenset({2, 3, 6, 7}), frozenset({3, 4, 7, 8})


class UnreadableImage(Exception):
    """An image cannot be read: its ``name`` in the source, and the ``reason`` on one line."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both arguments, so that it can be pickled
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def read_image(
    path: str | os.PathLike[str], name: str, at_least: int | None = None, *, upright: bool = True
) -> Image.Image:
    """Decode one file to an RGB image.

    Args:
        path: The file.
        name: The image's name in ``UnreadableImage``.
        at_least: Pixels; a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if both sides stay at or above this.
            None decodes in full.
        upright: Apply the EXIF orientation; False returns the pixels as they are stored.

    Raises:
        UnreadableImage: The file is missing, empty, truncated, corrupt, not an image, or beyond MAX_BYTES, MAX_PIXELS,
            MAX_SCANS or MAX_TEXT.
        RunFailure: The machine is at fault: no memory, or a disk that fails.
    """
    return decode_image(read_bytes(path, name), name, at_least, upright=upright)


def read_bytes(path: str | os.PathLike[str], name: str) -> bytes:
    """The content of a regular file of at most MAX_BYTES. Raises as :func:`read_image` does."""
    with unreadable_on_failure(name, path):
        return retried(lambda: _content(path, name), os.fspath(path))


def _content(path: str | os.PathLike[str], name: str) -> bytes:
    # A pipe without a writer would block open() forever.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImage(name, "a folder, pipe or device, not a file")
        check_bytes(status.st_size, name)
        return file.read(status.st_size + 1)  # not read(): some files that report no size never end


def check_bytes(size: int, name: str) -> None:
    """Raises UnreadableImage if a file of ``size`` bytes is too large."""
    if size > MAX_BYTES:
        raise UnreadableImage(name, f"{size} bytes ({BYTES_VARIABLE} allows more); the limit is {MAX_BYTES}")


def decode_image(data: bytes, name: str, at_least: int | None = None, *, upright: bool = True) -> Image.Image:
    """Decode the bytes of a file to an RGB image; see :func:`read_image`."""
    min_size = None if at_least is None else (at_least, at_least)
    with unreadable_on_failure(name), opened(data, name) as image:
        return _decode(image, name, min_size, upright)


def stored_size(data: bytes, name: str) -> tuple[str, int, int]:
    """Format, width and height, in pixels as they are stored, without decoding. Raises UnreadableImage."""
    with unreadable_on_failure(name), opened(data, name) as image:
        # Pillow swaps the sides of TIFFs only.
        swapped = image.format == "TIFF" and _orientation(image) >= 5
        width, height = image.size[::-1] if swapped else image.size
        return image.format or "?", width, height


def orientation_of(data: bytes, name: str) -> int:
    """The EXIF orientation of an image, 1..8. Raises UnreadableImage."""
    with unreadable_on_failure(name), opened(data, name) as image:
        return _orientation(image)


def open_image(data: bytes, name: str) -> Image.Image | UndecodedJpeg:
    """Open an image: a JPEG undecoded, any other format in RGB and upright. Raises UnreadableImage."""
    with unreadable_on_failure(name), _strict_pillow():
        image = _open(data, name)
        if image.format in _JPEG:
            return UndecodedJpeg(data, name, image)
        with image:
            return _decode(image, name, None, upright=True)


class UndecodedJpeg:
    """A JPEG that is decoded once a crop determines the resolution it needs.

    Decoding always reads the whole file, so a truncated file is unreadable for every crop.

    Args:
        data: The file's content.
        name: The image's name in ``UnreadableImage``.
        opened: Pillow's image, opened but not decoded.

    Attributes:
        name: As given; a mixture adds the source's title in front.
        size: (width, height) of the upright image, pixels.
    """

    def __init__(self, data: bytes, name: str, opened: Image.Image) -> None:
        self._data, self.name, self._stored, self._orientation = data, name, opened.size, _orientation(opened)
        self._opened: Image.Image | None = opened
        self.size = self._stored if self._orientation < 5 else self._stored[::-1]

    def decode(self, fraction: int = 1) -> Image.Image:
        """Decode to RGB, upright, both sides divided by 1, 2, 4 or 8 and rounded up. Raises UnreadableImage."""
        min_size = None if fraction == 1 else (self._stored[0] // fraction, self._stored[1] // fraction)
        with unreadable_on_failure(self.name), _strict_pillow():
            image = self._opened or _open(self._data, self.name)
            self._opened = None  # Pillow decodes an opened image only once
            with image:
                return _turned(_decode(image, self.name, min_size, upright=False), self._orientation)

    def resized_crop(
        self,
        box: tuple[float, float, float, float],
        size: tuple[int, int],
        resample: Image.Resampling,
        context: bool = False,
    ) -> Image.Image:
        """Crop a part and resize it, from an image decoded at the smallest size that CROP_MARGIN allows.

        Args:
            box: Left, top, width and height, in pixels of the full upright image.
            size: Rows and columns of the result.
            resample: The resampling filter.
            context: Whether the filter also reads pixels around the part, as if the whole image were resized and then
                cropped.

        Raises:
            UnreadableImage: As :func:`read_image` does.
        """
        left, top, width, height = box
        rows, columns = size
        reduction = min(width / columns, height / rows) / CROP_MARGIN
        fraction = next((f for f in (8, 4, 2) if reduction >= f), 1)
        image = self.decode(fraction)
        # The last decoded pixel may cover fewer stored pixels. In some orientations it is the first upright pixel.
        x_offset = image.width - self.size[0] / fraction if self._orientation in _STARTS_AT_END_X else 0.0
        y_offset = image.height - self.size[1] / fraction if self._orientation in _STARTS_AT_END_Y else 0.0
        x, y = x_offset + left / fraction, y_offset + top / fraction
        right, bottom = min(x + width / fraction, image.width), min(y + height / fraction, image.height)
        if context:
            return image.resize((columns, rows), resample, box=(x, y, right, bottom))
        part = image.crop((math.floor(x), math.floor(y), math.ceil(right), math.ceil(bottom)))
        inside = x - math.floor(x), y - math.floor(y), right - math.floor(x), bottom - math.floor(y)
        return part.resize((columns, rows), resample, box=inside)


def decode_pixels(data: bytes, name: str, at_least: int | None = None) -> Tensor:
    """Decode as :func:`decode_image`, upright, to uint8 ``(3, H, W)``, channels last in memory, but faster.

    JPEGs that are decoded in full go through torchvision, whose libjpeg-turbo gives the same pixels.

    Raises:
        UnreadableImage: As :func:`read_image` does.
    """
    with unreadable_on_failure(name), opened(data, name) as image:
        if decode_jpeg is not None and _is_plain_jpeg(image, at_least):
            try:
                decoded: Tensor = decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), ImageReadMode.RGB)
                return decoded
            except RuntimeError:
                pass  # let Pillow decide whether the file is readable and give the reason
        min_size = None if at_least is None else (at_least, at_least)
        pixels = np.array(_decode(image, name, min_size, upright=True))
    return torch.from_numpy(pixels).permute(2, 0, 1)


@contextmanager
def unreadable_on_failure(name: str, path: str | os.PathLike[str] = "") -> Iterator[None]:
    """Turn every exception into UnreadableImage, except faults of the machine, which become RunFailure.

    Args:
        name: The image's name.
        path: The file's path, which is removed from the reason.
    """
    try:
        with machine_faults(name):
            yield
    except (UnreadableImage, RunFailure, RunStopped, UserError):
        raise
    except Exception as error:  # decoders raise SyntaxError, struct.error, IndexError, ... on corrupt files
        raise UnreadableImage(name, _reason(error, path)) from None


@contextmanager
def opened(data: bytes, name: str) -> Iterator[Image.Image]:
    """Pillow's image, opened but not decoded, after a check of its size."""
    with _strict_pillow(), _open(data, name) as image:
        yield image


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Set Pillow's global settings, which another library may have changed, to our bounds; silence its warnings."""
    settings: tuple[tuple[Any, str, object], ...] = (
        (ImageFile, "LOAD_TRUNCATED_IMAGES", False),  # a half-grey image is not data
        (Image, "MAX_IMAGE_PIXELS", MAX_PIXELS),  # Pillow refuses twice as many
        (PngImagePlugin, "MAX_TEXT_CHUNK", MAX_TEXT),
        (PngImagePlugin, "MAX_TEXT_MEMORY", 64 * MAX_TEXT),
    )
    before = [getattr(module, name) for module, name, _ in settings]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for module, name, value in settings:
                setattr(module, name, value)
            yield
        finally:
            for (module, name, _), value in zip(settings, before, strict=True):
                setattr(module, name, value)


def _open(data: bytes, name: str) -> Image.Image:
    if not data:
        raise UnreadableImage(name, "empty file")
    check_bytes(len(data), name)
    if is_lfs_pointer(data):
        raise UnreadableImage(name, "a Git LFS pointer, not the image itself; run `git lfs pull`")
    if has_more_parts(data, MAX_PARTS):
        raise UnreadableImage(
            name, f"more than {MAX_PARTS} pieces of metadata ({PARTS_VARIABLE} allows more)"
        )
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    image.decodermaxblock = len(data)  # one block, which avoids copies
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableImage(name, f"{width} x {height} pixels; {_pixel_limit()}")
    if image.format in _JPEG and (scans := jpeg_scans(data, MAX_SCANS)) > MAX_SCANS:
        raise UnreadableImage(name, f"{scans} scans; the limit is {MAX_SCANS} ({SCANS_VARIABLE} allows more)")
    return image


def _pixel_limit() -> str:
    return f"the limit is {MAX_PIXELS} pixels ({PIXELS_VARIABLE} allows more)"


def _is_plain_jpeg(image: Image.Image, at_least: int | None) -> bool:
    if image.format not in _JPEG or image.mode != "RGB":
        return False
    scaled = at_least is not None and min(image.size) // at_least >= 2  # as Pillow's draft decides
    return not scaled and _orientation(image) == 1


def _decode(image: Image.Image, name: str, min_size: tuple[int, int] | None, upright: bool) -> Image.Image:
    """Decode to RGB; a JPEG at the smallest fraction whose width and height are not below ``min_size``."""
    if min_size is not None:
        image.draft(None, min_size)  # formats other than JPEG ignore it
    by_pillow = (
        _orientation(image) if image.format == "TIFF" else 1
    )  # Pillow turns only TIFFs, while it loads them
    image.load()
    # A JPEG's pixels survive the closing of its file. A copy would take a tenth of the decoding time.
    rgb = image if image.format == "JPEG" and image.mode == "RGB" else to_rgb(image, name)
    if upright:
        # After loading, because reading a PNG's metadata loads the image, and a failure there leaves a blank image.
        return _turned(rgb, _orientation(image))
    return rgb if by_pillow == 1 else rgb.transpose(_UNDONE[by_pillow])


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    return image if orientation == 1 else image.transpose(_UPRIGHT[orientation])


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1..8. Cameras and programs also write other values, which mean nothing."""
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
        return int(value or 1) if value in range(1, 9) else 1
    except MemoryError:
        raise
    except Exception:  # broken metadata does not make the pixels unreadable
        return 1


def upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """Convert an image that somebody else opened to RGB, upright. Raises UnreadableImage."""
    with unreadable_on_failure(name), _strict_pillow():
        image.load()
        return _turned(to_rgb(image, name), _orientation(image))


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Convert any mode to RGB: transparent pixels are drawn over white, 16-bit levels keep their upper 8 bits."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()  # the original is closed with its file
    if image.mode == "F":
        raise UnreadableImage(name, "floating-point pixels have no known range")
    if image.mode == "I" and image.getextrema()[1] <= 255:  # type: ignore[operator]
        return by_bands(image, lambda band: from_levels(band, shift=0))
    if image.mode.startswith("I"):
        return by_bands(image, lambda band: from_levels(band, shift=8))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return by_bands(image, over_white)
    return image.convert("RGB")


def _reason(error: Exception, path: str | os.PathLike[str]) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a supported format"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than twice as many pixels as allowed; {_pixel_limit()}"
    if isinstance(error, ValueError) and "MAX_TEXT" in str(error):
        return f"a text or colour profile expands to more than {MAX_TEXT} bytes ({TEXT_VARIABLE} allows more)"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = " ".join(text.replace(str(path), "").split() if str(path) else text.split())
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}".rstrip(": ")
