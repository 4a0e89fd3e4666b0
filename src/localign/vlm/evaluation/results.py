"""The files of an evaluation: every answer with its score (answers.jsonl), and the metrics (results.json)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from localign.errors import UserError
from localign.files import replacing
from localign.text.printing import printable
from localign.text.reading import json_lines
from localign.vlm.benchmarks.table import benchmark, benchmark_class
from localign.vlm.scoring.base import Benchmark, QuestionSet
from localign.vlm.scoring.boxes import BoxFrame
from localign.vlm.scoring.intervals import intervals
from localign.vlm.scoring.questions import Answer, Payload, Question, Sample

ANSWERS_FILE = "answers.jsonl"


class AnswerRecord(Sample):
    """One line of ``answers.jsonl``: a scored answer with its whole question. ``frame`` is there for every answer."""

    benchmark: str
    version: int
    """Name of the benchmark."""
    message: str
    prompt: str
    """The message in the model's prompt format."""
    choices: Sequence[str]
    payload: Payload
    answer: str | Sequence[float]
    """The raw answer: text, or the probabilities of the choices."""


class MetricValue(TypedDict):
    """A metric in percent."""

    value: float | None
    """None where the samples do not define it."""
    interval: list[float] | None
    """``[low, high]``, 95 %, over images."""


class _Edition(TypedDict, total=False):
    edition: str
    """Digest of the question files, see :func:`~localign.vlm.scoring.base.edition_of`; old results lack it."""


class OutcomeFacts(_Edition):
    """The questions of one benchmark and the way they were scored."""

    version: int
    scoring: str
    questions: int
    splits: dict[str, int]
    """Questions by split."""
    limit: int | None
    """Maximum number of questions per split."""
    notes: list[str]
    """Differences of the data from the official data."""
    invalid: int
    """Answers that hold nothing to score."""
    headline: list[str]
    """The metrics that represent the benchmark in tables."""


class BenchmarkOutcome(OutcomeFacts):
    """One benchmark's part of ``results.json``."""

    figures: dict[str, MetricValue]


class _EvalResults(TypedDict):
    command: str
    model: dict[str, str | None]
    """``name``, ``boxes`` (the box frame), and the model's identity."""
    benchmarks: dict[str, BenchmarkOutcome]
    versions: dict[str, Any]


class EvalResults(_EvalResults, total=False):
    """The ``results.json`` of an evaluation."""

    engine: str
    """lmms-eval, for an evaluation with that engine."""
    tasks: dict[str, dict[str, float]]
    """The metrics of lmms-eval's own tasks, in the tasks' units."""


@dataclass(frozen=True)
class ScoredAnswers:
    """The scored answers to one benchmark."""

    benchmark: Benchmark
    records: Sequence[AnswerRecord]
    limit: int | None
    """Maximum number of questions per split."""
    notes: tuple[str, ...]
    """Differences of the data from the official data."""
    edition: str
    """Digest of the question files; empty where it is not known."""


def with_scoring(name: str, scoring: str) -> Benchmark:
    """A benchmark under a command's ``--scoring``; under its default scoring if it does not have that one.

    Raises:
        UserError: There is no such benchmark.
    """
    return benchmark(name, scoring if scoring in benchmark_class(name).scorings else None)


def score_answers(
    suite: Benchmark, data: QuestionSet, answers: Sequence[Answer], prompts: Sequence[str]
) -> ScoredAnswers:
    """Score answers.

    Args:
        suite: The benchmark.
        data: Its questions.
        answers: One per question, in the order of the questions.
        prompts: One per question.

    Raises:
        UserError: The answers' box frame is missing, or not the frame that is scored.
        RunFailure: An answer to choices does not have one probability per choice.
    """
    records = [
        _record(suite, question, answer, prompt)
        for question, answer, prompt in zip(data.questions, answers, prompts, strict=True)
    ]
    return ScoredAnswers(suite, records, data.limit, data.deviations, data.edition)


def rescore_answers(records: Sequence[AnswerRecord], scoring: str, outcome: OutcomeFacts) -> ScoredAnswers:
    """Score the written answers to one benchmark again.

    Args:
        records: All records of the benchmark.
        scoring: A command's ``--scoring``.
        outcome: The benchmark's part of ``results.json``.

    Raises:
        UserError: The answers belong to another version of the benchmark.
    """
    suite = with_scoring(records[0]["benchmark"], scoring)
    versions = {record["version"] for record in records}
    if versions != {suite.version}:
        raise UserError(
            f"the answers belong to version {min(versions)} of {suite.name}, but the current version is "
            f"{suite.version}; run `localign vlm eval` again"
        )
    rescored = [_record(suite, _question(record), _answer(record), record["prompt"]) for record in records]
    return ScoredAnswers(
        suite, rescored, outcome["limit"], tuple(outcome["notes"]), outcome.get("edition", "")
    )


