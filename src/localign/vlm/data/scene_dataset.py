"""Data sets of questions about scenes: images and conversations in LLaVA's format, in one folder.

A data set is a pure function of its settings, which are stored beside it.
"""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, cast

from PIL import Image

from localign.data.parallel import in_processes, parts
from localign.data.scenes import Scene, SceneConfig, SceneSource
from localign.errors import UserError, did_you_mean
from localign.files import fsync_path, replace_text
from localign.options.names import QuestionKind
from localign.text.reading import read_json, read_json_object
from localign.vlm.data.records import LLaVARecord, LLaVATurn
from localign.vlm.data.scene_questions import KINDS, Box, SceneQuestion, make_questions

QUESTIONS_FILE, SETTINGS_FILE, IMAGES = "questions.json", "settings.json", "images"
_FSYNC_THREADS = 16
"""Images that are fsynced at a time; fsync mostly waits."""
FORMAT = 1
"""Increase it when the same settings give different questions."""


class SceneRecord(LLaVARecord):
    """A scene's conversation, with the kind of question and the object's box of each turn."""

    kinds: list[QuestionKind]
    boxes: list[Box | None]


class DatasetSettings(TypedDict):
    """Content of ``settings.json``."""

    format: int
    split: str
    scenes: int
    questions_per_scene: int
    kinds: list[str]
    seed: int
    world: dict[str, Any]
    """Fields of :class:`~localign.data.scenes.SceneConfig`."""


@dataclass(frozen=True)
class DatasetQuestion:
    """A question of a data set on disk, to be asked on its own."""

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
    """Write images of the first scenes of a split, and one conversation about each.

    The file of questions holds :class:`SceneRecord` entries. It is written last, so where it exists the data set is
    complete. A second call completes an interrupted one and leaves a complete data set alone.

    Args:
        folder: Receives ``questions.json``, ``settings.json`` and ``images``.
        split: Name of a split of the scenes.
        scenes: Number of scenes. A scene for which no kind has a question gets no record.
        questions_per_scene: Most turns per conversation.
        kinds: See :func:`make_questions`.
        seed: Seed of the questions; the scenes always come from the world's seed 0.
        world: Default ``SceneConfig()``.
        processes: Processes that draw; 0 draws in this one. The files do not depend on it.

    Returns:
        The file of questions.

    Raises:
        UserError: An argument is out of range, or the folder holds a data set with other settings.
        RunFailure: A process died.
    """
    world = world or SceneConfig()
    _check(scenes, questions_per_scene, kinds)
    source = SceneSource(world, split, scenes)
    folder = Path(folder)
    settings = DatasetSettings(
        format=FORMAT,
        split=split,
        scenes=scenes,
        questions_per_scene=questions_per_scene,
        kinds=list(kinds),
        seed=seed,
        world=asdict(world),
    )
    _claim(folder, json.loads(json.dumps(settings)))  # as they will be read back
    path = folder / QUESTIONS_FILE
    if path.is_file():
        return path
    write = partial(_write_scenes, folder, source, seed=seed, kinds=kinds, count=questions_per_scene)
    spans = parts(scenes)
    written = in_processes(write, spans, len(spans), processes, "drawing scenes")
    records = list(itertools.chain.from_iterable(written))
    images = [folder / record["image"] for record in records]
    with ThreadPoolExecutor(_FSYNC_THREADS) as pool:
        list(pool.map(fsync_path, images))
    fsync_path(folder / IMAGES)
    replace_text(path, "[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")
    return path


def read_questions(path: str | Path) -> list[DatasetQuestion]:
    """Read the questions of :func:`write_dataset` one by one.

    Raises:
        UserError: The file is missing or is no file of questions about scenes.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no file of questions {path}")
    try:
        records: list[SceneRecord] = read_json(path)
        return [
            DatasetQuestion(f"{record['id']}-{turn}", path.parent / record["image"], question)
            for record in records
            for turn, question in enumerate(_questions_in(record))
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no file of questions about scenes: {error!r:.200}") from error


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


def _claim(folder: Path, settings: Mapping[str, object]) -> None:
    """Write the settings into the folder, or refuse if it holds a data set with other settings."""
    path = folder / SETTINGS_FILE
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        if (folder / QUESTIONS_FILE).exists():
            raise UserError(f"{folder} holds questions but no {SETTINGS_FILE}; give another folder")
        replace_text(path, json.dumps(settings, indent=1) + "\n")
        return
    saved = read_json_object(path)
    changed = [name for name in settings if saved.get(name) != settings[name]]
    if changed:
        listed = "; ".join(f"{name}: {saved.get(name)!r} there, {settings[name]!r} now" for name in changed)
        raise UserError(f"{folder} holds a data set with other settings: {listed}; give another folder")


def _write_scenes(
    folder: Path,
    source: SceneSource,
    span: tuple[int, int],
    *,
    seed: int,
    kinds: Sequence[str],
    count: int,
) -> list[SceneRecord]:
    """Write the images of the scenes in ``range(*span)``; returns their records."""
    records = []
    for index in range(*span):
        scene = source.scene(index)
        questions = make_questions(
            source.config, scene, seed=seed, split=source.split, index=index, kinds=kinds, count=count
        )
        if not questions:
            continue
        name = f"{IMAGES}/{index:06d}.png"
        _write_image(folder / name, scene)
        records.append(_record(f"{source.split}-{index:06d}", name, questions))
    return records


def _write_image(path: Path, scene: Scene) -> None:
    """Write a PNG unless the same file exists already."""
    buffer = io.BytesIO()
    Image.fromarray(scene.image).save(buffer, format="png", compress_level=1)
    content = buffer.getvalue()
    if path.is_file() and path.read_bytes() == content:
        return
    # The caller fsyncs all images together, which is much faster; nothing refers to them before that.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _record(name: str, image: str, questions: Sequence[SceneQuestion]) -> SceneRecord:
    conversations: list[LLaVATurn] = []
    for turn, question in enumerate(questions):
        mark = "<image>\n" if turn == 0 else ""
        conversations.append({"from": "human", "value": mark + question.message})
        conversations.append({"from": "gpt", "value": question.answer})
    return {
        "id": name,
        "image": image,
        "conversations": conversations,
        "kinds": [question.kind for question in questions],
        "boxes": [question.box for question in questions],
    }


def _questions_in(record: SceneRecord) -> Iterator[SceneQuestion]:
    values = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
    turns = zip(record["kinds"], values[::2], values[1::2], record["boxes"], strict=True)
    for kind, message, answer, box in turns:
        yield SceneQuestion(kind, message, answer, cast(Box, tuple(box)) if box else None)
