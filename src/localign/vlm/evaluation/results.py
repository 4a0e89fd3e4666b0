"""What an evaluation leaves behind: every answer with its score, and the figures made of them."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from localign.errors import UserError
from localign.files import replacing
from localign.vlm.benchmarks.table import benchmark, benchmark_class
from localign.vlm.scoring.base import Answer, Benchmark, Question, QuestionSet, Sample
from localign.vlm.scoring.boxes import BoxFrame
from localign.vlm.scoring.intervals import intervals

ANSWERS_FILE = "answers.jsonl"
Record = dict[str, Any]
"""One line of ``answers.jsonl``: the question's fields, ``prompt``, the raw ``answer`` (text, or probabilities of the
choices), ``frame``, and all of its :data:`~localign.vlm.scoring.base.Sample`."""


@dataclass(frozen=True)
class ScoredAnswers:
    """One benchmark's answers, scored."""

    benchmark: Benchmark
    records: Sequence[Record]
    limit: int | None
    """Questions of each split, at most."""
    notes: tuple[str, ...]
    """In what the data fall short of the official ones."""


def with_scoring(name: str, scoring: str) -> Benchmark:
    """A benchmark under a command's ``--scoring``; where it has none of that name, its default.

    Raises:
        UserError: There is no such benchmark.
    """
    return benchmark(name, scoring if scoring in benchmark_class(name).scorings else None)


def score_answers(
    suite: Benchmark, data: QuestionSet, answers: Sequence[Answer], prompts: Sequence[str]
) -> ScoredAnswers:
    """Score answers, in the order of the questions.

    Raises:
        UserError: The answers' box frame is missing or not one that is scored.
        RunFailure: Probabilities are none.
    """
    records = [
        _record(suite, question, answer, prompt)
        for question, answer, prompt in zip(data.questions, answers, prompts, strict=True)
    ]
    return ScoredAnswers(suite, records, data.limit, data.missing)


def rescore_answers(records: Sequence[Record], scoring: str, outcome: Mapping[str, Any]) -> ScoredAnswers:
    """Score one benchmark's answers from what was written of them.

    Args:
        records: All of one benchmark.
        scoring: A command's ``--scoring``.
        outcome: The benchmark's part of ``results.json``.

    Raises:
        UserError: The answers were given to another version of the benchmark.
    """
    suite = with_scoring(records[0]["benchmark"], scoring)
    versions = {record["version"] for record in records}
    if versions != {suite.version}:
        raise UserError(
            f"the answers are to version {min(versions)} of {suite.name}, which is at version {suite.version}; "
            "run `localign vlm eval` again"
        )
    again = []
    for record in records:
        fields = {name: record[name] for name in ("id", "image", "message", "split", "payload")}
        question = Question(**fields, choices=tuple(record["choices"]))
        again.append(_record(suite, question, _answer(record), record["prompt"]))
    return ScoredAnswers(suite, again, outcome["limit"], tuple(outcome["notes"]))


def _record(suite: Benchmark, question: Question, answer: Answer, prompt: str) -> Record:
    return {
        "benchmark": suite.name,
        "version": suite.version,
        "message": question.message,
        "prompt": prompt,
        "choices": question.choices,
        "payload": dict(question.payload),
        "answer": answer.probabilities if question.choices else answer.text,
        "frame": None if answer.frame is None else str(answer.frame),
        **suite.score(question, answer),
    }


def _answer(record: Record) -> Answer:
    frame = None if record["frame"] is None else BoxFrame.parse(record["frame"])
    if record["choices"]:
        return Answer(probabilities=tuple(record["answer"]), frame=frame)
    return Answer(text=record["answer"], frame=frame)


def invalid(record: Sample) -> bool:
    """Whether an answer says nothing that can be scored: no words, or no box where one is asked for."""
    return record.get("fault") is not None or (not record["choices"] and not record["answer"].strip())


