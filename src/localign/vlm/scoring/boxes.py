"""Boxes in words: reading them, and the frame their numbers refer to.

A model that was shown a padded image names places in that image; whoever compares them with boxes of the
original must know. So every box carries its :class:`BoxFrame`, and only boxes of one frame are compared.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from localign.errors import UserError

Layout = Literal["original", "letterboxed", "padded-square"]
Corners = tuple[float, float, float, float]
"""Left, top, right, bottom."""

SCALES = (1, 100, 1000)


class Size(NamedTuple):
    """Of an original image, pixels."""

    width: int
    height: int


def _corners(xs: Iterable[float], ys: Iterable[float]) -> Corners:
    (x1, x2), (y1, y2) = xs, ys
    return x1, y1, x2, y2


@dataclass(frozen=True)
class BoxFrame:
    """What a model's coordinates are shares of, and in which unit.

    Padding is added to the original image, on both sides, an odd pixel to the right or below.

    Raises:
        UserError: The parts do not go together.
    """

    layout: Layout = "original"
    """original: of the image as it is in its file, each side for itself; also where it is stretched or squashed for
    the model. letterboxed: of the model's input, into whose middle the image is fitted whole. padded-square: of the
    image in the middle of a square as long as its longer side."""
    scale: int = 1
    """The far edge: coordinates lie in 0..1, 0..100 or 0..1000."""
    input_size: tuple[int, int] | None = None
    """Of letterboxed: height and width of the model's input. Only their ratio matters."""

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            raise UserError(f"unknown box layout {self.layout!r}; known: {', '.join(get_args(Layout))}")
        if self.scale not in SCALES:
            raise UserError(f"boxes lie in 0..1, 0..100 or 0..1000, not 0..{self.scale}")
        if (self.input_size is not None) != (self.layout == "letterboxed"):
            raise UserError(
                "letterboxed boxes, and no others, need the height and width of the model's input"
            )
        if self.input_size is not None and min(self.input_size) < 1:
            raise UserError(f"no input is {self.input_size[0]} x {self.input_size[1]} pixels large")

    def __str__(self) -> str:
        """For example ``letterboxed:336x336:0-1000``; :meth:`parse` reads it."""
        size = "" if self.input_size is None else ":{}x{}".format(*self.input_size)
        return f"{self.layout}{size}:0-{self.scale}"

    @classmethod
    def parse(cls, text: str) -> BoxFrame:
        """The frame of a name such as ``original:0-1`` or ``letterboxed:HEIGHTxWIDTH:0-1000``.

        Raises:
            UserError: It is none.
        """
        match = re.fullmatch(r"([a-z-]+)(?::(\d+)x(\d+))?:0-(\d+)", text)
        if match is None:
            raise UserError(
                f"{text!r} is no box frame; write for example original:0-1, padded-square:0-100 or "
                "letterboxed:HEIGHTxWIDTH:0-1000"
            )
        layout, height, width, scale = match.groups()
        size = None if height is None else (int(height), int(width))
        return cls(layout, int(scale), size)  # type: ignore[arg-type]  # unknown layouts are refused there

    def from_pixels(self, corners: Sequence[float], size: Size) -> Corners:
        """Coordinates in this frame of a box given in pixels of the original image."""
        (left, top), (width, height) = self._canvas(size)
        x1, y1, x2, y2 = corners
        xs = ((x + left) * self.scale / width for x in (x1, x2))
        ys = ((y + top) * self.scale / height for y in (y1, y2))
        return _corners(xs, ys)

    def to_pixels(self, corners: Sequence[float], size: Size) -> Corners:
        """The box in pixels of the original image; what lies in padding is outside of it."""
        (left, top), (width, height) = self._canvas(size)
        x1, y1, x2, y2 = corners
        xs = (x * width / self.scale - left for x in (x1, x2))
        ys = (y * height / self.scale - top for y in (y1, y2))
        return _corners(xs, ys)

    def _canvas(self, size: Size) -> tuple[tuple[int, int], tuple[int, int]]:
        """Where the image begins in what the model sees, and how large that is, in pixels of the original."""
        width, height = size
        if self.layout == "padded-square":
            width = height = max(size)
        elif self.input_size is not None:
            rows, columns = self.input_size
            width = max(size.width, round(size.height * columns / rows))
            height = max(size.height, round(size.width * rows / columns))
        return ((width - size.width) // 2, (height - size.height) // 2), (width, height)


ORIGINAL = BoxFrame()
"""The published frame: shares of the original image's width and height."""


@dataclass(frozen=True)
class Box:
    """A place in one image, in a named frame."""

    corners: Corners
    frame: BoxFrame
    size: Size
    """Of the original image."""

    @classmethod
    def of_pixels(cls, corners: Sequence[float], size: Size, frame: BoxFrame = ORIGINAL) -> Box:
        """The box that pixels of the original image name."""
        return cls(frame.from_pixels(corners, size), frame, size)

    def to(self, frame: BoxFrame) -> Box:
        """The same place in another frame."""
        return self if frame == self.frame else Box.of_pixels(self.pixels(), self.size, frame)

    def pixels(self) -> Corners:
        """In pixels of the original image."""
        return self.frame.to_pixels(self.corners, self.size)

    def within_image(self) -> Box:
        """The part that lies on the original image rather than on padding; maybe empty."""
        x1, y1, x2, y2 = self.pixels()
        xs = (min(max(x, 0.0), self.size.width) for x in (x1, x2))
        ys = (min(max(y, 0.0), self.size.height) for y in (y1, y2))
        return Box.of_pixels(_corners(xs, ys), self.size, self.frame)


def iou(first: Box, second: Box) -> float:
    """Area of the intersection over area of the union, in 0..1; 0 where both are empty.

    Raises:
        UserError: The boxes are of different frames or of images of different size: their numbers do not compare.
    """
    if first.frame != second.frame or first.size != second.size:
        raise UserError(
            f"a box in the frame {first.frame} of an image of {first.size.width} x {first.size.height} cannot be "
            f"compared with one in {second.frame} of {second.size.width} x {second.size.height}; convert it first"
        )
    return overlap(first.corners, second.corners)


def overlap(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two boxes whose frames are known to be one."""
    across = min(first[2], second[2]) - max(first[0], second[0])
    down = min(first[3], second[3]) - max(first[1], second[1])
    common = max(0.0, across) * max(0.0, down)
    areas = ((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    union = sum(areas) - common
    return common / union if union > 0 else 0.0


def published_truth(pixels: Sequence[float], size: Size) -> Corners:
    """The true box as it was published: shares of the original image, rounded to two decimals."""
    x1, y1, x2, y2 = (round(c, 2) for c in ORIGINAL.from_pixels(pixels, size))
    return x1, y1, x2, y2


def parse_published(text: str, frame: BoxFrame) -> Corners | None:
    """A box by the published rule: the whole text is a Python list of four ordered numbers in 0..1.

    Returns:
        The corners, or None for anything else: another word, a full stop, a tuple, pixels.

    Raises:
        UserError: The model does not answer in shares of the original image, so the rule would score its boxes in a
            frame that is not theirs.
    """
    if frame != ORIGINAL:
        raise UserError(
            f"the published scoring of boxes takes them for shares of the original image ({ORIGINAL}), but the "
            f"answers are in the frame {frame}; score them as declared"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's own, about odd text such as "0x1is"
            box = ast.literal_eval(text)
        if not (isinstance(box, list) and len(box) == 4 and all(0 <= c <= 1 for c in box)):
            return None
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    x1, y1, x2, y2 = box
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


Fault = Literal["no box", "outside the frame", "corners out of order"]
"""Why an answer names no place."""

# Each number matches in one way only: an endless row of digits takes no endless time.
_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_BRACKETED = re.compile(rf"[\[(]\s*({_NUMBER})" + rf"(?:\s*,\s*|\s+)({_NUMBER})" * 3 + r"\s*[\])]")
_NUMBERS = re.compile(rf"(?<![\w.]){_NUMBER}")


def parse_box(text: str, frame: BoxFrame, size: Size) -> Box | Fault:
    """The box that an answer names in a declared frame, or why it names none.

    Taken is the first bracketed group of four numbers, whatever stands around it; where there is none, four
    numbers if they are the only ones, as in ``(10,20),(30,40)``. They are left, top, right and bottom.
    """
    match = _BRACKETED.search(text)
    found = match.groups() if match else _NUMBERS.findall(text)
    if len(found) != 4:
        return "no box"
    x1, y1, x2, y2 = (float(number) for number in found)
    if not all(0 <= c <= frame.scale for c in (x1, y1, x2, y2)):
        return "outside the frame"
    if not (x1 < x2 and y1 < y2):
        return "corners out of order"
    return Box((x1, y1, x2, y2), frame, size)
