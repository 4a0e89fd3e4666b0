"""Questions on scenes, in the words of the benchmarks: the embedded data set of vision-language models.

The questions of a scene are a pure function of (world, seed, split, index, kind); so is a data set of them. Yes
and no, true and false, and the letters of choices come up equally often, whatever the words of the question.
"""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from localign import rng
from localign.data.parallel import in_processes, parts
from localign.data.scenes import Scene, SceneConfig, SceneObject, SceneSource, relation
from localign.errors import UserError, near
from localign.files import fsync_path, replace_text

QuestionKind = Literal[
    "referring", "position", "count", "relation", "presence", "attribute", "choice", "caption"
]
KINDS: tuple[QuestionKind, ...] = get_args(QuestionKind)
Box = tuple[float, float, float, float]
"""Left, top, right and bottom as shares of the image's width and height, to two decimals."""

QUESTIONS_FILE, SETTINGS_FILE, IMAGES = "questions.json", "settings.json", "images"
_FLUSHED_AT_ONCE = 16
"""Images written to the disk for good at a time: it waits, and does little."""
FORMAT = 1
"""Raised when the same settings would give other questions."""

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
class Question:
    """One question on a scene."""

    kind: QuestionKind
    message: str
    """What is asked, without the words that a prompt format puts around it."""
    answer: str
    box: Box | None = None
    """Of a referring question: where the object is."""


@dataclass(frozen=True)
class AskedQuestion:
    """A question of a data set on disk, to be asked by itself."""

    id: str
    image: Path
    question: Question


Asking = Callable[[SceneConfig, Scene, np.random.Generator], Iterator[Question]]


def questions_of(
    world: SceneConfig, scene: Scene, *, seed: int, split: str, index: int, kinds: Sequence[str], count: int
) -> list[Question]:
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
        kind: _ASKING[kind](world, scene, rng.generator(seed, f"questions/{split}/{kind}", index))
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


def _referring(world: SceneConfig, scene: Scene, random: np.random.Generator) -> Iterator[Question]:
    """Where is what."""
    for thing in scene.objects:
        box = normalised_box(thing, world.image_size)
        yield Question("referring", REFERRING.format(thing.name), box_text(box), box)


def _position(world: SceneConfig, scene: Scene, random: np.random.Generator) -> Iterator[Question]:
    """What is where; of two objects or more, for else the answer would not depend on the position."""
    if len(scene.objects) < 2:
        return
    for thing in reversed(scene.objects):  # so a referring question beside it does not give it away
        point = [pixels / world.image_size for pixels in thing.center]
        yield Question("position", f"What is at {box_text(point)}?\n{SHORT}", thing.name)


def _count(world: SceneConfig, scene: Scene, random: np.random.Generator) -> Iterator[Question]:
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
        yield Question("count", f"How many {name} are there?\n{SHORT}", str(count))


def _relation(world: SceneConfig, scene: Scene, random: np.random.Generator) -> Iterator[Question]:
    """Whether a statement on two objects is true; a false one says the opposite."""
    for pair in _shuffled(list(itertools.combinations(scene.objects, 2)), random):
        first, second = _shuffled(pair, random)
        true, said = bool(random.integers(2)), relation(first, second)
        where = said if true else _OPPOSITE[said]
        statement = f"The {first.name} is {where} the {second.name}."
        yield Question("relation", STATEMENT.format(statement), str(true))


def _presence(world: SceneConfig, scene: Scene, random: np.random.Generator) -> Iterator[Question]:
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
        yield Question("presence", f"Is there {article} {name} in the image?\n{SHORT}", answer)


def _attribute(world: SceneConfig, scene: Scene, random: np.random.Generator) -> Iterator[Question]:
    """Colour by shape, or shape by colour, where one object alone has it."""
    for asked, answer, _ in _attributes(world, scene, random):
        yield Question("attribute", f"{asked}\n{SHORT}", answer)


def _choice(world: SceneConfig, scene: Scene, random: np.random.Generator) -> Iterator[Question]:
    """The same with choices, up to four in random order; the answer is a letter."""
    for asked, answer, values in _attributes(world, scene, random):
        others = _shuffled([value for value in values if value != answer], random)[: len(LETTERS) - 1]
        choices = _shuffled([answer, *others], random)
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
        message = "\n".join([asked, *lines, LETTER])
        yield Question("choice", message, LETTERS[choices.index(answer)])


def _caption(world: SceneConfig, scene: Scene, random: np.random.Generator) -> Iterator[Question]:
    yield Question("caption", CAPTION, f"{scene.caption[0].upper()}{scene.caption[1:]}.")


