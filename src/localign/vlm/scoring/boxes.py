"""Boxes in answers: parsing them, and the frame that their coordinates refer to.

A model that sees a padded image gives coordinates in the padded image. Every box therefore carries its
:class:`BoxFrame`, and only boxes in the same frame are compared.
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
    """Size of an original image, pixels."""

    width: int
    height: int


def _corners(xs: Iterable[float], ys: Iterable[float]) -> Corners:
    (x1, x2), (y1, y2) = xs, ys
    return x1, y1, x2, y2


@dataclass(frozen=True)
class BoxFrame:
    """The frame of a model's coordinates: the picture that they are relative to, and their scale.

    Padding is split evenly between both sides; an odd pixel goes to the right or to the bottom.

    Raises:
        UserError: The fields contradict each other.
    """

    layout: Layout = "original"
    """original: the image as stored, each axis by itself, also where the model sees it stretched. letterboxed: the
    model's input, which holds the whole image in its middle. padded-square: a square with the side of the image's
    longer side, and the image in its middle."""
    scale: int = 1
    """Coordinate of the right and bottom edge: 1, 100 or 1000."""
    input_size: tuple[int, int] | None = None
    """Height and width of the model's input, for letterboxed. Only their ratio matters."""

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            raise UserError(f"unknown box layout {self.layout!r}; known: {', '.join(get_args(Layout))}")
        if self.scale not in SCALES:
            raise UserError(f"box coordinates lie in 0..1, 0..100 or 0..1000, not 0..{self.scale}")
        if (self.input_size is not None) != (self.layout == "letterboxed"):
            raise UserError(
                "letterboxed boxes, and no others, need the height and width of the model's input"
            )
        if self.input_size is not None and min(self.input_size) < 1:
            raise UserError(
                f"the model's input must be at least 1 x 1, not {self.input_size[0]} x {self.input_size[1]} pixels"
            )

    def __str__(self) -> str:
        """For example ``letterboxed:336x336:0-1000``, as :meth:`parse` reads it."""
        size = "" if self.input_size is None else ":{}x{}".format(*self.input_size)
        return f"{self.layout}{size}:0-{self.scale}"

    @classmethod
    def parse(cls, text: str) -> BoxFrame:
        """Parse a frame such as ``original:0-1`` or ``letterboxed:HEIGHTxWIDTH:0-1000``.

        Raises:
            UserError: The text is not a box frame.
        """
        match = re.fullmatch(r"([a-z-]+)(?::(\d+)x(\d+))?:0-(\d+)", text)
        if match is None:
            raise UserError(
                f"{text!r} is not a box frame; write for example original:0-1, padded-square:0-100 or "
                "letterboxed:HEIGHTxWIDTH:0-1000"
            )
        layout, height, width, scale = match.groups()
        size = None if height is None else (int(height), int(width))
        return cls(layout, int(scale), size)  # type: ignore[arg-type]  # __post_init__ refuses unknown layouts

    def from_pixels(self, corners: Sequence[float], size: Size) -> Corners:
        """Convert pixels of the original image to coordinates in this frame."""
        (left, top), (width, height) = self._canvas(size)
        x1, y1, x2, y2 = corners
        xs = ((x + left) * self.scale / width for x in (x1, x2))
        ys = ((y + top) * self.scale / height for y in (y1, y2))
        return _corners(xs, ys)

    def to_pixels(self, corners: Sequence[float], size: Size) -> Corners:
        """Convert coordinates in this frame to pixels of the original image; padding lies outside the image."""
        (left, top), (width, height) = self._canvas(size)
        x1, y1, x2, y2 = corners
        xs = (x * width / self.scale - left for x in (x1, x2))
        ys = (y * height / self.scale - top for y in (y1, y2))
        return _corners(xs, ys)

    def _canvas(self, size: Size) -> tuple[tuple[int, int], tuple[int, int]]:
        """Offset of the image on the padded canvas, and the canvas' width and height; in pixels of the original."""
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
    """A box in one image, with the frame of its coordinates."""

    corners: Corners
    frame: BoxFrame
    size: Size

    @classmethod
    def of_pixels(cls, corners: Sequence[float], size: Size, frame: BoxFrame = ORIGINAL) -> Box:
        """The box with corners given in pixels of the original image."""
        return cls(frame.from_pixels(corners, size), frame, size)

    def to(self, frame: BoxFrame) -> Box:
        """The same box in another frame."""
        return self if frame == self.frame else Box.of_pixels(self.pixels(), self.size, frame)

    def pixels(self) -> Corners:
        """The corners in pixels of the original image."""
        return self.frame.to_pixels(self.corners, self.size)

    def within_image(self) -> Box:
        """The part of the box on the original image, without padding; it may be empty."""
        x1, y1, x2, y2 = self.pixels()
        xs = (min(max(x, 0.0), self.size.width) for x in (x1, x2))
        ys = (min(max(y, 0.0), self.size.height) for y in (y1, y2))
        return Box.of_pixels(_corners(xs, ys), self.size, self.frame)


def iou(first: Box, second: Box) -> float:
    """Intersection over union, 0..1; 0 if both boxes are empty.

    Raises:
        UserError: The boxes have different frames or image sizes.
    """
    if first.frame != second.frame or first.size != second.size:
        raise UserError(
            f"a box in the frame {first.frame} of an image of {first.size.width} x {first.size.height} cannot be "
            f"compared with a box in the frame {second.frame} of an image of {second.size.width} x "
            f"{second.size.height}; convert one of them first"
        )
    return overlap(first.corners, second.corners)


def overlap(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two boxes in the same frame, 0..1; 0 if both boxes are empty."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    intersection = max(0.0, width) * max(0.0, height)
    areas = ((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    union = sum(areas) - intersection
    return intersection / union if union > 0 else 0.0


def published_truth(pixels: Sequence[float], size: Size) -> Corners:
    """The true box as published: shares of the original image, rounded to two decimals."""
    x1, y1, x2, y2 = (round(c, 2) for c in ORIGINAL.from_pixels(pixels, size))
    return x1, y1, x2, y2


def parse_published(text: str, frame: BoxFrame) -> Corners | None:
    """Parse a box by the published rule: the whole text is a Python list of four ordered numbers in 0..1.

    Returns:
        The corners; None for anything else, such as a further word, a full stop, a tuple or pixels.

    Raises:
        UserError: The model does not answer in shares of the original image, so the published rule would misread its
            boxes.
    """
    if frame != ORIGINAL:
        raise UserError(
            f"the published scoring reads boxes as shares of the original image ({ORIGINAL}), but the answers are in "
            f"the frame {frame}; use --scoring default"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of text such as "0x1is"
            box = ast.literal_eval(text)
        if not (isinstance(box, list) and len(box) == 4 and all(0 <= c <= 1 for c in box)):
            return None
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    x1, y1, x2, y2 = box
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


Fault = Literal["no box", "outside the frame", "corners out of order"]
"""Why an answer names no box."""

# Each number matches in one way only, so a long row of digits takes linear time.
_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_BRACKETED = re.compile(rf"[\[(]\s*({_NUMBER})" + rf"(?:\s*,\s*|\s+)({_NUMBER})" * 3 + r"\s*[\])]")
_NUMBERS = re.compile(rf"(?<![\w.]){_NUMBER}")


def parse_box(text: str, frame: BoxFrame, size: Size) -> Box | Fault:
    """Find the box in an answer: left, top, right and bottom in the declared frame.

    The first bracketed group of four numbers counts, regardless of the text around it. Without such a group, the
    text must hold exactly four numbers, as in ``(10,20),(30,40)``.

    Returns:
        The box, or why there is none.
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
