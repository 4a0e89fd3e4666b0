"""Data sets of questions on scenes: images and conversations in a folder, in LLaVA's format.

A data set is a pure function of its settings, which the folder keeps.
"""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from localign.data.parallel import in_processes, parts
from localign.data.scenes import Scene, SceneConfig, SceneSource
from localign.errors import UserError, did_you_mean
from localign.files import fsync_path, replace_text
from localign.vlm.data.scene_questions import KINDS, SceneQuestion, make_questions

QUESTIONS_FILE, SETTINGS_FILE, IMAGES = "questions.json", "settings.json", "images"
_FLUSHED_AT_ONCE = 16
"""Images written to the disk for good at a time: it waits, and does little."""
FORMAT = 1
"""Raised when the same settings would give other questions."""


@dataclass(frozen=True)
class DatasetQuestion:
    """A question of a data set on disk, to be asked by itself."""

    id: str
    image: Path
    question: SceneQuestion


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
        kinds: See :func:`make_questions`.
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


def read_questions(path: str | Path) -> list[DatasetQuestion]:
    """The questions of :func:`write_dataset`, one by one, whatever conversations they were put into.

    Raises:
        UserError: The file is missing or has no kinds of questions in it.
    """
    path = Path(path)
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        return [
            DatasetQuestion(f"{record['id']}-{turn}", path.parent / record["image"], question)
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
                f"unknown kind of question {kind!r}; known: {', '.join(KINDS)}{did_you_mean(kind, KINDS)}"
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
        asked = make_questions(
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


def _record(name: str, image: str, asked: Sequence[SceneQuestion]) -> dict[str, Any]:
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


def _questions_in(record: dict[str, Any]) -> Iterator[SceneQuestion]:
    values = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
    turns = zip(record["kinds"], values[::2], values[1::2], record["boxes"], strict=True)
    for kind, message, answer, box in turns:
        yield SceneQuestion(kind, message, answer, tuple(box) if box else None)