def outcome_of(judged: ScoredAnswers) -> dict[str, Any]:
    """A benchmark's part of ``results.json``; figures in percent with their 95 % intervals."""
    suite, records = judged.benchmark, judged.records
    ranges = intervals(suite, records)
    figures = {
        name: {"value": value, "interval": ranges[name]} for name, value in suite.aggregate(records).items()
    }
    return facts_of(judged, figures) | {"figures": figures}


def facts_of(judged: ScoredAnswers, figures: Collection[str]) -> dict[str, Any]:
    """What was asked and how it was scored, JSON-able; ``figures`` are the names of those there are."""
    suite, records = judged.benchmark, judged.records
    splits = Counter(record["split"] for record in records)
    return {
        "version": suite.version,
        "scoring": suite.scoring,
        "questions": len(records),
        "splits": {split: splits[split] for split in suite.splits if splits[split]},
        "limit": judged.limit,
        "notes": list(judged.notes),
        "invalid": sum(map(invalid, records)),
        "headline": [name for name in suite.headline if name in figures],
    }


def write_answers(folder: Path, judged: Sequence[ScoredAnswers]) -> Path:
    """``answers.jsonl``: every answer of all benchmarks."""
    with replacing(folder / ANSWERS_FILE) as temporary, temporary.open("w", encoding="utf-8") as file:
        for part in judged:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in part.records)
    return folder / ANSWERS_FILE


def read_answers(path: Path) -> dict[str, list[Record]]:
    """Records by benchmark, in the order of the file.

    Raises:
        UserError: There is no such file, or it is not what localign writes.
    """
    found: dict[str, list[Record]] = {}
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                record = _checked(line, f"{path}, line {number}")
                found.setdefault(record["benchmark"], []).append(record)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; `localign vlm eval` writes it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return found


def _checked(line: str, where: str) -> Record:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}, is not valid JSON: {error}") from None
    if not isinstance(record, dict) or not record.keys() >= _FIELDS:
        raise UserError(f"{where}, is no answer that localign wrote")
    return record


_FIELDS = {
    *("benchmark", "version", "id", "image", "split", "message", "prompt"),
    *("choices", "payload", "answer", "frame", "score", "parsed", "truth"),
}


def results_table(outcomes: Mapping[str, Mapping[str, Any]]) -> Table:
    """The figures that stand for each benchmark, for the screen."""
    table = Table(title="benchmarks", caption="percent, with 95 % intervals over images")
    for column in ("benchmark", "figure", "value", "interval", "questions", "invalid", "scoring"):
        words = column in ("benchmark", "figure", "scoring")
        table.add_column(column, justify="left" if words else "right", overflow="fold")
    for benchmark_name, outcome in outcomes.items():
        once = (f"{outcome['questions']:,}", f"{outcome['invalid']:,}", outcome["scoring"])
        for number, name in enumerate(outcome["headline"]):
            figure = outcome["figures"][name]
            table.add_row(
                benchmark_name if number == 0 else "",
                name.removeprefix("accuracy__"),
                shown(figure["value"]),
                format_interval(figure["interval"]),
                *(once if number == 0 else ("", "", "")),
            )
    return table


def console() -> Console:
    """As wide as the terminal; a file gets tables unfolded."""
    return Console(width=None if sys.stdout.isatty() else 150)


def show_results(outcomes: Mapping[str, Mapping[str, Any]]) -> None:
    """The table, and what must be said beside its figures, on the screen."""
    console().print(results_table(outcomes))
    for name, outcome in outcomes.items():
        for note in notes_of(name, outcome):
            print(f"note       {note}")


def shown(value: float | None, sign: str = "") -> str:
    """One decimal, or a dash where there is none."""
    return "–" if value is None else f"{value:{sign}.1f}"


def format_interval(interval: Sequence[float] | None, sign: str = "") -> str:
    """Both ends, or a dash."""
    return "–" if interval is None else " to ".join(shown(end, sign) for end in interval)


def notes_of(name: str, outcome: Mapping[str, Any]) -> list[str]:
    """What must be said beside a benchmark's figures, a line each."""
    notes = [f"{name}: {note}" for note in outcome["notes"]]
    if outcome["limit"] is not None:
        notes.append(f"{name}: at most {outcome['limit']} questions of each split")
    return notes
