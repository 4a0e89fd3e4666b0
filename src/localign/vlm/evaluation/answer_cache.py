"""The cache of raw answers on disk, so that no question is asked twice.

Each process appends to its own file. A line belongs to a key, which is a hash of everything that the answer depends
on. An incomplete line, which a killed process leaves behind, is ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

from localign.vlm.scoring.base import Benchmark
from localign.vlm.scoring.boxes import BoxFrame
from localign.vlm.scoring.questions import MAX_NEW_TOKENS, Answer, Question

FOLDER = "responses"


class _Key(TypedDict):
    key: str
    id: str


class CachedAnswer(_Key, total=False):
    """One line of the cache; it has either the text or the probabilities."""

    text: str
    probabilities: list[float]


def answer_key(identity: Mapping[str, str], benchmark: Benchmark, question: Question, prompt: str) -> str:
    """The answer cache's key: a hash of the model, the prompt, the benchmark's version and the image's file size.

    Args:
        identity: The model's identity.
        benchmark: The benchmark of the question.
        question: The question.
        prompt: The question in the model's prompt format.
    """
    parts = [
        dict(identity),
        benchmark.name,
        benchmark.version,
        question.id,
        os.path.getsize(question.image),
        prompt,
        list(question.choices) or MAX_NEW_TOKENS,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def read_answer_cache(folder: Path, frame: BoxFrame | None) -> dict[str, Answer]:
    """All answers by key, from the files of all processes.

    Args:
        folder: The folder of the evaluation.
        frame: The frame of coordinates in the answers.
    """
    found = {}
    for path in sorted((folder / FOLDER).glob("*.jsonl")):
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if (entry := _parse(line, frame)) is not None:
                    found[entry[0]] = entry[1]
    return found


def _parse(line: str, frame: BoxFrame | None) -> tuple[str, Answer] | None:
    """Key and answer; None for an incomplete line, or one that :class:`AnswerCacheWriter` did not write."""
    try:
        entry: Any = json.loads(line) if line.endswith("\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("key"), str):
        return None
    text, probabilities = entry.get("text", ""), entry.get("probabilities", [])
    if not isinstance(text, str) or not isinstance(probabilities, list):
        return None
    if not all(isinstance(p, float) or (type(p) is int and abs(p) < 2**53) for p in probabilities):
        return None
    return entry["key"], Answer(text, tuple(map(float, probabilities)), frame)


class AnswerCacheWriter:
    """Appends answers to the file of one process.

    Args:
        folder: The folder of the evaluation.
        rank: The rank of the process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        path = folder / FOLDER / f"rank{rank}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        _truncate_to_last_line(self._file)

    def add(self, answers: Iterable[tuple[str, str, Answer]]) -> None:
        """Append answers; they are on the disk when this returns.

        Args:
            answers: Key, question id and answer of each.
        """
        lines = [json.dumps(_entry(key, name, answer)) + "\n" for key, name, answer in answers]
        self._file.write("".join(lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _entry(key: str, name: str, answer: Answer) -> CachedAnswer:
    if answer.probabilities:
        return {"key": key, "id": name, "probabilities": list(answer.probabilities)}
    return {"key": key, "id": name, "text": answer.text}


def _truncate_to_last_line(file: BinaryIO) -> None:
    """Cut a file off after its last complete line."""
    end = file.seek(0, os.SEEK_END)
    position = end
    while position > 0:
        begin = max(0, position - 65536)
        file.seek(begin)
        last = file.read(position - begin).rfind(b"\n")
        if last >= 0:
            position = begin + last + 1
            break
        position = begin
    if position < end:
        file.truncate(position)
    file.seek(0, os.SEEK_END)