def _record(suite: Benchmark, question: Question, answer: Answer, prompt: str) -> AnswerRecord:
    return {
        "benchmark": suite.name,
        "version": suite.version,
        "message": question.message,
        "prompt": prompt,
        "choices": question.choices,
        "payload": question.payload,
        "answer": answer.probabilities if question.choices else answer.text,
        "frame": None if answer.frame is None else str(answer.frame),
        **suite.score(question, answer),
    }


def _question(record: AnswerRecord) -> Question:
    return Question(
        id=record["id"],
        image=record["image"],
        message=record["message"],
        split=record["split"],
        payload=record["payload"],
        choices=tuple(record["choices"]),
    )


def _answer(record: AnswerRecord) -> Answer:
    frame = None if record["frame"] is None else BoxFrame.parse(record["frame"])
    if isinstance(record["answer"], str):
        return Answer(text=record["answer"], frame=frame)
    return Answer(probabilities=tuple(record["answer"]), frame=frame)


def invalid(record: AnswerRecord) -> bool:
    """Whether an answer holds nothing to score: no words, or no box where the question asks for one."""
    answer = record["answer"]
    return record.get("fault") is not None or (isinstance(answer, str) and not answer.strip())


def outcome_of(scored: ScoredAnswers) -> BenchmarkOutcome:
    """The part of one benchmark in ``results.json``."""
    ranges = intervals(scored.benchmark, scored.records)
    values = scored.benchmark.aggregate(scored.records)
    return {
        **facts_of(scored, values),
        "figures": {name: {"value": value, "interval": ranges[name]} for name, value in values.items()},
    }


def facts_of(scored: ScoredAnswers, metrics: Collection[str]) -> OutcomeFacts:
    """The questions of one benchmark and the way they were scored.

    Args:
        scored: The answers.
        metrics: The names of the metrics that the answers have.
    """
    suite, records = scored.benchmark, scored.records
    splits = Counter(record["split"] for record in records)
    facts: OutcomeFacts = {
        "version": suite.version,
        "scoring": suite.scoring,
        "questions": len(records),
        "splits": {split: splits[split] for split in suite.splits if splits[split]},
        "limit": scored.limit,
        "notes": list(scored.notes),
        "invalid": sum(map(invalid, records)),
        "headline": [name for name in suite.headline if name in metrics],
    }
    if scored.edition:
        facts["edition"] = scored.edition
    return facts


def notes_of(name: str, outcome: OutcomeFacts) -> list[str]:
    """The notes that belong beside a benchmark's metrics, one line each."""
    notes = [f"{name}: {note}" for note in outcome["notes"]]
    if outcome["limit"] is not None:
        notes.append(f"{name}: at most {outcome['limit']} questions per split")
    return notes


# -- answers.jsonl -------------------------------------------------------------------------------------------


def write_answers(folder: Path, scored: Sequence[ScoredAnswers]) -> Path:
    """Write the answers to all benchmarks to ``answers.jsonl``."""
    with (
        replacing(folder / ANSWERS_FILE) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace") as file,
    ):
        for part in scored:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in part.records)
    return folder / ANSWERS_FILE


def read_answers(path: Path) -> dict[str, list[AnswerRecord]]:
    """Read an ``answers.jsonl``.

    Returns:
        Records by benchmark, in the order of the file.

    Raises:
        UserError: The file is missing, or localign did not write it.
    """
    if not path.exists():
        raise UserError(f"there is no file {printable(path)}; `localign vlm eval` writes it")
    found: dict[str, list[AnswerRecord]] = {}
    for number, value in json_lines(path):
        record = _checked(value, f"{printable(path)}, line {number}")
        found.setdefault(record["benchmark"], []).append(record)
    return found


def _checked(record: Any, where: str) -> AnswerRecord:
    if not isinstance(record, dict) or not record.keys() >= _FIELDS.keys():
        raise UserError(f"{where}, is not an answer that localign wrote")
    for name, kinds in _FIELDS.items():
        if not isinstance(record[name], kinds) or (isinstance(record[name], bool) and bool not in kinds):
            raise UserError(f"{where}, is not an answer that localign wrote: {name} is {record[name]!r:.60}")
    checked: AnswerRecord = record  # type: ignore[assignment]  # the inner values are those that write_answers wrote
    return checked


_FIELDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("benchmark", "id", "image", "split", "message", "prompt"), (str,)),
    "version": (int,),
    "choices": (list,),
    "payload": (dict,),
    "answer": (str, list),
    "frame": (str, type(None)),
    "score": (int, float),
    "parsed": (str, list, type(None)),
    "truth": (str, list),
}
"""Fields of every line, and the types of their values."""
