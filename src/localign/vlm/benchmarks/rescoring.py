"""`localign vlm score`: scores from answers that are there, and comparisons of models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localign.engine import run as runs
from localign.errors import UserError
from localign.vlm.benchmarks.comparing import Pool, compare, comparison_table, write_comparison
from localign.vlm.benchmarks.options import ScoreConfig
from localign.vlm.benchmarks.results import (
    ANSWERS_FILE,
    Judged,
    judge_again,
    outcome_of,
    read_answers,
    screen,
    show_results,
    write_answers,
)


@dataclass(frozen=True)
class _Evaluation:
    folder: Path
    results: dict[str, Any]
    judged: dict[str, Judged]


def run_score(config: ScoreConfig) -> None:
    """Score one folder's answers again, or compare several.

    Raises:
        UserError: A folder holds no answers, or models answered different questions.
    """
    evaluations = [_scored(Path(run), config.scoring) for run in config.runs]
    if len(evaluations) == 1:
        _write(evaluations[0])
        return
    names = _names([evaluation.folder for evaluation in evaluations])
    pool: Pool = {n: evaluation.judged for n, evaluation in zip(names, evaluations, strict=True)}
    comparison = compare(pool) | {
        "models": {n: e.results["model"] for n, e in zip(names, evaluations, strict=True)}
    }
    screen().print(comparison_table(comparison))
    for note in comparison["notes"]:
        print(f"note       {note}")
    for path in write_comparison(Path(config.out or "comparison"), comparison):
        print(f"written    {path}")


def _scored(folder: Path, scoring: str) -> _Evaluation:
    records = read_answers(folder / ANSWERS_FILE)
    results = runs.read_results(folder)
    outcomes: Mapping[str, Any] = results.get("benchmarks", {})
    if not records or records.keys() != outcomes.keys():
        raise UserError(f"{folder} is no whole evaluation; run `localign vlm eval` again")
    judged = {name: judge_again(part, scoring, outcomes[name]) for name, part in records.items()}
    return _Evaluation(folder, results, judged)


def _write(evaluation: _Evaluation) -> None:
    outcomes = {name: outcome_of(judged) for name, judged in evaluation.judged.items()}
    answers = write_answers(evaluation.folder, list(evaluation.judged.values()))
    path = runs.write_results(evaluation.folder, evaluation.results | {"benchmarks": outcomes})
    show_results(outcomes)
    print(f"answers    {answers}")
    print(f"results    {path}")


def _names(folders: list[Path]) -> list[str]:
    """The folders' own names, or their paths where these are not different."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
