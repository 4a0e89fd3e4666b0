"""Questions on scenes, in the words of the benchmarks: the embedded data set of vision-language models.

The questions of a scene are a pure function of (world, seed, split, index, kind). Yes
and no, true and false, and the letters of choices come up equally often, whatever the words of the question.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np

from localign import rng
from localign.data.scenes import Scene, SceneConfig, SceneObject, relation
from localign.options.names import QuestionKind

KINDS: tuple[QuestionKind, ...] = get_args(QuestionKind)
Box = tuple[float, float, float, float]
"""Left, top, right and bottom as shares of the image's width and height, to two decimals."""

SHORT = "Answer the question using a single word or phrase."
REFERRING = 'Please provide the bounding box coordinate of the region this sentence describes: "{}"'
STATEMENT = (
    'Based on the image, is this statement "True" or "False"? {}\nRespond with "True" or "False" directly.'
)
LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a short image description."
LETTERS = "ABCD"

# How often a count is asked for, among those that a scene offers. Scenes offer 3 or more of a kind so rarely that
# it is left out; with these weights the three answers come up about equally often in the default world.
_COUNT_WEIGHTS = {0: 1.0, 1: 1.0, 2: 3.5}
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class SceneQuestion:
    """One question on a scene."""

    kind: QuestionKind
    message: str
    """What is asked, without the words that a prompt format puts around it."""
    answer: str
    box: Box | None = None
    """Of a referring question: where the object is."""


QuestionGenerator = Callable[[SceneConfig, Scene, np.random.Generator], Iterator[SceneQuestion]]


def make_questions(
    world: SceneConfig, scene: Scene, *, seed: int, split: str, index: int, kinds: Sequence[str], count: int
) -> list[SceneQuestion]:
    """The questions of one scene; none is asked twice.

    Args:
        world: What the scene was drawn from.
        scene: Scene ``index`` of ``split``.
        seed: Of the questions.
        split: One of the scenes' splits.
        index: The scene's position in it.
        kinds: Some of ``KINDS``, asked in turn in an order of the scene's own; one named twice comes twice
            as often.
        count: How many. A scene has fewer where a kind does not suit it (a relation needs two objects) or
            is exhausted. What is balanced is so exactly where a kind comes up once.
    """
    random = rng.generator(seed, f"questions/{split}", index)
    order = random.permutation(len(kinds))
    scene = replace(scene, objects=tuple(_shuffled(scene.objects, random)))
    streams = {
        kind: _GENERATORS[kind](world, scene, rng.generator(seed, f"questions/{split}/{kind}", index))
        for kind in kinds
    }
    turns = (streams[kinds[order[number % len(kinds)]]] for number in range(count))
    return [question for stream in turns if (question := next(stream, None)) is not None]


def normalised_box(thing: SceneObject, image_size: int) -> Box:
    """The object's box as shares of a square image, to two decimals."""
    left, top, right, bottom = (round(pixels / image_size, 2) for pixels in thing.box)
    return left, top, right, bottom


def box_text(box: Sequence[float]) -> str:
    """A box (or point) as it is written in questions and answers: ``[0.12, 0.30, 0.47, 0.61]``."""
    return f"[{', '.join(f'{value:.2f}' for value in box)}]"


# -- the kinds: each gives question after question on a scene, until it has no more ---------------------------


def _referring(world: SceneConfig, scene: Scene, random: np.random.Generator) -> Iterator[SceneQuestion]:
    """Where is what."""
    for thing in scene.objects:
        box = normalised_box(thing, world.image_size)
        yield SceneQuestion("referring", REFERRING.format(thing.name), box_text(box), box)


def _position(world: SceneConfig, scene: Scene, random: np.random.Generator) -> Iterator[SceneQuestion]:
    """What is where; of two objects or more, for else the answer would not depend on the position."""
    if len(scene.objects) < 2:
        return
    for thing in reversed(scene.objects):  # so a referring question beside it does not give it away
        point = [pixels / world.image_size for pixels in thing.center]
        yield SceneQuestion("position", f"What is at {box_text(point)}?\n{SHORT}", thing.name)


