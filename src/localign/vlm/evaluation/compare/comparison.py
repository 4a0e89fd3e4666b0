"""Several models on the same questions: differences with their intervals, tests, and common scales.

There are two kinds of intervals. Intervals *over images* cover how the same models would do on other images; they
come from the paired bootstrap, and with several training seeds they are for the mean over seeds. Intervals *over
seeds* cover how other runs of the same training would do on the same images; they come from Student's t. Neither
covers the other source of chance.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from torch import Tensor

from localign.errors import UserError
from localign.statistics.bootstrap import percentile_interval
from localign.statistics.mcnemar import check_same_questions, mcnemar
from localign.statistics.paired import difference_interval_over_seeds, interval_over_seeds
from localign.statistics.resampling import paired_differences
from localign.statistics.z_scores import average_replicates, model_counts, z_scores
from localign.vlm.evaluation.compare.panels import ComparedModel
from localign.vlm.evaluation.compare.summary import ModelSummary, RunSummary, summarise_seeds
from localign.vlm.evaluation.results import MetricValue, OutcomeFacts, notes_of


class PanelFacts(TypedDict):
    """Models that are compared with the first of them, by label."""

    figure: str
    panel: str
    models: list[str]


class ComparedValue(MetricValue):
    """A metric or a difference, in percent or points; also over training seeds."""

    interval_over_seeds: list[float] | None
    """``[low, high]``, 95 %; None for a single seed."""


class SeedValue(ComparedValue):
    """A metric of one model."""

    seeds: list[float]
    """By seed; empty if some seed does not define the metric."""


class ComparedOutcome(OutcomeFacts):
    """One model on one benchmark."""

    figures: dict[str, SeedValue]


class McNemarFacts(TypedDict):
    """McNemar's test between a panel's first model and another one."""

    first_better: int
    second_better: int
    p_value: float


class BenchmarkComparison(TypedDict):
    """All models on one benchmark."""

    outcomes: dict[str, ComparedOutcome]
    """By model."""
    differences: dict[str, dict[str, ComparedValue]]
    """By model and metric: the model minus the first model of its panel."""
    mcnemar: dict[str, McNemarFacts]
    """By model."""


class PoolScales(TypedDict):
    """The headline metrics as z-scores within the pool of models. A metric's name is "BENCHMARK: METRIC"."""

    means: dict[str, float]
    deviations: dict[str, float]
    models: dict[str, int]
    """By metric, the number of models that have it."""
    scores: dict[str, dict[str, float]]
    """By model and metric."""
    averages: dict[str, MetricValue]
    """By model: the mean z-score."""


class _Comparison(TypedDict):
    panels: list[PanelFacts]
    benchmarks: dict[str, BenchmarkComparison]
    z_scores: PoolScales
    notes: list[str]


class Comparison(_Comparison, total=False):
    """A comparison of models, as in ``comparison.json``."""

    models: dict[str, list[dict[str, str | None]]]
    """By label, the description of the evaluated model for each training seed."""


Summaries = Mapping[str, Mapping[str, ModelSummary]]
"""By benchmark and model."""


def compare(pool: Sequence[ComparedModel], others: Sequence[ComparedModel] = ()) -> Comparison:
    """Compare every model with the first model of its panel, and put all models on common scales.

    Args:
        pool: The models that are compared.
        others: Further models that count in the common scales only, under labels of their own.

    Raises:
        UserError: No benchmark was answered by two models, or models answered different questions of a benchmark.
    """
    panels = _panels(pool)
    every = [*pool, *others]
    names = dict.fromkeys(name for model in pool for run in model.runs for name in run)
    summaries_of_all = {name: models for name in names if (models := _summaries(name, every))}
    summaries = _of_models(summaries_of_all, [model.entry.label for model in pool])
    has_several = len({model.entry.folders for model in pool}) > 1
    if has_several and not any(_distinct(models) > 1 for models in summaries.values()):
        raise UserError("no benchmark was answered by two of the models")
    return {
        "panels": panels,
        "benchmarks": {name: _compare_benchmark(panels, models) for name, models in summaries.items()},
        "z_scores": _scales(summaries_of_all, every, [model.entry.label for model in pool]),
        "notes": list(_notes(summaries, pool)),
    }


def _panels(pool: Sequence[ComparedModel]) -> list[PanelFacts]:
    panels: dict[tuple[str, str], list[str]] = {}
    for model in pool:
        panels.setdefault((model.entry.figure, model.entry.panel), []).append(model.entry.label)
    return [{"figure": f, "panel": p, "models": models} for (f, p), models in panels.items()]


def _distinct(models: Mapping[str, ModelSummary]) -> int:
    """The number of models; a model in several panels counts once."""
    return len({id(summary) for summary in models.values()})


# -- summaries -----------------------------------------------------------------------------------------------


def _of_models(summaries: Summaries, labels: Collection[str]) -> Summaries:
    """The summaries of some models, without benchmarks that none of them answered."""
    some = {
        name: {label: found for label, found in models.items() if label in labels}
        for name, models in summaries.items()
    }
    return {name: models for name, models in some.items() if models}


def _summaries(name: str, pool: Sequence[ComparedModel]) -> dict[str, ModelSummary]:
    """By label, the models that answered a benchmark with all of their seeds."""
    found: dict[str, ModelSummary] = {}
    by_folders: dict[tuple[Path, ...], ModelSummary] = {}
    for model in pool:
        label, folders = model.entry.label, model.entry.folders
        if not all(name in run for run in model.runs):
            continue
        if folders not in by_folders:
            runs = [run[name] for run in model.runs]
            first, reference = next(((m, s.runs[0]) for m, s in found.items()), (label, runs[0]))
            for run in runs:
                _check_same_questions(f"{name} of {first} and {label}", reference, run)
            by_folders[folders] = summarise_seeds(runs)
        found[label] = by_folders[folders]
    return found


