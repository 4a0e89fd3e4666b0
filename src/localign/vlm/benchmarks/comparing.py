"""Several models on the same questions: differences with their intervals, tests, and common scales."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from localign.errors import UserError
from localign.files import replace_text
from localign.vlm.benchmarks.intervals import mcnemar, paired_differences, z_scores
from localign.vlm.benchmarks.results import Judged, notes_of, outcome_of, shown, shown_interval

Pool = Mapping[str, Mapping[str, Judged]]
"""Scored benchmarks by model and name; the first model is what the others are compared with."""

Comparison = dict[str, Any]
"""JSON-able; what :func:`compare` gives."""

_COLUMNS = (
    *("benchmark", "scoring", "questions", "figure", "model", "value", "low", "high", "difference"),
    *("difference_low", "difference_high", "z", "first_better", "second_better", "mcnemar_p"),
)

_WORDS = 3
"""Columns of a table that are words; the rest are numbers."""


def compare(pool: Pool) -> Comparison:
    """Compare all models with the first, on the benchmarks that all of them answered.

    Returns:
        ``first``: the model that the others are compared with. ``benchmarks``: for each the models' outcomes, and for
        each model but the first ``differences`` by figure and ``mcnemar``. ``z_scores`` of the headline figures
        within this pool. ``notes``.

    Raises:
        UserError: No benchmark was answered by all, or questions of one are different ones.
    """
    first, *others = pool
    common = [name for name in pool[first] if all(name in judged for judged in pool.values())]
    if not common:
        raise UserError("there is no benchmark that all of the models answered")
    everything = dict.fromkeys(name for judged in pool.values() for name in judged)
    notes = [
        f"{name} is left out: not all of the models answered it" for name in everything if name not in common
    ]
    benchmarks = {}
    for name in common:
        parts = {model: judged[name] for model, judged in pool.items()}
        notes += _notes(name, parts)
        benchmarks[name] = _compared(first, others, parts)
    return {
        "first": first,
        "benchmarks": benchmarks,
        "z_scores": _scales(benchmarks, list(pool)),
        "notes": notes,
    }


def _notes(name: str, parts: Mapping[str, Judged]) -> list[str]:
    """What is to be said of the questions; with the models' names where it is not the same of all."""
    of: dict[str, list[str]] = {}
    for model, part in parts.items():
        for note in notes_of(name, {"notes": part.notes, "limit": part.limit}):
            of.setdefault(note, []).append(model)
    return [
        note if len(models) == len(parts) else f"{', '.join(models)}: {note}" for note, models in of.items()
    ]


def _compared(first: str, others: list[str], parts: Mapping[str, Judged]) -> dict[str, Any]:
    base = parts[first]
    differences, tests = {}, {}
    for model in others:
        records = base.records, parts[model].records
        found = paired_differences(base.benchmark, *records)
        differences[model] = {figure: difference._asdict() for figure, difference in found.items()}
        tests[model] = mcnemar(*records)._asdict()
    return {
        "outcomes": {model: outcome_of(part) for model, part in parts.items()},
        "differences": differences,
        "mcnemar": tests,
    }


def _scales(benchmarks: Mapping[str, Any], models: list[str]) -> dict[str, Any]:
    """Means, deviations and scores are the pool's own: with other models they are others."""
    figures: dict[str, dict[str, float | None]] = {model: {} for model in models}
    for name, part in benchmarks.items():
        for model, outcome in part["outcomes"].items():
            for figure in outcome["headline"]:
                figures[model][f"{name}: {figure}"] = outcome["figures"][figure]["value"]
    scales = z_scores(figures)
    return {
        "means": scales.means,
        "deviations": scales.deviations,
        "scores": scales.scores,
        "averages": scales.averages,
    }


def write_comparison(folder: Path, comparison: Comparison) -> list[Path]:
    """``comparison.json``, ``comparison.csv`` (a line for each figure and model) and ``comparison.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows(_lines(comparison))
    contents = {
        "comparison.json": json.dumps(comparison, indent=1, ensure_ascii=False) + "\n",
        "comparison.csv": stream.getvalue(),
        "comparison.md": _markdown(comparison),
    }
    for name, content in contents.items():
        replace_text(folder / name, content)
    return [folder / name for name in contents]


def _lines(comparison: Comparison) -> Iterator[tuple[Any, ...]]:
    scores = comparison["z_scores"]["scores"]
    for name, part in comparison["benchmarks"].items():
        for model, outcome in part["outcomes"].items():
            test = part["mcnemar"].get(model, {})
            for figure, found in outcome["figures"].items():
                difference = part["differences"].get(model, {}).get(figure, {})
                yield (
                    *(name, outcome["scoring"], outcome["questions"], figure, model, found["value"]),
                    *(found["interval"] or (None, None)),
                    difference.get("value"),
                    *(difference.get("interval") or (None, None)),
                    scores[model].get(f"{name}: {figure}"),
                    *(test.get(field) for field in ("first_better", "second_better", "p_value")),
                )


def _grid(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the headline figures, a row for each figure and model."""
    header = [
        "benchmark",
        "figure",
        "model",
        "value",
        "95 % interval",
        "difference",
        "95 % interval",
        "McNemar's p",
    ]
    rows = []
    for name, part in comparison["benchmarks"].items():
        for number, figure in enumerate(part["outcomes"][comparison["first"]]["headline"]):
            for model, outcome in part["outcomes"].items():
                found = outcome["figures"][figure]
                difference = part["differences"].get(model, {}).get(figure, {"value": None, "interval": None})
                test = part["mcnemar"].get(model) if number == 0 else None
                rows.append(
                    [
                        name,
                        figure.removeprefix("accuracy__"),
                        model,
                        shown(found["value"]),
                        shown_interval(found["interval"]),
                        shown(difference["value"], "+"),
                        shown_interval(difference["interval"], "+"),
                        "–" if test is None else f"{test['p_value']:.2g}",
                    ]
                )
    return header, rows


def comparison_table(comparison: Comparison) -> Table:
    """The headline figures, for the screen."""
    header, rows = _grid(comparison)
    table = Table(title="comparison", caption=_caption(comparison))
    for number, column in enumerate(header):
        table.add_column(column, justify="left" if number < _WORDS else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _markdown(comparison: Comparison) -> str:
    header, rows = _grid(comparison)
    lines = [header, [*["---"] * _WORDS, *["---:"] * (len(header) - _WORDS)], *rows]
    table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    notes = [f"- {note}" for note in comparison["notes"]]
    averages = [
        f"| {model} | {'–' if average is None else f'{average:+.2f}'} |"
        for model, average in comparison["z_scores"]["averages"].items()
    ]
    scales = ["| model | mean z-score in this pool |", "| --- | ---: |", *averages]
    parts = [table, [_caption(comparison)], scales, *([notes] if notes else [])]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _caption(comparison: Comparison) -> str:
    return (
        f"Percent; differences from {comparison['first']} in points, paired over images. McNemar's test takes all "
        "questions of a benchmark as independent."
    )
