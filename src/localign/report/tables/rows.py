"""From results to rows, and from rows to Markdown, HTML and the terminal."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rich.table import Table

from localign.results import Metrics, ProbeOutcome, ProbeResults, all_converged
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
BEFORE_AFTER = ("baseline", "aligned")
"""Names of the two backbones of a demo."""
_TASK_ORDER = ("local", "global", "majority")
_HEAD_ORDER = ("transformer", "mlp", "linear", "transformer-anonymous", "transformer-cls-only")


@dataclass(frozen=True)
class MetricKey:
    """Selects the metrics of one head on one task of one source in a probing run."""

    source: str
    head: str
    task: str


@dataclass(frozen=True)
class RecallRow:
    """Macro recall of one head on one task, before and after alignment."""

    key: MetricKey
    recall: PairedDifference
    converged: bool | None = None
    """Whether the heads of both backbones had converged, for all seeds; None where that is not known."""


@dataclass(frozen=True)
class ClassRow:
    """Recall of one class, before and after alignment."""

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
    """Number of leading columns that hold words, left-aligned; the others hold numbers."""
    groups: tuple[int, ...] = ()
    """Indices of rows that begin a group; LaTeX draws a rule above them."""


# -- rows ------------------------------------------------------------------------------------------------


def probe_runs(results: ProbeResults) -> dict[str, list[ProbeOutcome]]:
    """Outcomes by backbone, one per seed; empty where nothing was probed."""
    runs = results.get("probe")
    if not isinstance(runs, Mapping):
        return {}
    return {name: [run for run in seeds if isinstance(run, dict)] for name, seeds in runs.items() if seeds}


def metrics_of(outcome: ProbeOutcome, key: MetricKey) -> Metrics:
    """The metrics under a key; empty where the outcome has none."""
    metrics = outcome.get("results", {}).get(key.source, {}).get(key.head, {}).get(key.task)
    return metrics if isinstance(metrics, dict) else {}


def macro_recalls(outcomes: Sequence[ProbeOutcome], key: MetricKey) -> list[float | None]:
    """Macro recall of every seed; None for a seed without it."""
    return [metrics_of(outcome, key).get("macro_recall") for outcome in outcomes]


def measured(runs: Mapping[str, Sequence[ProbeOutcome]]) -> list[MetricKey]:
    """The key of everything that was measured; test, local and transformer come first."""
    keys: dict[MetricKey, None] = {}
    for outcomes in runs.values():
        for outcome in outcomes:
            for source, heads in outcome.get("results", {}).items():
                for head, tasks in heads.items():
                    keys.update(dict.fromkeys(MetricKey(source, head, task) for task in tasks))
    # The reported source comes first; a validation set, on which settings may have been chosen, comes after it.
    sources = sorted(dict.fromkeys(key.source for key in keys), key=lambda source: source != "test")
    return sorted(
        keys,
        key=lambda key: (
            sources.index(key.source),
            _rank(key.task, _TASK_ORDER),
            _rank(key.head, _HEAD_ORDER),
        ),
    )


def _rank(name: str, order: Sequence[str]) -> tuple[int, str]:
    return (order.index(name) if name in order else len(order), name)


def before_after(results: ProbeResults) -> list[RecallRow]:
    """Macro recall of every source, task and head, before and after alignment, paired over seeds.

    The interval is Student's over seeds, see :func:`~localign.statistics.paired.paired_difference`; with one seed it is
    that of the paired bootstrap over images, where results have one.
    """
    runs = {name: outcomes for name, outcomes in probe_runs(results).items() if name in BEFORE_AFTER}
    every = [outcome for outcomes in runs.values() for outcome in outcomes]
    return [
        RecallRow(key, _paired(results, runs, key), all_converged(every, key.head, key.task))
        for key in measured(runs)
    ]


def _paired(
    results: ProbeResults, runs: Mapping[str, Sequence[ProbeOutcome]], key: MetricKey
) -> PairedDifference:
    found = paired_difference(*(macro_recalls(runs.get(name, []), key) for name in BEFORE_AFTER))
    for entry in results.get("differences", []) if found.seeds == 1 else []:
        names = (entry.get("against"), entry.get("name"))
        if names == BEFORE_AFTER and key == MetricKey(entry["source"], entry["head"], entry["task"]):
            interval = entry.get("interval")
            return replace(found, half_width=None if interval is None else (interval[1] - interval[0]) / 2)
    return found


def class_names(results: ProbeResults) -> list[str]:
    """Class names by class id."""
    outcomes = [outcome for seeds in probe_runs(results).values() for outcome in seeds]
    names = results.get("classes") or next((o["classes"] for o in outcomes if o.get("classes")), [])
    return [str(name) for name in names]


def per_class(results: ProbeResults, row: RecallRow) -> list[ClassRow]:
    """Recall by class behind one row; classes without positives are left out."""
    runs = probe_runs(results)
    recalls: list[list[list[float | None]]] = []
    positives: list[int] = []
    for name in BEFORE_AFTER:
        metrics = [metrics_of(outcome, row.key) for outcome in runs.get(name, [])]
        recalls.append([m.get("class_recall") or [] for m in metrics])
        positives = positives or next((m["class_positives"] for m in metrics if m.get("class_positives")), [])
    names = class_names(results)
    names += [f"class {i}" for i in range(len(names), len(positives))]
    return [
        ClassRow(
            names[i],
            int(count),
            paired_difference(*([seed[i] if i < len(seed) else None for seed in side] for side in recalls)),
        )
        for i, count in enumerate(positives)
        if count
    ]


# -- text ------------------------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    """A share as percent with one decimal; a dash for None and NaN."""
    return f"{100 * value:.1f}" if value is not None and math.isfinite(value) else "–"


def signed(difference: PairedDifference) -> str:
    """``+3.2 ± 1.1`` in points; without the interval where there is none."""
    if difference.difference is None or not math.isfinite(difference.difference):
        return "–"
    text = f"{100 * difference.difference:+.1f}".replace("-", "\u2212")
    return text if difference.half_width is None else f"{text} ± {100 * difference.half_width:.1f}"


def recall_grid(rows: Sequence[RecallRow]) -> Grid:
    """The table of recall before and after alignment, in percent; differences in points."""
    several = len({row.key.source for row in rows}) > 1
    both = any(row.recall.aligned is not None for row in rows)
    header = ["macro recall, %", "head", *(["baseline", "aligned", "difference"] if both else ["recall"])]
    body = []
    for row in rows:
        task = TASK_NAMES.get(row.key.task, row.key.task) + (f", {row.key.source}" if several else "")
        body.append((task, row.key.head, *_recall_cells(row.recall, both)))
    return Grid(tuple(header), tuple(body), texts=2)


def class_grid(rows: Sequence[ClassRow], unit: str) -> Grid:
    """The table of recall by class; ``unit`` names the column of positives, "patches" or "images"."""
    both = any(row.recall.aligned is not None for row in rows)
    header = ("class", unit, *(("baseline", "aligned", "difference") if both else ("recall",)))
    body = [(row.name, f"{row.positives:,}", *_recall_cells(row.recall, both)) for row in rows]
    return Grid(header, tuple(body))


def _recall_cells(recall: PairedDifference, both: bool) -> list[str]:
    cells = [percent(recall.baseline)]
    return [*cells, percent(recall.aligned), signed(recall)] if both else cells


def interval_sentence(rows: Sequence[RecallRow]) -> str:
    """One sentence on the numbers behind the plus-minus sign, and one on heads that had not converged."""
    return " ".join(filter(None, (_interval_sentence(rows), _unconverged_sentence(rows))))


def _unconverged_sentence(rows: Sequence[RecallRow]) -> str:
    names = dict.fromkeys(f"{row.key.head} ({row.key.task})" for row in rows if row.converged is False)
    if not names:
        return ""
    return f"Heads that had not converged when their training of a fixed length ended: {', '.join(names)}."


def _interval_sentence(rows: Sequence[RecallRow]) -> str:
    counts = {row.recall.seeds for row in rows if row.recall.difference is not None}
    if not counts:
        return "One model only: there is nothing to compare."
    if max(counts) < 2:
        if all(row.recall.half_width is not None for row in rows if row.recall.difference is not None):
            return "± is half the 95 % bootstrap interval of the difference over images, for one seed."
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
    """The table of recall before and after alignment for `rich`."""
    grid = recall_grid(rows)
    table = Table(title=title, caption=interval_sentence(rows))
    for i, name in enumerate(grid.header):
        table.add_column(name, justify="left" if i < grid.texts else "right", no_wrap=i >= grid.texts)
    for row in grid.rows:
        table.add_row(*row)
    return table
