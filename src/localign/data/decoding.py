"""From the bytes of an image file to RGB pixels, or to the reason why there are none.

Decoders are given bytes that anybody may have written: only formats of pixels are tried (Pillow knows some that start
other programs), sizes are judged before anything is decoded, and whatever goes wrong is one exception.
"""

from __future__ import annotations

import errno
import io
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor

from localign.errors import RunFailure

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # announced for a later torchvision: Pillow then decodes everything, to the same pixels
    decode_jpeg = None

MAX_PIXELS = 2**27
"""An image that claims more pixels than this is refused before it is decoded (a decompression bomb)."""

MAX_BYTES = 2**28
"""A file that is larger is refused before it is read."""

CROP_MARGIN = 1.25
"""A crop is decoded at a fraction that leaves each side at least this many times what is wanted. Crops of photographs
are then 0.5 to 1.2 of 255 levels away from those of a full decode, on average (with 1: 0.6 to 1.6; with 1.5: 0.3 to
0.8, and a tenth slower)."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""What files are tried for, whatever they are called."""

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
# Orientations in which what the file has at its right or lower end comes out at the left or at the top.
_ENDS_LEFT, _ENDS_ABOVE = frozenset({2, 3, 6, 7}), frozenset({3, 4, 7, 8})
# The machine's shortage, not the file's fault: passing over the image would quietly change the data.
_MACHINE_ERRORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class UnreadableImage(Exception):
    """One file that gives no image: its ``name`` in the source, and the ``reason`` on one line."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both, so that it survives pickling between processes
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
        name: How the image is called in ``UnreadableImage``.
        at_least: Pixels; a JPEG at least twice this on both sides is decoded at 1/2, 1/4 or 1/8, both sides
            staying at or above it. None decodes in full.
        upright: Turn the image as its EXIF orientation says; False gives the pixels as they are stored.

    Raises:
        UnreadableImage: The file is missing, empty, truncated, corrupt, no image, or larger than MAX_BYTES or
            MAX_PIXELS.
    """
    return decode_image(read_bytes(path, name), name, at_least, upright=upright)


def read_bytes(path: str | os.PathLike[str], name: str) -> bytes:
    """The content of a file of at most MAX_BYTES. Raises UnreadableImage as :func:`read_image`."""
    with unreadable_on_failure(name, path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        check_bytes(size, name)
        return file.read(size + 1)  # not to the end: a device's never comes


def check_bytes(size: int, name: str) -> None:
    """Raises UnreadableImage where so many bytes are too many."""
    if size > MAX_BYTES:
        raise UnreadableImage(name, f"{size} bytes; at most {MAX_BYTES} are read")


def decode_image(data: bytes, name: str, at_least: int | None = None, *, upright: bool = True) -> Image.Image:
    """Decode the bytes of a file to an RGB image; see :func:`read_image`."""
    room = None if at_least is None else (at_least, at_least)
    with unreadable_on_failure(name), _opened(data, name) as image:
        return _decode(image, name, room, upright)


def open_image(data: bytes, name: str) -> Image.Image | UndecodedJpeg:
    """A JPEG still to be decoded; of every other format the RGB image, upright. Raises UnreadableImage."""
    with unreadable_on_failure(name), _quiet():
        image = _open(data, name)
        if image.format in _JPEG:
            return UndecodedJpeg(data, name, image)
        with image:
            return _decode(image, name, None, upright=True)


class UndecodedJpeg:
    """A JPEG that is decoded when it is known how much of its resolution a crop needs.

    Whatever the crop, the file is read to its end: one that is cut short is unreadable in all of them.

    Args:
        data: The file.
        name: How the image is called in ``UnreadableImage``.
        opened: What Pillow makes of it before it is decoded.

    Attributes:
        name: As given; a source of sources puts its own word in front.
        size: (width, height) upright, pixels.
    """

    def __init__(self, data: bytes, name: str, opened: Image.Image) -> None:
        self._data, self.name, self._stored, self._orientation = data, name, opened.size, _orientation(opened)
        self._opened: Image.Image | None = opened
        self.size = self._stored if self._orientation < 5 else self._stored[::-1]

    def decode(self, fraction: int = 1) -> Image.Image:
        """In RGB, upright, both sides divided by 1, 2, 4 or 8 and rounded up. Raises UnreadableImage."""
        room = None if fraction == 1 else (self._stored[0] // fraction, self._stored[1] // fraction)
        with unreadable_on_failure(self.name), _quiet():
            image = self._opened or _open(self._data, self.name)
            self._opened = None  # an opened image is decoded once
            with image:
                return _decode(image, self.name, room, upright=True)

    def resized_crop(
        self, box: tuple[int, int, int, int], size: tuple[int, int], resample: Image.Resampling
    ) -> Image.Image:
        """A part of the image, resized; decoded at the smallest fraction that CROP_MARGIN allows.

        Args:
            box: Left, top, width and height, pixels of the upright image in full.
            size: Rows and columns of the result.
            resample: How it is resized.

        Raises:
            UnreadableImage: As :func:`read_image`.
        """
        left, top, width, height = box
        rows, columns = size
        room = min(width / columns, height / rows) / CROP_MARGIN
        fraction = next((f for f in (8, 4, 2) if room >= f), 1)
        image = self.decode(fraction)
        # The last pixel of a fraction may stand for fewer of the file's, and is the first once the image is turned.
        across = image.width - self.size[0] / fraction if self._orientation in _ENDS_LEFT else 0.0
        down = image.height - self.size[1] / fraction if self._orientation in _ENDS_ABOVE else 0.0
        x, y = across + left / fraction, down + top / fraction
        right, bottom = x + width / fraction, y + height / fraction
        part = image.crop((math.floor(x), math.floor(y), math.ceil(right), math.ceil(bottom)))
        inside = x - math.floor(x), y - math.floor(y), right - math.floor(x), bottom - math.floor(y)
        return part.resize((columns, rows), resample, box=inside)


def decode_pixels(data: bytes, name: str, at_least: int | None = None) -> Tensor:
    """What :func:`decode_image` gives, upright, as uint8 ``(3, H, W)``, channels last in memory, and sooner.

    A JPEG that is not decoded at a fraction goes through torchvision, whose libjpeg-turbo gives the same pixels.

    Raises:
        UnreadableImage: As :func:`read_image`.
    """
    with unreadable_on_failure(name), _opened(data, name) as image:
        if decode_jpeg is not None and _is_plain_jpeg(image, at_least):
            try:
                return decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), ImageReadMode.RGB)
            except RuntimeError:
                pass  # Pillow judges whether it is readable, and says why not
        room = None if at_least is None else (at_least, at_least)
        pixels = np.array(_decode(image, name, room, upright=True))
    return torch.from_numpy(pixels).permute(2, 0, 1)


