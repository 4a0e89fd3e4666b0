"""Several models on the same questions: differences with their intervals, tests, and common scales.

There are two kinds of chance. *Over images*: what other images would have given to the same models, from paired
resampling; of several training seeds it is the mean's. *Over seeds*: what other runs of the same trainings would have
given on the same images, by Student's t. Neither interval holds the other's chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from localign.errors import UserError
from localign.statistics.bootstrap import percentile_interval
from localign.statistics.mcnemar import check_same_questions, mcnemar
from localign.statistics.paired import difference_interval_over_seeds, interval_over_seeds
from localign.statistics.z_scores import ZScores, z_scores
from localign.vlm.evaluation.compare.differences import differences
from localign.vlm.evaluation.compare.pool import ComparedModel
from localign.vlm.evaluation.compare.summary import Answered, Summary, answered
from localign.vlm.evaluation.results import notes_of

Comparison = dict[str, Any]
"""JSON-able; what :func:`compare` gives."""


Table = Mapping[str, Mapping[str, Answered]]
"""By benchmark and model."""


def compare(pool: Sequence[ComparedModel]) -> Comparison:
    """Compare every model with the first of its panel, and put all on common scales.

    Returns:
        ``panels``: figure, panel and models. ``benchmarks``: for each the ``outcomes`` by model, and for each model
        that has something to be compared with, ``differences`` by figure and ``mcnemar``. ``z_scores`` of the headline
        figures within this pool. ``notes``.

    Raises:
        UserError: No benchmark was answered by two of several models, or questions of one are different ones.
    """
    panels = _panels(pool)
    names = dict.fromkeys(name for contender in pool for run in contender.runs for name in run)
    table = {name: models for name in names if (models := _answers(name, pool))}
    several = len({contender.entry.folders for contender in pool}) > 1
    if several and not any(_distinct(models) > 1 for models in table.values()):
        raise UserError("there is no benchmark that two of the models answered")
    return {
        "panels": panels,
        "benchmarks": {name: _compared(panels, models) for name, models in table.items()},
        "z_scores": _scales(table, pool),
        "notes": list(_notes(table, pool)),
    }


def _panels(pool: Sequence[ComparedModel]) -> list[dict[str, Any]]:
    panels: dict[tuple[str, str], list[str]] = {}
    for contender in pool:
        entry = contender.entry
        panels.setdefault((entry.figure, entry.panel), []).append(entry.label)
    return [{"figure": f, "panel": p, "models": models} for (f, p), models in panels.items()]


def _distinct(models: Mapping[str, Answered]) -> int:
    """Models, each once, however many panels it is in."""
    return len({id(one) for one in models.values()})


# -- answers -------------------------------------------------------------------------------------------------


def _answers(name: str, pool: Sequence[ComparedModel]) -> dict[str, Answered]:
    """Of the models that answered a benchmark with all of their seeds."""
    found: dict[str, Answered] = {}
    same: dict[tuple[Path, ...], Answered] = {}
    for contender in pool:
        label, folders = contender.entry.label, contender.entry.folders
        if not all(name in run for run in contender.runs):
            continue
        if folders not in same:
            runs = [run[name] for run in contender.runs]
            first, base = next(((m, one.runs[0]) for m, one in found.items()), (label, runs[0]))
            for run in runs:
                _check_same(f"{name} of {first} and {label}", base, run)
            same[folders] = answered(runs)
        found[label] = same[folders]
    return found


def _check_same(what: str, first: Summary, second: Summary) -> None:
    try:
        check_same_questions(first.scores, second.scores)
    except UserError as error:
        raise UserError(f"{what}: {error}") from None


# -- one benchmark -------------------------------------------------------------------------------------------


def _compared(panels: Sequence[Mapping[str, Any]], models: Mapping[str, Answered]) -> dict[str, Any]:
    changes, tests = {}, {}
    for first, model in _pairs(panels):
        if first in models and model in models:
            base, other = models[first], models[model]
            changes[model] = _differences(base, other)
            tests[model] = mcnemar(base.mean_scores(), other.mean_scores())._asdict()
    return {
        "outcomes": {model: _outcome(one) for model, one in models.items()},
        "differences": changes,
        "mcnemar": tests,
    }


def _pairs(panels: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """The first model of every panel with each of its others."""
    for panel in panels:
        first, *others = panel["models"]
        yield from ((first, model) for model in others)


def _outcome(model: Answered) -> dict[str, Any]:
    """As in ``results.json``, with the spread over seeds; ``invalid`` is of all seeds together."""
    figures = {}
    for figure, value in model.figures.values.items():
        seeds = model.known(figure)
        figures[figure] = {
            "value": value,
            "interval": percentile_interval(model.figures.draws[figure]),
            "seeds": seeds,
            "interval_over_seeds": interval_over_seeds(seeds),
        }
    invalid = sum(run.facts["invalid"] for run in model.runs)
    return {**model.runs[0].facts, "invalid": invalid, "figures": figures}


def _differences(base: Answered, other: Answered) -> dict[str, Any]:
    return {
        figure: difference._asdict()
        | {"interval_over_seeds": difference_interval_over_seeds(base.known(figure), other.known(figure))}
        for figure, difference in differences(base.figures, other.figures).items()
    }


# -- all benchmarks ------------------------------------------------------------------------------------------


def _scales(table: Table, pool: Sequence[ComparedModel]) -> dict[str, Any]:
    """Means, deviations and scores are the pool's own: with other models they are others."""
    labels: dict[tuple[Path, ...], str] = {}
    for contender in pool:
        labels.setdefault(contender.entry.folders, contender.entry.label)
    figures: dict[str, dict[str, float | None]] = {model: {} for model in labels.values()}
    draws: dict[str, dict[str, torch.Tensor]] = {model: {} for model in labels.values()}
    for name, models in table.items():
        for model in figures:
            if model in models:
                one = models[model]
                for figure in one.runs[0].facts["headline"]:
                    figures[model][f"{name}: {figure}"] = one.figures.values[figure]
                    draws[model][f"{name}: {figure}"] = one.figures.draws[figure]
    scales = z_scores(figures)
    counts = {figure: sum(figure in row for row in scales.scores.values()) for figure in scales.means}
    averages = {
        model: {
            "value": scales.averages[model],
            "interval": _average_interval(scales, scales.scores[model], draws[model], counts),
        }
        for model in figures
    }
    # A model that is in several panels counts once, and has the same scores in all of them.
    own = {contender.entry.label: labels[contender.entry.folders] for contender in pool}
    return {
        "means": scales.means,
        "deviations": scales.deviations,
        "models": counts,
        "scores": {model: scales.scores[one] for model, one in own.items()},
        "averages": {model: averages[one] for model, one in own.items()},
    }


