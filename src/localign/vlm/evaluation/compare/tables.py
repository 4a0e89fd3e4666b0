"""A comparison as a table on the screen, as Markdown, CSV and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from localign.files import replace_text
from localign.report.figures.drawing import to_csv
from localign.vlm.evaluation.compare.comparison import ComparedValue, Comparison
from localign.vlm.evaluation.printing import format_interval, format_value

_COLUMNS = (
    *("benchmark", "scoring", "questions", "figure", "model", "seeds", "value", "low", "high"),
    *("low_over_seeds", "high_over_seeds", "against", "difference", "difference_low", "difference_high"),
    *("difference_low_over_seeds", "difference_high_over_seeds", "z", "first_better", "second_better"),
    "mcnemar_p",
)

_TEXT_COLUMNS = 3
"""Left columns of a table that hold text; the others hold numbers."""


def write_comparison(folder: Path, comparison: Comparison) -> list[Path]:
    """Write ``comparison.json``, ``comparison.csv`` (one line per metric and model) and ``comparison.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "comparison.json": json.dumps(comparison, indent=1, ensure_ascii=False) + "\n",
        "comparison.csv": to_csv(_COLUMNS, list(_csv_rows(comparison))),
        "comparison.md": _markdown(comparison),
    }
    for name, content in contents.items():
        replace_text(folder / name, content)
    return [folder / name for name in contents]


def baselines(comparison: Comparison) -> dict[str, str]:
    """By model, the first model of its panel; without the first models themselves."""
    return {model: panel["models"][0] for panel in comparison["panels"] for model in panel["models"][1:]}


def _csv_rows(comparison: Comparison) -> Iterator[tuple[Any, ...]]:
    scores, baseline = comparison["z_scores"]["scores"], baselines(comparison)
    for name, part in comparison["benchmarks"].items():
        for model, outcome in part["outcomes"].items():
            test = part["mcnemar"].get(model)
            for metric, found in outcome["figures"].items():
                difference = part["differences"].get(model, {}).get(metric)
                yield (
                    *(name, outcome["scoring"], outcome["questions"], metric, model),
                    len(found["seeds"]) or None,
                    *_numbers(found),
                    None if difference is None else baseline.get(model),
                    *_numbers(difference),
                    scores[model].get(f"{name}: {metric}"),
                    *((None, None, None) if test is None else test.values()),
                )


def _numbers(found: ComparedValue | None) -> tuple[float | None, ...]:
    """The value, both ends of its interval over images, and both ends of its interval over seeds."""
    if found is None:
        return (None,) * 5
    return (found["value"], *_ends(found["interval"]), *_ends(found["interval_over_seeds"]))


def _ends(interval: list[float] | None) -> tuple[float | None, float | None]:
    return (None, None) if interval is None else (interval[0], interval[1])


def _has_several_seeds(comparison: Comparison) -> bool:
    return any(
        len(found["seeds"]) > 1
        for part in comparison["benchmarks"].values()
        for outcome in part["outcomes"].values()
        for found in outcome["figures"].values()
    )


def _grid(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the headline metrics, one row per metric and model."""
    has_seeds, has_differences = _has_several_seeds(comparison), bool(baselines(comparison))
    intervals = ["95 % over images", *(["95 % over seeds"] if has_seeds else [])]
    difference_columns = ["difference", *intervals, "McNemar's p"] if has_differences else []
    header = ["benchmark", "figure", "model", "value", *intervals, *difference_columns]
    models = [model for panel in comparison["panels"] for model in panel["models"]]
    rows = []
    for name, part in comparison["benchmarks"].items():
        headline = next(iter(part["outcomes"].values()))["headline"]
        for number, metric in enumerate(headline):
            for model in models:
                outcome = part["outcomes"].get(model)
                difference = part["differences"].get(model, {}).get(metric)
                test = part["mcnemar"].get(model) if number == 0 else None
                cells = _cells(outcome["figures"][metric] if outcome else None, has_seeds)
                if has_differences:
                    cells += _cells(difference, has_seeds, "+")
                    cells.append("–" if test is None else f"{test['p_value']:.2g}")
                rows.append([name, metric.removeprefix("accuracy__"), model, *cells])
    return header, rows


def _cells(found: ComparedValue | None, has_seeds: bool, sign: str = "") -> list[str]:
    """A value, its interval over images, and its interval over seeds if any model has several seeds."""
    if found is None:
        return ["–"] * (3 if has_seeds else 2)
    over_seeds = [format_interval(found["interval_over_seeds"], sign)] if has_seeds else []
    return [format_value(found["value"], sign), format_interval(found["interval"], sign), *over_seeds]


def comparison_table(comparison: Comparison) -> Table:
    """The headline metrics as a table for the screen."""
    header, rows = _grid(comparison)
    table = Table(title="comparison", caption=_caption(comparison))
    for number, column in enumerate(header):
        table.add_column(column, justify="left" if number < _TEXT_COLUMNS else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _markdown(comparison: Comparison) -> str:
    header, rows = _grid(comparison)
    table = _markdown_table(header, rows, _TEXT_COLUMNS)
    averages = [
        [model, format_value(found["value"], "+", 2), format_interval(found["interval"], "+", 2)]
        for model, found in comparison["z_scores"]["averages"].items()
    ]
    scales = _markdown_table(["model", "mean z-score in this pool", "95 % over images"], averages, 1)
    parts = [table, _caption(comparison), scales]
    if notes := [f"- {note}" for note in comparison["notes"]]:
        parts.append("\n".join(notes))
    return "\n\n".join(parts) + "\n"


def _markdown_table(header: list[str], rows: list[list[str]], text_columns: int) -> str:
    lines = [header, ["---"] * text_columns + ["---:"] * (len(header) - text_columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _caption(comparison: Comparison) -> str:
    first_models = list(dict.fromkeys(baselines(comparison).values()))
    text = "Percent. Intervals over images cover how the same trained models would do on other images."
    if _has_several_seeds(comparison):
        text += (
            " Intervals over seeds cover how other training runs would do on the same images (Student's t; differences "
            "are paired by the order of the seeds if both models have equally many, otherwise Welch's t). Neither "
            "covers the other source of chance."
        )
    if first_models:
        first = first_models[0] if len(first_models) == 1 else "the first model of a panel"
        text += (
            f" Differences are to {first}, in points, paired over images. McNemar's test treats all questions of a "
            "benchmark as independent."
        )
    return text