@contextmanager
def unreadable_on_failure(name: str, path: str | os.PathLike[str] = "") -> Iterator[None]:
    """Whatever fails inside makes the image unreadable, but for a shortage of the machine's.

    Args:
        name: The image's.
        path: Left out of the reason.
    """
    try:
        yield
    except (UnreadableImage, RunFailure):
        raise
    except Exception as error:  # decoders raise SyntaxError, struct.error, IndexError, ... on corrupt files
        if isinstance(error, OSError) and error.errno in _MACHINE_ERRORS:
            raise
        raise UnreadableImage(name, _reason(error, path)) from None


@contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image.Image]:
    """The image before it is decoded, of a size that may be."""
    with _quiet(), _open(data, name) as image:
        yield image


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings about odd metadata, nor Pillow's about size: the size is judged here instead."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _open(data: bytes, name: str) -> Image.Image:
    if not data:
        raise UnreadableImage(name, "empty file")
    check_bytes(len(data), name)
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    image.decodermaxblock = len(data)  # in one piece, which copies nothing
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableImage(name, f"{width} x {height} pixels; at most {MAX_PIXELS} are decoded")
    return image


def _is_plain_jpeg(image: Image.Image, at_least: int | None) -> bool:
    if image.format not in _JPEG or image.mode != "RGB":
        return False
    scaled = at_least is not None and min(image.size) // at_least >= 2  # as Pillow's draft decides
    return not scaled and _orientation(image) == 1


def _decode(image: Image.Image, name: str, room: tuple[int, int] | None, upright: bool) -> Image.Image:
    """RGB, of a JPEG at the smallest fraction whose width and height are not below ``room``."""
    if room is not None:
        image.draft(None, room)  # only JPEG can; other formats ignore it
    tolerant = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # whatever another library set: a half-grey image is not data
    try:
        image.load()
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant
    # Only now: to read a PNG's metadata is to load it, and a failure there would leave a blank image.
    turn = _UPRIGHT.get(_orientation(image)) if upright else None
    # A JPEG's pixels stay when its file is closed; to copy them takes a tenth of the time of decoding them.
    rgb = image if image.format == "JPEG" and image.mode == "RGB" else to_rgb(image, name)
    return rgb if turn is None else rgb.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # broken metadata does not make the pixels unreadable
        return 1


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """RGB from any mode: transparency over white, 16 bits by their upper eight."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()  # the file's own object closes with the file
    if image.mode == "F":
        raise UnreadableImage(name, "floating-point pixels have no known range")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        wide = image.mode != "I" or values.max() > 255
        levels = values.clip(0, 65535) >> 8 if wide else values.clip(0)
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, rgba).convert("RGB")
    return image.convert("RGB")


def _reason(error: Exception, path: str | os.PathLike[str]) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image of a known format"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS} pixels"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = " ".join(text.replace(str(path), "").split() if str(path) else text.split())
    plain = isinstance(error, OSError) and text
    return text if plain else f"{type(error).__name__}: {text}".rstrip(": ")
