"""The built-in scenes: procedurally drawn images with exact labels.

A scene shows a few coloured shapes on a textured ground. With scenes, alignment, probing and the vision-language
path run on a machine without any data set, through the same code as real images. A scene is a pure function of
(config, seed, split, index), so scenes are never stored.

A pixel's *code* names the shape-colour pair that covers it: 0 is ground, and ``1 + shape * colours + colour`` is an
object. All other labels (attributes, presence of pairs) follow from the codes by a table.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from localign import rng
from localign.data.image_source import ImageSource
from localign.errors import UserError, did_you_mean

GROUND = "ground"
SPLITS = ("pretrain", "train", "val", "test")
"""Disjoint sets of scenes. Each split has its own random key, so that no two splits share a scene."""

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (205, 50, 50),
    "green": (50, 160, 60),
    "blue": (55, 80, 205),
    "yellow": (215, 195, 50),
    "purple": (150, 60, 175),
    "orange": (230, 130, 40),
    "cyan": (60, 190, 200),
    "white": (240, 240, 240),
}
"""Mean RGB of every colour that a config may name."""

Grid = NDArray[np.float32]
SHAPES: dict[str, Callable[[Grid, Grid], NDArray[np.bool_]]] = {
    "circle": lambda x, y: x * x + y * y <= 1.0,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 0.86,
    "triangle": lambda x, y: abs(x) <= (y + 1.0) * 0.52,
    "diamond": lambda x, y: abs(x) + abs(y) <= 1.03,
    "cross": lambda x, y: np.minimum(abs(x), abs(y)) <= 0.34,
    "ring": lambda x, y: (x * x + y * y <= 1.0) & (x * x + y * y >= 0.3),
    "hourglass": lambda x, y: abs(x) <= abs(y) * 0.9 + 0.08,
    "bar": lambda x, y: (abs(y) <= 0.4) & (abs(x) <= 1.0),
}
"""Tests whether points lie inside a shape; x points right and y down, both in (-1, 1)."""


@dataclass(frozen=True)
class SceneConfig:
    """The look of scenes."""

    image_size: int = 48
    """Side of the square image, pixels."""
    min_objects: int = 1
    """Minimum number of objects that are drawn per scene, at least 1."""
    max_objects: int = 5
    """Maximum number of objects per scene; a scene has fewer if no free space is left."""
    min_object_size: int = 12
    """Smallest side of an object's box, pixels."""
    max_object_size: int = 20
    """Largest side of an object's box, pixels, at most ``image_size``."""
    shapes: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "cross")
    """Shapes of the objects, keys of ``SHAPES``."""
    colors: tuple[str, ...] = ("red", "green", "blue", "yellow")
    """Colours of the objects, keys of ``PALETTE``."""
    color_jitter: int = 25
    """Maximum change of an object's mean colour, levels of 0..255 per channel."""
    texture: float = 40.0
    """Amplitude of the ground's smooth texture, levels of 0..255."""
    texture_cells: int = 6
    """Knots of the texture along a side; more knots make a finer texture."""
    noise: int = 24
    """Amplitude of the noise on every pixel, levels of 0..255, at most 127."""
    max_distractors: int = 0
    """Maximum number of distractors per scene: small rectangles in the objects' colours, labelled as ground."""

    def __post_init__(self) -> None:
        for name, known in (("shapes", SHAPES), ("colors", PALETTE)):
            values = getattr(self, name)
            unknown = [v for v in values if v not in known]
            if unknown:
                raise UserError(f"unknown scene {name[:-1]} {unknown[0]!r}{did_you_mean(unknown[0], known)}")
            if not values or len(set(values)) != len(values):
                raise UserError(f"scene {name} must be one or more different names, not {list(values)}")
        if not 1 <= self.min_objects <= self.max_objects <= len(self.shapes) * len(self.colors):
            raise UserError(
                "scenes need 1 <= min_objects <= max_objects <= shapes x colours, "
                f"got {self.min_objects}, {self.max_objects}, {len(self.shapes)} x {len(self.colors)}"
            )
        if not 4 <= self.min_object_size <= self.max_object_size <= self.image_size:
            raise UserError(
                "scenes need 4 <= min_object_size <= max_object_size <= image_size, "
                f"got {self.min_object_size}, {self.max_object_size}, {self.image_size}"
            )
        if not 0 <= self.noise <= 127:
            raise UserError(f"scene noise must lie in 0..127, got {self.noise}")
        if min(self.texture, self.color_jitter, self.max_distractors) < 0:
            raise UserError("scene texture, color_jitter and max_distractors must not be negative")
        if self.texture_cells < 2:
            raise UserError(f"scene texture_cells must be 2 or more, got {self.texture_cells}")

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the pixel codes: ``ground``, then every shape-colour pair, such as "red circle"."""
        return (GROUND, *(f"{color} {shape}" for shape in self.shapes for color in self.colors))

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the attribute labels: ``ground``, the shapes, the colours."""
        return (GROUND, *self.shapes, *self.colors)

    def code(self, shape: str, color: str) -> int:
        """The pixel code of a shape-colour pair."""
        return 1 + self.shapes.index(shape) * len(self.colors) + self.colors.index(color)

    def attribute_table(self) -> NDArray[np.bool_]:
        """The attributes of each pixel code.

        Returns:
            bool ``(classes, attributes)``: ground has one attribute, a pair has its shape and its colour.
        """
        table = np.zeros((len(self.classes), len(self.attributes)), dtype=bool)
        table[0, 0] = True
        for s, shape in enumerate(self.shapes):
            for c, color in enumerate(self.colors):
                table[self.code(shape, color), [1 + s, 1 + len(self.shapes) + c]] = True
        return table


