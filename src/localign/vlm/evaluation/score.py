"""`localign vlm score`: score stored answers again, or compare models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from localign.engine import run_folder
from localign.errors import UserError
from localign.options.vlm.evaluation import ScoreConfig
from localign.text.printing import console, printable
from localign.vlm.evaluation.compare.charts import comparison_drawings
from localign.vlm.evaluation.compare.comparison import compare
from localign.vlm.evaluation.compare.panels import ComparedModel, PanelModel, parse_models
from localign.vlm.evaluation.compare.summary import RunSummary, summarise_run
from localign.vlm.evaluation.compare.tables import comparison_table, write_comparison
from localign.vlm.evaluation.printing import WIDTH, print_results
from localign.vlm.evaluation.results import (
    ANSWERS_FILE,
    EvalResults,
    ScoredAnswers,
    outcome_of,
    read_answers,
    rescore_answers,
    write_answers,
)


@dataclass(frozen=True)
class _Evaluation:
    folder: Path
    results: EvalResults
    scored: dict[str, ScoredAnswers]
    """By benchmark."""


def run_score(config: ScoreConfig) -> None:
    """Score the answers of one folder again, or compare the models of several folders.

    Raises:
        UserError: A folder holds no answers, or the models answered different questions.
    """
    models = parse_models(config.runs)
    folders = list(dict.fromkeys(folder for model in models for folder in model.folders))
    if len(folders) > 1:
        _compare(models, folders, config.scoring, Path(config.out or "comparison"))
        return
    if len(config.runs) > 1 or Path(config.runs[0]) != folders[0]:
        raise UserError(
            f"{config.runs[0]}: a single folder cannot be compared; give several folders, or the folder without a name"
        )
    if config.out is not None:
        raise UserError("--out has no effect with a single folder; its scores are written into that folder")
    _write(_rescored(folders[0], config.scoring))


def _compare(models: list[PanelModel], folders: list[Path], scoring: str, out: Path) -> None:
    summaries = {folder: _summarised(folder, scoring) for folder in folders}
    pool = [ComparedModel(model, tuple(summaries[folder][1] for folder in model.folders)) for model in models]
    comparison = compare(pool)
    comparison["models"] = {
        model.label: [summaries[folder][0] for folder in model.folders] for model in models
    }
    console(WIDTH).print(comparison_table(comparison))
    drawings, not_drawn = comparison_drawings(comparison)
    for note in [*comparison["notes"], *not_drawn]:
        print(f"note       {printable(note)}")
    paths = write_comparison(out, comparison)
    for path in paths + [path for drawing in drawings for path in drawing.save(out)]:
        print(f"written    {printable(path)}")


def _summarised(folder: Path, scoring: str) -> tuple[dict[str, str | None], dict[str, RunSummary]]:
    """The model's description, and a summary of its answers by benchmark."""
    evaluation = _rescored(folder, scoring)
    model = {"folder": str(folder), **evaluation.results["model"]}
    return model, {name: summarise_run(scored) for name, scored in evaluation.scored.items()}


def _rescored(folder: Path, scoring: str) -> _Evaluation:
    records = read_answers(folder / ANSWERS_FILE)
    results = cast(EvalResults, run_folder.read_results(folder))
    outcomes = results.get("benchmarks", {})
    if not records or records.keys() != outcomes.keys():
        raise UserError(f"{folder} does not hold a complete evaluation; run `localign vlm eval` again")
    scored = {name: rescore_answers(part, scoring, outcomes[name]) for name, part in records.items()}
    return _Evaluation(folder, results, scored)


def _write(evaluation: _Evaluation) -> None:
    outcomes = {name: outcome_of(scored) for name, scored in evaluation.scored.items()}
    answers = write_answers(evaluation.folder, list(evaluation.scored.values()))
    path = run_folder.write_results(evaluation.folder, {**evaluation.results, "benchmarks": outcomes})
    print_results(outcomes)
    print(f"answers    {printable(answers)}")
    print(f"results    {printable(path)}")