_ASKING: dict[str, Asking] = {
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


# -- data sets on disk ---------------------------------------------------------------------------------------


def write_dataset(
    folder: str | Path,
    split: str,
    scenes: int,
    questions_per_scene: int,
    kinds: Sequence[str] = KINDS,
    seed: int = 0,
    *,
    world: SceneConfig | None = None,
    processes: int = 0,
) -> Path:
    """Write questions on the first scenes of a split, one conversation per scene, and the images.

    The file of questions is in LLaVA's form, with the keys ``kinds`` and ``boxes`` beside it, one entry per
    turn. It is written last: where it is there, the data set is whole. What an interrupted call left is
    completed, and what is complete is left as it is.

    Args:
        folder: Gets ``questions.json``, ``settings.json`` and ``images``.
        split: One of the scenes' splits.
        scenes: How many. Those that none of the kinds suits have no record.
        questions_per_scene: Turns of a conversation, at most.
        kinds: See :func:`questions_of`.
        seed: Of the questions; the scenes are those of the world's seed 0, as elsewhere.
        world: The default world where none is given.
        processes: That draw; 0 draws in this one. The files do not depend on it.

    Returns:
        The file of questions.

    Raises:
        UserError: An argument is out of range, or the folder holds questions of other settings.
        RunFailure: A process died.
    """
    world = world or SceneConfig()
    _check(scenes, questions_per_scene, kinds)
    source = SceneSource(world, split, scenes)
    folder = Path(folder)
    settings = {
        "format": FORMAT,
        "split": split,
        "scenes": scenes,
        "questions_per_scene": questions_per_scene,
        "kinds": list(kinds),
        "seed": seed,
        "world": asdict(world),
    }
    _claim(folder, json.loads(json.dumps(settings)))
    path = folder / QUESTIONS_FILE
    if path.is_file():
        return path
    write = partial(_write_scenes, folder, source, seed=seed, kinds=kinds, count=questions_per_scene)
    spans = parts(scenes)
    written = in_processes(write, spans, len(spans), processes, "drawing scenes")
    records = list(itertools.chain.from_iterable(written))
    images = [folder / record["image"] for record in records]
    with ThreadPoolExecutor(_FLUSHED_AT_ONCE) as pool:
        list(pool.map(fsync_path, images))
    fsync_path(folder / IMAGES)
    replace_text(path, "[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")
    return path


def read_questions(path: str | Path) -> list[AskedQuestion]:
    """The questions of :func:`write_dataset`, one by one, whatever conversations they were put into.

    Raises:
        UserError: The file is missing or has no kinds of questions in it.
    """
    path = Path(path)
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        return [
            AskedQuestion(f"{record['id']}-{turn}", path.parent / record["image"], question)
            for record in records
            for turn, question in enumerate(_questions_in(record))
        ]
    except FileNotFoundError as error:
        raise UserError(f"there is no file of questions {path}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no file of questions on scenes: {error!r}") from error


def _check(scenes: int, questions_per_scene: int, kinds: Sequence[str]) -> None:
    for name, value in (("scenes", scenes), ("questions per scene", questions_per_scene)):
        if value < 1:
            raise UserError(f"a data set needs {name}, not {value}")
    if not kinds:
        raise UserError(f"a data set needs kinds of questions; known: {', '.join(KINDS)}")
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(
                f"unknown kind of question {kind!r}; known: {', '.join(KINDS)}{near(kind, KINDS)}"
            )


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Note in the folder what it is to hold, or refuse where it holds something else."""
    path = folder / SETTINGS_FILE
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        if (folder / QUESTIONS_FILE).exists():
            raise UserError(f"{folder} holds questions that were not written here; give another folder")
        replace_text(path, json.dumps(settings, indent=1) + "\n")
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not readable JSON: {error}") from error
    changed = [name for name in settings if there.get(name) != settings[name]]
    if changed:
        listed = "; ".join(f"{name}: {there.get(name)!r} there, {settings[name]!r} now" for name in changed)
        raise UserError(f"{folder} holds other questions: {listed}; give another folder")


def _write_scenes(
    folder: Path,
    source: SceneSource,
    span: tuple[int, int],
    *,
    seed: int,
    kinds: Sequence[str],
    count: int,
) -> list[dict[str, Any]]:
    """Write the images of scenes from the first to before the second; their records."""
    records = []
    for index in range(*span):
        scene = source.scene(index)
        asked = questions_of(
            source.config, scene, seed=seed, split=source.split, index=index, kinds=kinds, count=count
        )
        if not asked:
            continue
        name = f"{IMAGES}/{index:06d}.png"
        _write_image(folder / name, scene)
        records.append(_record(f"{source.split}-{index:06d}", name, asked))
    return records


def _write_image(path: Path, scene: Scene) -> None:
    """Write a PNG, unless it is there already and whole."""
    buffer = io.BytesIO()
    Image.fromarray(scene.image).save(buffer, format="png", compress_level=1)
    content = buffer.getvalue()
    if path.is_file() and path.read_bytes() == content:
        return
    # Flushed together at the end, which takes a fraction of the time; until then nothing refers to it.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _record(name: str, image: str, asked: Sequence[Question]) -> dict[str, Any]:
    conversations = []
    for turn, question in enumerate(asked):
        mark = "<image>\n" if turn == 0 else ""
        conversations.append({"from": "human", "value": mark + question.message})
        conversations.append({"from": "gpt", "value": question.answer})
    return {
        "id": name,
        "image": image,
        "conversations": conversations,
        "kinds": [question.kind for question in asked],
        "boxes": [question.box for question in asked],
    }


def _questions_in(record: dict[str, Any]) -> Iterator[Question]:
    values = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
    turns = zip(record["kinds"], values[::2], values[1::2], record["boxes"], strict=True)
    for kind, message, answer, box in turns:
        yield Question(kind, message, answer, tuple(box) if box else None)
