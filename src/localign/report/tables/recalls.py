"""The recall table of a probing, for the terminal."""

from __future__ import annotations

from rich.table import Table

from localign.report.tables.measures import Change, Estimate, change, comparisons, estimate
from localign.report.tables.rows import measured
from localign.results import ProbeResults


def recall_table(results: ProbeResults) -> Table:
    """Macro recall of every backbone, head and task with its interval, and the difference to the reference backbone.

    Args:
        results: The content of ``results.json``.
    """
    references = {pair.after: pair.before for pair in comparisons(results)}
    seeds = max(len(outcomes) for outcomes in results["probe"].values())
    table = Table(
        title="Macro recall, %",
        caption=f"in brackets 95 % intervals over images; {results['protocol']} protocol; "
        f"{seeds} seed{'s' if seeds > 1 else ''}",
    )
    for i, column in enumerate(
        ("backbone", "head", "task", "recall", *(["difference"] if references else []))
    ):
        table.add_column(column, justify="left" if i < 3 else "right", no_wrap=i > 0)
    for name, outcomes in results["probe"].items():
        for key in measured({name: outcomes}):
            row = [name, key.head, key.task, _percent(estimate(outcomes, key))]
            if name in references:
                row.append(_percent(change(results, references[name], name, key), "+"))
            table.add_row(*row)
        table.add_section()
    return table


def _percent(recall: Estimate | Change | None, sign: str = "") -> str:
    if recall is None:
        return "undefined"
    value = f"{100 * recall.value:{sign}.1f}"
    if recall.interval is None:
        return value
    low, high = recall.interval
    return f"{value} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"