def _count(world: SceneConfig, scene: Scene, random: np.random.Generator) -> Iterator[SceneQuestion]:
    """How many objects of a colour or of a shape."""
    counts = {f"{color} objects": sum(o.color == color for o in scene.objects) for color in world.colors}
    counts |= {_plural(shape): sum(o.shape == shape for o in scene.objects) for shape in world.shapes}
    left = {name: count for name, count in counts.items() if count in _COUNT_WEIGHTS}
    while left:
        offered = sorted(set(left.values()))
        weights = np.array([_COUNT_WEIGHTS[count] for count in offered])
        count = offered[random.choice(len(offered), p=weights / weights.sum())]
        name = _pick([name for name in left if left[name] == count], random)
        del left[name]
        yield SceneQuestion("count", f"How many {name} are there?\n{SHORT}", str(count))


def _relation(world: SceneConfig, scene: Scene, random: np.random.Generator) -> Iterator[SceneQuestion]:
    """Whether a statement on two objects is true; a false one says the opposite."""
    for pair in _shuffled(list(itertools.combinations(scene.objects, 2)), random):
        first, second = _shuffled(pair, random)
        true, said = bool(random.integers(2)), relation(first, second)
        where = said if true else _OPPOSITE[said]
        statement = f"The {first.name} is {where} the {second.name}."
        yield SceneQuestion("relation", STATEMENT.format(statement), str(true))


def _presence(world: SceneConfig, scene: Scene, random: np.random.Generator) -> Iterator[SceneQuestion]:
    """Whether an object is shown; one that is not has its colour or its shape in common with one that is."""
    shown = {thing.name for thing in scene.objects}
    colors, shapes = ({getattr(o, of) for o in scene.objects} for of in ("color", "shape"))
    similar = [f"{c} {s}" for c in world.colors for s in world.shapes if c in colors or s in shapes]
    streams = {
        "Yes": iter(_shuffled(sorted(shown), random)),
        "No": iter(_shuffled([name for name in similar if name not in shown], random)),
    }
    while True:
        answer = "Yes" if random.integers(2) else "No"
        name = next(streams[answer], None)
        if name is None:
            return
        article = "an" if name[0] in "aeiou" else "a"
        yield SceneQuestion("presence", f"Is there {article} {name} in the image?\n{SHORT}", answer)


def _attribute(world: SceneConfig, scene: Scene, random: np.random.Generator) -> Iterator[SceneQuestion]:
    """Colour by shape, or shape by colour, where one object alone has it."""
    for asked, answer, _ in _attributes(world, scene, random):
        yield SceneQuestion("attribute", f"{asked}\n{SHORT}", answer)


def _choice(world: SceneConfig, scene: Scene, random: np.random.Generator) -> Iterator[SceneQuestion]:
    """The same with choices, up to four in random order; the answer is a letter."""
    for asked, answer, values in _attributes(world, scene, random):
        others = _shuffled([value for value in values if value != answer], random)[: len(LETTERS) - 1]
        choices = _shuffled([answer, *others], random)
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
        message = "\n".join([asked, *lines, LETTER])
        yield SceneQuestion("choice", message, LETTERS[choices.index(answer)])


def _caption(world: SceneConfig, scene: Scene, random: np.random.Generator) -> Iterator[SceneQuestion]:
    yield SceneQuestion("caption", CAPTION, f"{scene.caption[0].upper()}{scene.caption[1:]}.")


_GENERATORS: dict[str, QuestionGenerator] = {
    "referring": _referring,
    "position": _position,
    "count": _count,
    "relation": _relation,
    "presence": _presence,
    "attribute": _attribute,
    "choice": _choice,
    "caption": _caption,
}


def _attributes(
    world: SceneConfig, scene: Scene, random: np.random.Generator
) -> list[tuple[str, str, tuple[str, ...]]]:
    """(question, answer, all possible answers) in random order."""
    shapes, colors = ([getattr(o, of) for o in scene.objects] for of in ("shape", "color"))
    found = []
    for thing in scene.objects:
        if shapes.count(thing.shape) == 1:
            found.append((f"What colour is the {thing.shape}?", thing.color, world.colors))
        if colors.count(thing.color) == 1:
            found.append((f"What shape is the {thing.color} object?", thing.shape, world.shapes))
    return _shuffled(found, random)


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _shuffled(items: Sequence[Any], random: np.random.Generator) -> list[Any]:
    return [items[i] for i in random.permutation(len(items))]


def _pick(items: Sequence[Any], random: np.random.Generator) -> Any:
    return items[int(random.integers(len(items)))]