def _average_interval(
    scales: ZScores,
    scores: Mapping[str, float],
    draws: Mapping[str, torch.Tensor],
    counts: Mapping[str, int],
) -> list[float] | None:
    """Of a model's mean z-score over images, on the scales as they are; figures without a scale stay at 0."""
    if not scores:
        return None
    total = torch.zeros(len(next(iter(draws.values()))), dtype=torch.float64)
    for figure in scores:
        if counts[figure] > 1 and scales.deviations[figure] > 0:
            total += (draws[figure] - scales.means[figure]) / scales.deviations[figure]
    return percentile_interval(total / len(scores))


def _notes(table: Table, pool: Sequence[ComparedModel]) -> Iterator[str]:
    """What is to be said of the questions; with the models' names where it is not the same of all."""
    labels = [contender.entry.label for contender in pool]
    gaps = False
    for name, models in table.items():
        of: dict[str, dict[str, None]] = {}
        for model, one in models.items():
            for run in one.runs:
                for note in notes_of(name, run.facts):
                    of.setdefault(note, {})[model] = None
        for note, said in of.items():
            yield note if len(said) == len(models) else f"{', '.join(said)}: {note}"
        if lacking := [label for label in labels if label not in models]:
            gaps = True
            yield f"{name}: not answered by {', '.join(lacking)}"
    for contender in pool:
        for name in dict.fromkeys(name for run in contender.runs for name in run):
            if not all(name in run for run in contender.runs):
                yield f"{name}: not all training seeds of {contender.entry.label} answered it, so none counts"
    if gaps:
        yield "a model's mean z-score is over the figures that it has"
