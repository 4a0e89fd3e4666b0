"""Questions about scenes, phrased like the benchmarks' questions: the built-in data set for vision-language models.

The questions about a scene are a pure function of (world, seed, split, index, kind). For any wording, yes and no,
true and false, and the letters of choices are equally frequent answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, get_args

import numpy as np

from localign import rng
from localign.data.scenes import Scene, SceneConfig, SceneObject, relation
from localign.options.names import QuestionKind

KINDS: tuple[QuestionKind, ...] = get_args(QuestionKind)
T = TypeVar("T")
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

# Weight of each count among the counts that a scene offers: in the default world the three answers are then about
# equally frequent. Scenes have 3 or more of a kind too rarely to ask about.
_COUNT_WEIGHTS = {0: 1.0, 1: 1.0, 2: 3.5}
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class SceneQuestion:
    """One question about a scene."""

    kind: QuestionKind
    message: str
    """The question, without a prompt format around it."""
    answer: str
    box: Box | None = None
    """The object's box, for referring questions."""


QuestionGenerator = Callable[[SceneConfig, Scene, np.random.Generator], Iterator[SceneQuestion]]


def make_questions(
    world: SceneConfig, scene: Scene, *, seed: int, split: str, index: int, kinds: Sequence[str], count: int
) -> list[SceneQuestion]:
    """Distinct questions about one scene.

    Args:
        world: The config that the scene was drawn with.
        scene: Scene ``index`` of ``split``.
        seed: Seed of the questions.
        split: Name of the scene's split.
        index: The scene's index in the split.
        kinds: Some of ``KINDS``, asked in turn in a random order; a kind named twice is asked twice as often.
        count: Number of questions. There are fewer if a scene does not suit a kind (a relation needs two objects)
            or a kind runs out of questions. Answers are exactly balanced if each kind is asked once.
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


def normalised_box(item: SceneObject, image_size: int) -> Box:
    """An object's box as shares of a square image, to two decimals."""
    left, top, right, bottom = (round(pixels / image_size, 2) for pixels in item.box)
    return left, top, right, bottom


def box_text(box: Sequence[float]) -> str:
    """A box (or point) as written in questions and answers: ``[0.12, 0.30, 0.47, 0.61]``."""
    return f"[{', '.join(f'{value:.2f}' for value in box)}]"


# -- one generator per kind of question, which ends when the scene has no more ---------------------------------


def _referring(world: SceneConfig, scene: Scene, random: np.random.Generator) -> Iterator[SceneQuestion]:
    """Ask for an object's box."""
    for item in scene.objects:
        box = normalised_box(item, world.image_size)
        yield SceneQuestion("referring", REFERRING.format(item.name), box_text(box), box)


def _position(world: SceneConfig, scene: Scene, random: np.random.Generator) -> Iterator[SceneQuestion]:
    """Ask which object is at a point. With a single object the answer would not depend on the point."""
    if len(scene.objects) < 2:
        return
    for item in reversed(
        scene.objects
    ):  # so that a referring question about the scene rarely reveals the answer
        point = [pixels / world.image_size for pixels in item.center]
        yield SceneQuestion("position", f"What is at {box_text(point)}?\n{SHORT}", item.name)


def _count(world: SceneConfig, scene: Scene, random: np.random.Generator) -> Iterator[SceneQuestion]:
    """Ask for the number of objects of a colour or a shape."""
    counts = {f"{color} objects": sum(o.color == color for o in scene.objects) for color in world.colors}
    counts |= {_plural(shape): sum(o.shape == shape for o in scene.objects) for shape in world.shapes}
    remaining = {name: count for name, count in counts.items() if count in _COUNT_WEIGHTS}
    while remaining:
        answers = sorted(set(remaining.values()))
        weights = np.array([_COUNT_WEIGHTS[count] for count in answers])
        count = answers[random.choice(len(answers), p=weights / weights.sum())]
        name = _pick([name for name in remaining if remaining[name] == count], random)
        del remaining[name]
        yield SceneQuestion("count", f"How many {name} are there?\n{SHORT}", str(count))


def _relation(world: SceneConfig, scene: Scene, random: np.random.Generator) -> Iterator[SceneQuestion]:
    """Ask whether a statement about two objects is true; false statements say the opposite."""
    for pair in _shuffled(list(itertools.combinations(scene.objects, 2)), random):
        first, second = _shuffled(pair, random)
        truth, actual = bool(random.integers(2)), relation(first, second)
        stated = actual if truth else _OPPOSITE[actual]
        statement = f"The {first.name} is {stated} the {second.name}."
        yield SceneQuestion("relation", STATEMENT.format(statement), str(truth))


def _presence(world: SceneConfig, scene: Scene, random: np.random.Generator) -> Iterator[SceneQuestion]:
    """Ask whether an object is in the scene; absent objects share colour or shape with one that is."""
    present = {item.name for item in scene.objects}
    colors, shapes = {o.color for o in scene.objects}, {o.shape for o in scene.objects}
    similar = [f"{c} {s}" for c in world.colors for s in world.shapes if c in colors or s in shapes]
    streams = {
        "Yes": iter(_shuffled(sorted(present), random)),
        "No": iter(_shuffled([name for name in similar if name not in present], random)),
    }
    while True:
        answer = "Yes" if random.integers(2) else "No"
        name = next(streams[answer], None)
        if name is None:
            return
        article = "an" if name[0] in "aeiou" else "a"
        yield SceneQuestion("presence", f"Is there {article} {name} in the image?\n{SHORT}", answer)


def _attribute(world: SceneConfig, scene: Scene, random: np.random.Generator) -> Iterator[SceneQuestion]:
    """Ask for colour given shape, or shape given colour, of an object that the scene has once."""
    for question, answer, _ in _attributes(world, scene, random):
        yield SceneQuestion("attribute", f"{question}\n{SHORT}", answer)


def _choice(world: SceneConfig, scene: Scene, random: np.random.Generator) -> Iterator[SceneQuestion]:
    """An attribute question with up to four choices in random order; the answer is a letter."""
    for question, answer, values in _attributes(world, scene, random):
        others = _shuffled([value for value in values if value != answer], random)[: len(LETTERS) - 1]
        choices = _shuffled([answer, *others], random)
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
        message = "\n".join([question, *lines, LETTER])
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
    shapes, colors = [o.shape for o in scene.objects], [o.color for o in scene.objects]
    found = []
    for item in scene.objects:
        if shapes.count(item.shape) == 1:
            found.append((f"What colour is the {item.shape}?", item.color, world.colors))
        if colors.count(item.color) == 1:
            found.append((f"What shape is the {item.color} object?", item.shape, world.shapes))
    return _shuffled(found, random)


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _shuffled(items: Sequence[T], random: np.random.Generator) -> list[T]:
    return [items[i] for i in random.permutation(len(items))]


def _pick(items: Sequence[T], random: np.random.Generator) -> T:
    return items[int(random.integers(len(items)))]