def _check_same_questions(where: str, first: RunSummary, second: RunSummary) -> None:
    try:
        check_same_questions(first.scores, second.scores)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if first.asked != second.asked:
        raise UserError(
            f"{where}: the models answered different questions under the same ids; the question files are of the "
            f"editions {first.facts.get('edition', 'unknown')} and {second.facts.get('edition', 'unknown')}"
        )


# -- one benchmark -------------------------------------------------------------------------------------------


def _compare_benchmark(
    panels: Sequence[PanelFacts], models: Mapping[str, ModelSummary]
) -> BenchmarkComparison:
    differences: dict[str, dict[str, ComparedValue]] = {}
    tests: dict[str, McNemarFacts] = {}
    for first, model in _pairs(panels):
        if first in models and model in models:
            differences[model] = _differences(models[first], models[model])
            test = mcnemar(models[first].mean_scores(), models[model].mean_scores())
            tests[model] = {
                "first_better": test.first_better,
                "second_better": test.second_better,
                "p_value": test.p_value,
            }
    return {
        "outcomes": {model: _outcome(summary) for model, summary in models.items()},
        "differences": differences,
        "mcnemar": tests,
    }


def _pairs(panels: Sequence[PanelFacts]) -> Iterator[tuple[str, str]]:
    """The first model of every panel with each other model of the panel."""
    for panel in panels:
        first, *others = panel["models"]
        yield from ((first, model) for model in others)


def _outcome(model: ModelSummary) -> ComparedOutcome:
    """As in ``results.json``, also over seeds; ``invalid`` is the sum over seeds."""
    figures: dict[str, SeedValue] = {}
    for metric, value in model.metrics.values.items():
        seeds = model.seed_values(metric)
        figures[metric] = {
            "value": value,
            "interval": percentile_interval(model.metrics.replicates[metric]),
            "seeds": seeds,
            "interval_over_seeds": interval_over_seeds(seeds),
        }
    invalid = sum(run.facts["invalid"] for run in model.runs)
    return {**model.runs[0].facts, "invalid": invalid, "figures": figures}


def _differences(first: ModelSummary, second: ModelSummary) -> dict[str, ComparedValue]:
    return {
        metric: {
            "value": difference.value,
            "interval": difference.interval,
            "interval_over_seeds": difference_interval_over_seeds(
                first.seed_values(metric), second.seed_values(metric)
            ),
        }
        for metric, difference in paired_differences(first.metrics, second.metrics).items()
    }


# -- all benchmarks ------------------------------------------------------------------------------------------


def _scales(summaries: Summaries, pool: Sequence[ComparedModel], shown: Collection[str]) -> PoolScales:
    """The headline metrics as z-scores. A model in several panels counts once, with the same scores in all.

    Args:
        summaries: Those of the pool.
        pool: The models that set the scales.
        shown: Labels of the models whose scores are returned.
    """
    first_label: dict[tuple[Path, ...], str] = {}
    for model in pool:
        first_label.setdefault(model.entry.folders, model.entry.label)
    values: dict[str, dict[str, float | None]] = {label: {} for label in first_label.values()}
    replicates: dict[str, dict[str, Tensor]] = {label: {} for label in first_label.values()}
    for name, models in summaries.items():
        for label in values:
            if label in models:
                summary = models[label]
                for metric in summary.runs[0].facts["headline"]:
                    values[label][f"{name}: {metric}"] = summary.metrics.values[metric]
                    replicates[label][f"{name}: {metric}"] = summary.metrics.replicates[metric]
    scales = z_scores(values)
    averages: dict[str, MetricValue] = {}
    for label in values:
        resampled = average_replicates(scales, label, replicates[label])
        averages[label] = {
            "value": scales.averages[label],
            "interval": None if resampled is None else percentile_interval(resampled),
        }
    labels = {m.entry.label: first_label[m.entry.folders] for m in pool if m.entry.label in shown}
    return {
        "means": scales.means,
        "deviations": scales.deviations,
        "models": model_counts(scales),
        "scores": {label: scales.scores[first] for label, first in labels.items()},
        "averages": {label: averages[first] for label, first in labels.items()},
    }


def _notes(summaries: Summaries, pool: Sequence[ComparedModel]) -> Iterator[str]:
    """Notes on the questions; a note that does not hold for all models starts with their labels."""
    has_gaps = False
    for name, models in summaries.items():
        models_by_note: dict[str, dict[str, None]] = {}
        for label, summary in models.items():
            for run in summary.runs:
                for note in notes_of(name, run.facts):
                    models_by_note.setdefault(note, {})[label] = None
        for note, labels in models_by_note.items():
            yield note if len(labels) == len(models) else f"{', '.join(labels)}: {note}"
        if missing := [model.entry.label for model in pool if model.entry.label not in models]:
            has_gaps = True
            yield f"{name}: not answered by {', '.join(missing)}"
    for model in pool:
        for name in dict.fromkeys(name for run in model.runs for name in run):
            if not all(name in run for run in model.runs):
                yield f"{name}: not answered by all training seeds of {model.entry.label}, so it is left out there"
    if has_gaps:
        yield "a model's mean z-score is over the metrics that it has"
