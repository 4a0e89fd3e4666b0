"""From results to rows, and from rows to Markdown, HTML and the terminal."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from localign.statistics.paired import PairedDifference, paired_difference

TASK_NAMES = {
    "local": "local (per patch)",
    "global": "global (per image)",
    "majority": "majority label of a patch",
}
HEAD_NAMES = {
    "transformer": "transformer head",
    "mlp": "MLP head",
    "linear": "linear head",
    "transformer-anonymous": "transformer head, anonymous tokens",
    "transformer-cls-only": "transformer head, class token only",
}
_TASK_ORDER = ("local", "global", "majority")
_HEAD_ORDER = ("transformer", "mlp", "linear", "transformer-anonymous", "transformer-cls-only")


@dataclass(frozen=True)
class RecallRow:
    """Macro recall of one head on one task."""

    source: str
    task: str
    head: str
    recall: PairedDifference


@dataclass(frozen=True)
class ClassRow:
    """Recall of one class."""

    name: str
    positives: int
    """Patches (local) or images (global) with the class."""
    recall: PairedDifference


@dataclass(frozen=True)
class Grid:
    """A table of text."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: int = 1
    """How many columns are words, left-aligned; the rest are numbers."""
    groups: tuple[int, ...] = ()
    """Rows that begin a group of rows; LaTeX draws a rule before them."""


# -- rows ------------------------------------------------------------------------------------------------


