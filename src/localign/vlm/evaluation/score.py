"""`localign vlm score`: scores from answers that are there, and comparisons of models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localign.engine import run_folder
from localign.errors import UserError
from localign.vlm.evaluation.compare.charts import comparison_drawings
from localign.vlm.evaluation.compare.comparison import compare
from localign.vlm.evaluation.compare.panels import ComparedModel, parse_models
from localign.vlm.evaluation.compare.summary import RunSummary, summarise_run
from localign.vlm.evaluation.compare.tables import comparison_table, write_comparison
from localign.vlm.evaluation.options import ScoreConfig
from localign.vlm.evaluation.results import (
    ANSWERS_FILE,
    ScoredAnswers,
    console,
    outcome_of,
    read_answers,
    rescore_answers,
    show_results,
    write_answers,
)


@dataclass(frozen=True)
class _Evaluation:
    folder: Path
    results: dict[str, Any]
    judged: dict[str, ScoredAnswers]


def run_score(config: ScoreConfig) -> None:
    """Score one folder's answers again, or compare several.

    Raises:
        UserError: A folder holds no answers, or models answered different questions.
    """
    entries = parse_models(config.runs)
    folders = list(dict.fromkeys(folder for entry in entries for folder in entry.folders))
    if len(folders) == 1:
        if len(config.runs) > 1 or Path(config.runs[0]) != folders[0]:
            raise UserError(
                f"{config.runs[0]}: a single folder has nothing to be compared with; give more, or no name"
            )
        if config.out is not None:
            raise UserError("--out has no effect with a single folder: its scores are written into it")
        _write(_scored(folders[0], config.scoring))
        return
    found = {folder: _summarised(folder, config.scoring) for folder in folders}
    pool = [ComparedModel(entry, tuple(found[folder][1] for folder in entry.folders)) for entry in entries]
    comparison = compare(pool) | {
        "models": {entry.label: [found[folder][0] for folder in entry.folders] for entry in entries}
    }
    console().print(comparison_table(comparison))
    for note in comparison["notes"]:
        print(f"note       {note}")
    out = Path(config.out or "comparison")
    drawings, undrawn = comparison_drawings(comparison)
    for reason in undrawn:
        print(f"note       {reason}")
    paths = write_comparison(out, comparison)
    for path in paths + [path for drawing in drawings for path in drawing.save(out)]:
        print(f"written    {path}")


def _summarised(folder: Path, scoring: str) -> tuple[dict[str, Any], dict[str, RunSummary]]:
    """What the model is, and what its answers came to."""
    evaluation = _scored(folder, scoring)
    model = {"folder": str(folder), **evaluation.results["model"]}
    return model, {name: summarise_run(judged) for name, judged in evaluation.judged.items()}


def _scored(folder: Path, scoring: str) -> _Evaluation:
    records = read_answers(folder / ANSWERS_FILE)
    results = run_folder.read_results(folder)
    outcomes: Mapping[str, Any] = results.get("benchmarks", {})
    if not records or records.keys() != outcomes.keys():
        raise UserError(f"{folder} is no whole evaluation; run `localign vlm eval` again")
    judged = {name: rescore_answers(part, scoring, outcomes[name]) for name, part in records.items()}
    return _Evaluation(folder, results, judged)


def _write(evaluation: _Evaluation) -> None:
    outcomes = {name: outcome_of(judged) for name, judged in evaluation.judged.items()}
    answers = write_answers(evaluation.folder, list(evaluation.judged.values()))
    path = run_folder.write_results(evaluation.folder, evaluation.results | {"benchmarks": outcomes})
    show_results(outcomes)
    print(f"answers    {answers}")
    print(f"results    {path}")