@dataclass(frozen=True)
class SceneObject:
    """A drawn object. Objects of a scene never overlap, and no two have the same shape and colour."""

    shape: str
    color: str
    box: tuple[float, float, float, float]
    """Tight bounding box in pixels, ``(left, top, right, bottom)``; right and bottom are exclusive."""

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def center(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Scene:
    """A drawn scene."""

    image: NDArray[np.uint8]
    """``(H, W, 3)`` RGB."""
    labels: NDArray[np.uint8]
    """``(H, W)`` pixel codes, indices into ``SceneConfig.classes``."""
    objects: tuple[SceneObject, ...]
    caption: str
    """"a red circle left of a blue square, and a green cross"."""


def relation(first: SceneObject, second: SceneObject) -> str:
    """The position of ``first`` relative to ``second``: "left of", "right of", "above" or "below".

    The axis along which the centres are further apart decides; the horizontal axis decides ties.
    """
    (x1, y1), (x2, y2) = first.center, second.center
    if abs(x1 - x2) >= abs(y1 - y2):
        return "left of" if x1 < x2 else "right of"
    return "above" if y1 < y2 else "below"


def caption_of(objects: tuple[SceneObject, ...]) -> str:
    """A caption without a full stop: the relation of the first two objects, then the other objects."""
    names = [_article(o.name) for o in objects]
    if len(objects) < 2:
        return names[0] if names else "an empty ground"
    text = f"{names[0]} {relation(objects[0], objects[1])} {names[1]}"
    if len(names) > 3:
        return f"{text}, {', '.join(names[2:-1])} and {names[-1]}"
    return f"{text}, and {names[2]}" if len(names) == 3 else text


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


@functools.lru_cache(maxsize=4096)
def _stencil(shape: str, size: int) -> tuple[NDArray[np.bool_], tuple[int, int, int, int]]:
    """The pixels of a shape in a ``size`` x ``size`` box, and their bounding box (left, top, right, bottom)."""
    centers: Grid = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
    inside = np.asarray(SHAPES[shape](centers[None, :], centers[:, None])) & np.ones((size, size), dtype=bool)
    columns, rows = np.flatnonzero(inside.any(axis=0)), np.flatnonzero(inside.any(axis=1))
    inside.flags.writeable = False
    return inside, (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


@functools.lru_cache(maxsize=64)
def _upsampling(cells: int, size: int) -> Grid:
    """The matrix ``(size, cells)`` of linear interpolation from ``cells`` knots to ``size`` pixels."""
    positions = np.linspace(0, cells - 1, size, dtype=np.float32)
    weights: Grid = np.maximum(0, 1 - abs(positions[:, None] - np.arange(cells, dtype=np.float32)))
    return weights


def _place_boxes(config: SceneConfig, draws: NDArray[np.float64]) -> list[tuple[int, int, int]]:
    """Boxes (left, top, size) that do not overlap. An object is dropped after eight failed placements."""
    boxes: list[tuple[int, int, int]] = []
    for sizes, *tries in draws.tolist():
        size = config.min_object_size + int(sizes * (config.max_object_size - config.min_object_size + 1))
        room = config.image_size - size + 1
        for u, v in zip(tries[::2], tries[1::2], strict=True):
            left, top = int(u * room), int(v * room)
            if all(left >= x + s or x >= left + size or top >= y + s or y >= top + size for x, y, s in boxes):
                boxes.append((left, top, size))
                break
    return boxes


def _paint_ground(config: SceneConfig, random: np.random.Generator) -> Grid:
    """Textured ground of a random mean colour, float32 ``(H, W, 3)``, levels of 0..255."""
    size, cells = config.image_size, config.texture_cells
    knots = random.random((3, cells, cells), dtype=np.float32) * 2 - 1
    knots = knots * np.float32(config.texture) + random.integers(70, 186, (3, 1, 1)).astype(np.float32)
    # each channel is averaged with the mean of all channels, so that brightness varies more than hue
    knots = 0.5 * knots + 0.5 * knots.mean(axis=0, keepdims=True)
    up = _upsampling(cells, size)
    ground: Grid = (up @ knots @ up.T).transpose(1, 2, 0)
    for u, v, w, h, c in random.random((random.integers(config.max_distractors + 1), 5)).tolist():
        left, top = int(u * (size - 3)), int(v * (size - 3))
        color = PALETTE[config.colors[int(c * len(config.colors))]]
        ground[top : top + 2 + int(4 * h), left : left + 2 + int(4 * w)] = color
    return ground


def draw_scene(config: SceneConfig, seed: int, index: int, split: str = "train") -> Scene:
    """Draw one scene, a pure function of the arguments.

    Args:
        config: How scenes look.
        seed: Seed of the scenes.
        index: Index in the split, 0 or more.
        split: One of ``SPLITS``.

    Raises:
        UserError: The split is unknown.
    """
    _check_split(split)
    random = rng.generator(seed, f"scenes/{split}", index)
    canvas = _paint_ground(config, random)
    size = config.image_size
    labels = np.zeros((size, size), dtype=np.uint8)
    count = int(random.integers(config.min_objects, config.max_objects + 1))
    boxes = _place_boxes(config, random.random((count, 17)))
    pairs = random.permutation(len(config.shapes) * len(config.colors))[: len(boxes)].tolist()
    shades = random.integers(-config.color_jitter, config.color_jitter + 1, (len(boxes), 3))
    objects = []
    for (left, top, side), pair, shade in zip(boxes, pairs, shades, strict=True):
        shape, color = config.shapes[pair // len(config.colors)], config.colors[pair % len(config.colors)]
        inside, (x0, y0, x1, y1) = _stencil(shape, side)
        canvas[top : top + side, left : left + side][inside] = np.asarray(PALETTE[color]) + shade
        labels[top : top + side, left : left + side][inside] = pair + 1
        box = (float(left + x0), float(top + y0), float(left + x1), float(top + y1))
        objects.append(SceneObject(shape, color, box))
    if config.noise:
        raw = np.frombuffer(random.bytes(canvas.size), dtype=np.uint8).reshape(canvas.shape)
        canvas += raw * np.float32(2 * config.noise / 255) - np.float32(config.noise)
    image = np.clip(canvas, 0, 255).astype(np.uint8)
    placed = tuple(objects)
    return Scene(image, labels, placed, caption_of(placed))


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise UserError(f"scenes have no split {split!r}; the splits are {', '.join(SPLITS)}")


def draw_batch(
    config: SceneConfig, seed: int, indices: Iterable[int], split: str = "train"
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw many scenes into two arrays.

    Returns:
        Images ``(scenes, H, W, 3)`` and pixel codes ``(scenes, H, W)``, both uint8.
    """
    scenes = list(indices)
    size = config.image_size
    images = np.empty((len(scenes), size, size, 3), dtype=np.uint8)
    labels = np.empty((len(scenes), size, size), dtype=np.uint8)
    for i, index in enumerate(scenes):
        scene = draw_scene(config, seed, index, split)
        images[i], labels[i] = scene.image, scene.labels
    return images, labels


def pair_presence(config: SceneConfig, labels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The shape-colour pairs that each image shows, on which the shipped backbone is pretrained.

    Args:
        config: The config of the scenes.
        labels: Pixel codes ``(..., H, W)``.

    Returns:
        bool ``(..., len(classes) - 1)``; column ``i`` is ``classes[i + 1]``.
    """
    flat = labels.reshape(-1, labels.shape[-2] * labels.shape[-1])
    present = np.zeros((flat.shape[0], len(config.classes)), dtype=bool)
    present[np.arange(flat.shape[0])[:, None], flat] = True
    return present[:, 1:].reshape(*labels.shape[:-2], -1)


class SceneSource(ImageSource):
    """A split of the built-in scenes, as a source of images and of labelled images.

    Args:
        config: How scenes look.
        split: One of ``SPLITS``.
        length: Number of scenes in the split.
        seed: Seed of the scenes.

    Raises:
        UserError: The split is unknown or the length negative.
    """

    kind = "scenes"
    attributes = None
    class_kinds = None

    def __init__(
        self, config: SceneConfig | None = None, split: str = "train", length: int = 20_000, seed: int = 0
    ) -> None:
        _check_split(split)
        if length < 0:
            raise UserError(f"the number of scenes must not be negative, but it is {length}")
        self.config = config if config is not None else SceneConfig()
        self.split, self.length, self.seed = split, length, seed
        self.classes = self.config.classes

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        """The scene's stable name, ``scene-<index>``."""
        return f"scene-{self._checked(index)}"

    def scene(self, index: int) -> Scene:
        """The scene with its objects and caption."""
        return draw_scene(self.config, self.seed, self._checked(index), self.split)

    def load(self, index: int) -> Image.Image:
        """The image in RGB."""
        return Image.fromarray(self.scene(index).image)

    def load_labelled(self, index: int) -> tuple[Image.Image, NDArray[np.uint8]]:
        """The image and its pixel codes: uint8 ``(H, W)``, indices into ``classes``."""
        scene = self.scene(index)
        return Image.fromarray(scene.image), scene.labels

    def fingerprint(self) -> str:
        """A short hash of config, seed, split and length."""
        parts = [dataclasses.asdict(self.config), self.split, self.length, self.seed]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def _checked(self, index: int) -> int:
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        return index