def probe_runs(results: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The probing results of each backbone, one per seed; of a demo, ``baseline`` and ``aligned``."""
    runs = results.get("probe")
    if not isinstance(runs, Mapping):
        return {}
    return {name: [r for r in side if isinstance(r, dict)] for name, side in runs.items() if side}


def before_after(results: Mapping[str, Any]) -> list[RecallRow]:
    """Macro recall of every source, task and head, before and after alignment, paired over seeds.

    The interval is mean +- t * s / sqrt(n) with n - 1 degrees of freedom, s the standard deviation of the
    per-seed differences; t comes from :func:`~localign.statistics.student_t.t_quantile`.
    """
    runs = {name: side for name, side in probe_runs(results).items() if name in SIDES}
    rows = []
    for source, task, head in measured(runs):
        values = {
            name: [metric(r, source, head, task, "macro_recall") for r in runs.get(name, [])]
            for name in SIDES
        }
        rows.append(RecallRow(source, task, head, paired_difference(values["baseline"], values["aligned"])))
    return rows


SIDES = ("baseline", "aligned")


def measured(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[tuple[str, str, str]]:
    """(source, task, head) of everything measured: test, local and transformer first."""
    found: dict[tuple[str, str, str], None] = {}
    for side in runs.values():
        for run in side:
            for source, heads in run.get("results", {}).items():
                for head, tasks in heads.items():
                    found.update(dict.fromkeys((source, task, head) for task in tasks))
    # What is reported comes first; a validation set, with which settings may have been chosen, after it.
    sources = sorted(dict.fromkeys(s for s, _, _ in found), key=lambda s: s != "test")
    return sorted(
        found, key=lambda k: (sources.index(k[0]), _rank(k[1], _TASK_ORDER), _rank(k[2], _HEAD_ORDER))
    )


def _rank(name: str, order: Sequence[str]) -> tuple[int, str]:
    return (order.index(name) if name in order else len(order), name)


def metric(run: Mapping[str, Any], source: str, head: str, task: str, name: str) -> Any:
    """One figure of one outcome; None where it was not measured."""
    return run.get("results", {}).get(source, {}).get(head, {}).get(task, {}).get(name)


def class_names(results: Mapping[str, Any]) -> list[str]:
    """Names by class id."""
    runs = [r for side in probe_runs(results).values() for r in side]
    found: list[Any] = results.get("classes") or next((r["classes"] for r in runs if r.get("classes")), [])
    return [str(name) for name in found]


def per_class(results: Mapping[str, Any], row: RecallRow) -> list[ClassRow]:
    """Recall per class behind one row; classes without positives are left out."""
    runs = probe_runs(results)
    columns: dict[str, list[list[float | None]]] = {}
    positives: list[int] = []
    for name in SIDES:
        cells = [
            r.get("results", {}).get(row.source, {}).get(row.head, {}).get(row.task, {})
            for r in runs.get(name, [])
        ]
        columns[name] = [c.get("class_recall") or [] for c in cells]
        positives = positives or next((c["class_positives"] for c in cells if c.get("class_positives")), [])
    rows = []
    for i, name in enumerate(_padded(class_names(results), len(positives))):
        recall = paired_difference(*([v[i] if i < len(v) else None for v in columns[side]] for side in SIDES))
        if i < len(positives) and positives[i]:
            rows.append(ClassRow(name, int(positives[i]), recall))
    return rows


def _padded(names: list[str], count: int) -> list[str]:
    return names[:count] + [f"class {i}" for i in range(len(names), count)]


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


# -- text ------------------------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    """A share as percent with one decimal, or a dash."""
    return f"{100 * value:.1f}" if _known(value) and value is not None else "–"


def signed(difference: PairedDifference) -> str:
    """``+3.2 ± 1.1`` in points, without the interval where there is none."""
    if difference.difference is None or not math.isfinite(difference.difference):
        return "–"
    text = f"{100 * difference.difference:+.1f}".replace("-", "\u2212")
    return text if difference.half_width is None else f"{text} ± {100 * difference.half_width:.1f}"


def recall_grid(rows: Sequence[RecallRow]) -> Grid:
    """The before/after table; recall in percent, differences in points."""
    several = len({r.source for r in rows}) > 1
    both = any(r.recall.aligned is not None for r in rows)
    header = ["macro recall, %", "head", *(["baseline", "aligned", "difference"] if both else ["recall"])]
    body = []
    for row in rows:
        task = TASK_NAMES.get(row.task, row.task) + (f", {row.source}" if several else "")
        numbers = [percent(row.recall.baseline)]
        if both:
            numbers += [percent(row.recall.aligned), signed(row.recall)]
        body.append((task, row.head, *numbers))
    return Grid(tuple(header), tuple(body), texts=2)


def class_grid(rows: Sequence[ClassRow], unit: str) -> Grid:
    """The per-class table; ``unit`` is what positives count, "patches" or "images"."""
    both = any(r.recall.aligned is not None for r in rows)
    header = ("class", unit, *(("baseline", "aligned", "difference") if both else ("recall",)))
    body = []
    for row in rows:
        numbers = [percent(row.recall.baseline)]
        if both:
            numbers += [percent(row.recall.aligned), signed(row.recall)]
        body.append((row.name, f"{row.positives:,}", *numbers))
    return Grid(header, tuple(body))


def interval_sentence(rows: Sequence[RecallRow]) -> str:
    """What the numbers behind the plus-minus sign are."""
    counts = {r.recall.seeds for r in rows if r.recall.difference is not None}
    if not counts:
        return "One model only: there is nothing to compare."
    if max(counts) < 2:
        return "One seed: no interval can be given."
    low, high = min(counts), max(counts)
    seeds = f"{high}" if low == high else f"{low} to {high}"
    return f"± is half the 95 % t-interval of the difference, paired over {seeds} seeds."


def to_markdown(grid: Grid) -> str:
    """A Markdown table."""
    rule = ["---"] * grid.texts + ["---:"] * (len(grid.header) - grid.texts)
    lines = [grid.header, rule, *grid.rows]
    return (
        "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        + "\n"
    )


def to_html(grid: Grid) -> str:
    """An HTML table."""

    def line(cells: Sequence[str], tag: str) -> str:
        opening = f'{tag} scope="col"' if tag == "th" else tag
        parts = []
        for i, cell in enumerate(cells):
            mark = ' class="word"' if i < grid.texts else ""
            parts.append(f"<{opening}{mark}>{html.escape(cell)}</{tag}>")
        return f"<tr>{''.join(parts)}</tr>"

    head = line(grid.header, "th")
    body = "\n".join(line(row, "td") for row in grid.rows)
    return f'<div class="scroll"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody></table></div>'


def to_terminal(rows: Sequence[RecallRow], title: str = "Probing") -> Table:
    """The before/after table for `rich`."""
    grid = recall_grid(rows)
    table = Table(title=title, caption=interval_sentence(rows))
    for i, name in enumerate(grid.header):
        table.add_column(name, justify="left" if i < grid.texts else "right", no_wrap=i >= grid.texts)
    for row in grid.rows:
        table.add_row(*row)
    return table
