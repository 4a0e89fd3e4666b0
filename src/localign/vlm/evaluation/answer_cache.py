"""Raw answers on disk, as they come: what was asked once is not asked again.

Each process appends to a file of its own. A line belongs to a key, which is made of everything its answer depends
on; a line that was cut off by a kill counts as not there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from localign.vlm.scoring.base import MAX_NEW_TOKENS, Answer, Benchmark, Question
from localign.vlm.scoring.boxes import BoxFrame

FOLDER = "responses"


def answer_key(identity: Mapping[str, str], benchmark: Benchmark, question: Question, prompt: str) -> str:
    """Changes with the model, the prompt, the benchmark's version, and the size of the image's file.

    Args:
        identity: The model's.
        benchmark: Whose question it is.
        question: What is asked.
        prompt: With all words of the model's prompt format.
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
    """All answers by key, from whichever processes.

    Args:
        folder: Of the evaluation.
        frame: What coordinates in the answers refer to.
    """
    found = {}
    for path in sorted((folder / FOLDER).glob("*.jsonl")):
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if (response := _response(line, frame)) is not None:
                    found[response[0]] = response[1]
    return found


def _response(line: str, frame: BoxFrame | None) -> tuple[str, Answer] | None:
    """Key and answer; None of a line that is not whole, or that no AnswerCacheWriter wrote."""
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
    """Appends to one process's file; what :meth:`add` was given is on the disk when it returns.

    Args:
        folder: Of the evaluation.
        rank: The process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        path = folder / FOLDER / f"rank{rank}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        _drop_torn_end(self._file)

    def add(self, answers: Iterable[tuple[str, str, Answer]]) -> None:
        """Keys, ids of questions, and answers."""
        lines = []
        for key, name, answer in answers:
            said = (
                {"probabilities": list(answer.probabilities)}
                if answer.probabilities
                else {"text": answer.text}
            )
            lines.append(json.dumps({"key": key, "id": name, **said}) + "\n")
        self._file.write("".join(lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def _drop_torn_end(file: Any) -> None:
    """Cut a file after its last whole line."""
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
