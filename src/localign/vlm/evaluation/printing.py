"""The results of an evaluation on the screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from localign.text.printing import console, printable
from localign.vlm.evaluation.results import BenchmarkOutcome, notes_of


def results_table(outcomes: Mapping[str, BenchmarkOutcome]) -> Table:
    """The headline metrics of each benchmark."""
    table = Table(title="benchmarks", caption="percent, with 95 % intervals over images")
    for column in ("benchmark", "figure", "value", "interval", "questions", "invalid", "scoring"):
        is_text = column in ("benchmark", "figure", "scoring")
        table.add_column(column, justify="left" if is_text else "right", overflow="fold")
    for benchmark_name, outcome in outcomes.items():
        facts = (f"{outcome['questions']:,}", f"{outcome['invalid']:,}", outcome["scoring"])
        for number, name in enumerate(outcome["headline"]):
            metric = outcome["figures"][name]
            table.add_row(
                benchmark_name if number == 0 else "",
                name.removeprefix("accuracy__"),
                format_value(metric["value"]),
                format_interval(metric["interval"]),
                *(facts if number == 0 else ("", "", "")),
            )
    return table


WIDTH = 150
"""Columns in a file or pipe, wide enough for tables without folded cells."""


def print_results(outcomes: Mapping[str, BenchmarkOutcome]) -> None:
    """Print the table of headline metrics, the editions of the questions, and the notes that belong beside them."""
    console(WIDTH).print(results_table(outcomes))
    for name, outcome in outcomes.items():
        if "edition" in outcome:
            print(f"edition    {name}: {outcome['edition']}")
        for note in notes_of(name, outcome):
            print(f"note       {printable(note)}")


def format_value(value: float | None, sign: str = "", decimals: int = 1) -> str:
    """A number as text; a dash for None.

    Args:
        value: The number.
        sign: "+" to show the sign of positive numbers too.
        decimals: Number of decimals.
    """
    return "–" if value is None else f"{value:{sign}.{decimals}f}"


def format_interval(interval: Sequence[float] | None, sign: str = "", decimals: int = 1) -> str:
    """Both ends of an interval, see :func:`format_value`; a dash for None."""
    if interval is None:
        return "–"
    return " to ".join(format_value(end, sign, decimals) for end in interval)
