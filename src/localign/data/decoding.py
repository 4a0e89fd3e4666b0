"""From the bytes of an image file to RGB pixels, or to the reason why there are none.

Decoders are given bytes that anybody may have written: only formats of pixels are tried (Pillow knows some that start
other programs), sizes are judged before anything is decoded, and whatever goes wrong is one exception.
"""

from __future__ import annotations

import errno
import io
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

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""What files are tried for, whatever they are called."""

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
    with unreadable_on_failure(name), _opened(data, name) as image:
        return _decode(image, name, at_least, upright)


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
        pixels = np.array(_decode(image, name, at_least, upright=True))
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
    if not data:
        raise UnreadableImage(name, "empty file")
    check_bytes(len(data), name)
    # Warnings about odd metadata, and Pillow's about size: the size is judged here instead.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UnreadableImage(name, f"{width} x {height} pixels; at most {MAX_PIXELS} are decoded")
            yield image


def _is_plain_jpeg(image: Image.Image, at_least: int | None) -> bool:
    if image.format not in ("JPEG", "MPO") or image.mode != "RGB":
        return False
    scaled = at_least is not None and min(image.size) // at_least >= 2  # as Pillow's draft decides
    return not scaled and _orientation(image) == 1


def _decode(image: Image.Image, name: str, at_least: int | None, upright: bool) -> Image.Image:
    if at_least is not None:
        image.draft(None, (at_least, at_least))  # only JPEG can; other formats ignore it
    tolerant = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # whatever another library set: a half-grey image is not data
    try:
        image.load()
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant
    # Only now: to read a PNG's metadata is to load it, and a failure there would leave a blank image.
    turn = _UPRIGHT.get(_orientation(image)) if upright else None
    rgb = to_rgb(image, name)
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
