"""The recall table of a probing run, for the terminal."""

from __future__ import annotations

from rich.table import Table

from localign.report.tables.measures import (
    NOT_CONVERGED,
    NOT_CONVERGED_NOTE,
    change,
    comparisons,
    estimate,
    percent_cell,
    unconverged,
)
from localign.report.tables.rows import measured
from localign.results import ProbeResults, all_converged

_CONVERGED = {True: "\nconverged: yes", False: "\nconverged: no", None: ""}


def recall_table(results: ProbeResults) -> Table:
    """Macro recall of every backbone, head and task with its interval, whether the head has converged, and the
    difference to the reference backbone.

    Args:
        results: The content of ``results.json``.
    """
    references = {pair.after: pair.before for pair in comparisons(results)}
    seeds = max(len(outcomes) for outcomes in results["probe"].values())
    caption = (
        f"in brackets 95 % intervals over images; {results['protocol']} protocol; "
        f"{seeds} seed{'s' if seeds > 1 else ''}"
    )
    if references and unconverged(results):
        caption += f". {NOT_CONVERGED_NOTE}"
    table = Table(title="Macro recall, %", caption=caption)
    columns = ("backbone", "head", "task", "recall", *(["difference"] if references else []))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 3 else "right", no_wrap=i > 0)
    for name, outcomes in results["probe"].items():
        for key in measured({name: outcomes}):
            recall = percent_cell(estimate(outcomes, key), missing="undefined")
            recall += _CONVERGED[all_converged(outcomes, key.head, key.task)]
            row = [name, key.head, key.task, recall]
            if name in references:
                difference = percent_cell(change(results, references[name], name, key), missing="undefined")
                row.append(difference.replace(f" {NOT_CONVERGED}", f"\n{NOT_CONVERGED}"))
            table.add_row(*row)
        table.add_section()
    return table
