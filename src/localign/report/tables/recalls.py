"""The recall table of a probing run, for the terminal."""

from __future__ import annotations

from rich.table import Table

from localign.report.tables.measures import change, comparisons, estimate, percent_cell
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
            row = [name, key.head, key.task, percent_cell(estimate(outcomes, key), missing="undefined")]
            if name in references:
                row.append(percent_cell(change(results, references[name], name, key), missing="undefined"))
            table.add_row(*row)
        table.add_section()
    return table
