"""A comparison as text: for the screen, as Markdown, as CSV and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from localign.files import replace_text
from localign.report.figures.drawing import to_csv
from localign.vlm.evaluation.compare.comparison import Comparison
from localign.vlm.evaluation.results import format_interval, shown

_COLUMNS = (
    *("benchmark", "scoring", "questions", "figure", "model", "seeds", "value", "low", "high"),
    *("low_over_seeds", "high_over_seeds", "against", "difference", "difference_low", "difference_high"),
    *("difference_low_over_seeds", "difference_high_over_seeds", "z", "first_better", "second_better"),
    "mcnemar_p",
)

_WORDS = 3
"""Columns of a table that are words; the rest are numbers."""


def write_comparison(folder: Path, comparison: Comparison) -> list[Path]:
    """``comparison.json``, ``comparison.csv`` (a line for each figure and model) and ``comparison.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "comparison.json": json.dumps(comparison, indent=1, ensure_ascii=False) + "\n",
        "comparison.csv": to_csv(_COLUMNS, list(_lines(comparison))),
        "comparison.md": _markdown(comparison),
    }
    for name, content in contents.items():
        replace_text(folder / name, content)
    return [folder / name for name in contents]


def baselines(comparison: Comparison) -> dict[str, str]:
    """What every model but the first of a panel is compared with."""
    return {model: panel["models"][0] for panel in comparison["panels"] for model in panel["models"][1:]}


def _lines(comparison: Comparison) -> Iterator[tuple[Any, ...]]:
    scores, against = comparison["z_scores"]["scores"], baselines(comparison)
    for name, part in comparison["benchmarks"].items():
        for model, outcome in part["outcomes"].items():
            test = part["mcnemar"].get(model, {})
            for figure, found in outcome["figures"].items():
                difference = part["differences"].get(model, {}).get(figure, {})
                yield (
                    *(name, outcome["scoring"], outcome["questions"], figure, model),
                    *(len(found["seeds"]) or None, found["value"]),
                    *_ends(found["interval"]),
                    *_ends(found["interval_over_seeds"]),
                    against.get(model) if difference else None,
                    difference.get("value"),
                    *_ends(difference.get("interval")),
                    *_ends(difference.get("interval_over_seeds")),
                    scores[model].get(f"{name}: {figure}"),
                    *(test.get(field) for field in ("first_better", "second_better", "p_value")),
                )


def _ends(interval: list[float] | None) -> tuple[float | None, float | None]:
    return (None, None) if interval is None else (interval[0], interval[1])


def _several_seeds(comparison: Comparison) -> bool:
    return any(
        len(found["seeds"]) > 1
        for part in comparison["benchmarks"].values()
        for outcome in part["outcomes"].values()
        for found in outcome["figures"].values()
    )


def _grid(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the headline figures, a row for each figure and model."""
    seeds, several = _several_seeds(comparison), bool(baselines(comparison))
    intervals = ["95 % over images", *(["95 % over seeds"] if seeds else [])]
    compared = ["difference", *intervals, "McNemar's p"] if several else []
    header = ["benchmark", "figure", "model", "value", *intervals, *compared]
    models = [model for panel in comparison["panels"] for model in panel["models"]]
    rows = []
    for name, part in comparison["benchmarks"].items():
        headline = next(iter(part["outcomes"].values()))["headline"]
        for number, figure in enumerate(headline):
            for model in models:
                outcome = part["outcomes"].get(model)
                difference = part["differences"].get(model, {}).get(figure)
                test = part["mcnemar"].get(model) if number == 0 else None
                cells = _cells(outcome["figures"][figure] if outcome else None, seeds)
                if several:
                    cells += _cells(difference, seeds, "+")
                    cells.append("–" if test is None else f"{test['p_value']:.2g}")
                rows.append([name, figure.removeprefix("accuracy__"), model, *cells])
    return header, rows


def _cells(found: Mapping[str, Any] | None, seeds: bool, sign: str = "") -> list[str]:
    """A value, its interval over images, and that over seeds where some model has several."""
    found = found or {"value": None, "interval": None, "interval_over_seeds": None}
    over_seeds = [format_interval(found["interval_over_seeds"], sign)] if seeds else []
    return [shown(found["value"], sign), format_interval(found["interval"], sign), *over_seeds]


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
    table = _markdown_table(header, rows, _WORDS)
    averages = [
        [model, _two_decimals(found["value"]), " to ".join(map(_two_decimals, found["interval"] or [None]))]
        for model, found in comparison["z_scores"]["averages"].items()
    ]
    scales = _markdown_table(["model", "mean z-score in this pool", "95 % over images"], averages, 1)
    parts = [table, _caption(comparison), scales]
    if notes := [f"- {note}" for note in comparison["notes"]]:
        parts.append("\n".join(notes))
    return "\n\n".join(parts) + "\n"


def _markdown_table(header: list[str], rows: list[list[str]], words: int) -> str:
    lines = [header, ["---"] * words + ["---:"] * (len(header) - words), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _two_decimals(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


def _caption(comparison: Comparison) -> str:
    against = list(dict.fromkeys(baselines(comparison).values()))
    said = "Percent. Intervals over images: what other images would give to the same trained models."
    if _several_seeds(comparison):
        said += (
            " Over seeds: what other trainings would give on the same images (Student's t; of differences paired by "
            "the seeds' order where both models have as many, else Welch's). Neither holds the other's chance."
        )
    if against:
        whom = against[0] if len(against) == 1 else "the first model of a panel"
        said += (
            f" Differences from {whom} in points, paired over images. McNemar's test takes all questions of a "
            "benchmark as independent."
        )
    return said
