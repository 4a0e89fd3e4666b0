"""`localign vlm score`: score stored answers again, or compare models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from localign.engine import run_folder
from localign.errors import UserError
from localign.options.vlm.evaluation import ScoreConfig
from localign.text.printing import console, printable
from localign.vlm.evaluation.compare.charts import comparison_drawings
from localign.vlm.evaluation.compare.comparison import Comparison, compare
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
    models = parse_models(config.runs, skip_missing=config.skip_missing)
    folders = list(dict.fromkeys(folder for model in models for folder in model.folders))
    if len(folders) > 1:
        notes: list[str] = []
        if config.skip_missing:
            models, notes = without_missing(models)
        draw_comparison(compare_models(models, config.scoring, notes=notes), Path(config.out or "comparison"))
        return
    if config.skip_missing:
        raise UserError("--skip-missing has no effect with a single folder; give several folders")
    if len(config.runs) > 1 or Path(config.runs[0]) != folders[0]:
        raise UserError(
            f"{config.runs[0]}: a single folder cannot be compared; give several folders, or the folder without a name"
        )
    if config.out is not None:
        raise UserError("--out has no effect with a single folder; its scores are written into that folder")
    _write(_rescored(folders[0], config.scoring))


def is_evaluated(folder: Path) -> bool:
    """Whether a folder holds the results of a finished evaluation."""
    return all((folder / name).is_file() for name in (ANSWERS_FILE, run_folder.RESULTS_FILE))


def without_missing(models: Sequence[PanelModel]) -> tuple[list[PanelModel], list[str]]:
    """The models that have been evaluated, with those of their training seeds that have been.

    Prints a line for every evaluation that is missing.

    Returns:
        The models, and notes on panels whose first model is missing.

    Raises:
        UserError: Nothing has been evaluated.
    """
    labels: dict[Path, list[str]] = {}
    for model in models:
        for folder in model.folders:
            if not is_evaluated(folder):
                labels.setdefault(folder, []).append(model.label)
    found = [
        replace(model, folders=kept)
        for model in models
        if (kept := tuple(folder for folder in model.folders if folder not in labels))
    ]
    if not found:
        raise UserError(
            f"nothing to draw: none of {len(labels)} evaluations is finished, the first of them {next(iter(labels))}; "
            "run `localign vlm eval` first"
        )
    for folder, names in labels.items():
        print(f"missing    {printable(str(folder))}: {printable(', '.join(names))}")
    return found, _replaced_baselines(models, found)


def _replaced_baselines(models: Sequence[PanelModel], found: Sequence[PanelModel]) -> list[str]:
    first: dict[tuple[str, str], PanelModel] = {}
    first_found: dict[tuple[str, str], PanelModel] = {}
    for panels, some in ((first, models), (first_found, found)):
        for model in some:
            panels.setdefault((model.figure, model.panel), model)
    return [
        f"{first[panel].label} is missing, so the differences of its panel are to {model.name}"
        for panel, model in first_found.items()
        if model.label != first[panel].label
    ]


def compare_models(
    models: Sequence[PanelModel],
    scoring: str = "default",
    *,
    others: Sequence[PanelModel] = (),
    notes: Sequence[str] = (),
) -> Comparison:
    """Compare evaluated models.

    Args:
        models: The models; each panel is compared with its first model.
        scoring: As for `localign vlm eval`.
        others: Further models that count in the scales of the radar charts only.
        notes: Further notes for readers.

    Raises:
        UserError: A folder holds no answers, or the models answered different questions.
    """
    folders = dict.fromkeys(folder for model in (*models, *others) for folder in model.folders)
    summaries = {folder: _summarised(folder, scoring) for folder in folders}

    def with_summaries(entries: Sequence[PanelModel]) -> list[ComparedModel]:
        return [ComparedModel(entry, tuple(summaries[f][1] for f in entry.folders)) for entry in entries]

    comparison = compare(with_summaries(models), with_summaries(others))
    comparison["models"] = {
        model.label: [summaries[folder][0] for folder in model.folders] for model in models
    }
    comparison["notes"] += notes
    return comparison


def draw_comparison(comparison: Comparison, out: Path, colour_order: Sequence[str] = ()) -> list[Path]:
    """Print a comparison's table, and write its tables and charts into a folder; returns the paths.

    Args:
        comparison: The comparison.
        out: The folder.
        colour_order: Names of models that take the first colours of charts.
    """
    console(WIDTH).print(comparison_table(comparison))
    drawings, not_drawn = comparison_drawings(comparison, colour_order)
    for note in [*comparison["notes"], *not_drawn]:
        print(f"note       {printable(note)}")
    paths = write_comparison(out, comparison)
    paths += [path for drawing in drawings for path in drawing.save(out)]
    for path in paths:
        print(f"written    {printable(path)}")
    return paths


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
