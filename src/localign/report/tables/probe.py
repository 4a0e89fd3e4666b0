"""Tables of a probing run: recall of everything, and comparisons with published numbers where names match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from localign.report.tables.measures import (
    BackbonePair,
    Estimate,
    Measured,
    change,
    comparisons,
    display_names,
    estimate,
    main_head,
    main_source,
)
from localign.report.tables.published import TABLE5
from localign.report.tables.rows import HEAD_NAMES, TASK_NAMES, Grid, class_names, measured, probe_runs

Results = Mapping[str, Any]
_PUBLISHED_CLASSES = 183
"""Of COCO-Stuff, which the published numbers are of."""


def recall_grid(results: Results) -> Grid:
    """Macro recall of every backbone, head and task of the main source, in percent with intervals."""
    runs, source = probe_runs(results), main_source(results)
    columns = [(t, h) for s, t, h in measured(runs) if s == source]
    shown = display_names(results)
    body = []
    for name, side in runs.items():
        cells = []
        for task, head in columns:
            found = estimate(side, Measured(source, head, task))
            cells.append("–" if found is None else f"{100 * found.value:.1f}{_brackets(found.interval)}")
        body.append((shown[name], *cells))
    header = ("backbone", *(f"{task}, {HEAD_NAMES.get(head, head)}" for task, head in columns))
    return Grid(header, tuple(body))


def recall_caption(results: Results) -> str:
    """What the numbers of the recall table are."""
    outcomes = [r for side in probe_runs(results).values() for r in side]
    seeds = {len(side) for side in probe_runs(results).values()}
    over = f", means over {max(seeds)} seeds" if max(seeds) > 1 else ""
    published = any(r.get("protocol") == "published" for r in outcomes)
    protocol = (
        " Published protocol: the epoch that is best on this very split is reported, which flatters."
        if published
        else ""
    )
    cells = (e for side in probe_runs(results).values() for e in _estimates(results, side))
    brackets = "; in brackets 95 % bootstrap intervals over images" if any(e.interval for e in cells) else ""
    return f"Macro recall in %, {main_source(results)} split{over}{brackets}.{protocol}"


def _estimates(results: Results, side: Sequence[Mapping[str, Any]]) -> list[Estimate]:
    source = main_source(results)
    columns = [Measured(s, h, t) for s, t, h in measured(probe_runs(results)) if s == source]
    return [e for e in (estimate(side, what) for what in columns) if e is not None]


def comparison_table(results: Results) -> tuple[str, Grid]:
    """Caption and table of all comparisons: both sides, the difference, and published numbers by name."""
    source, head = main_source(results), main_head(results)
    runs, pairs = probe_runs(results), comparisons(results)
    tasks = [t for t in TASK_NAMES if any((source, t, head) == found for found in measured(runs))]
    coco = len(class_names(results)) == _PUBLISHED_CLASSES
    known = [TABLE5.get(pair.label) if coco and pair.aligned else None for pair in pairs]
    body = []
    for pair, paper in zip(pairs, known, strict=True):
        row = [pair.label]
        for task in tasks:
            what = Measured(source, head, task)
            for name in (pair.before, pair.after):
                found = estimate(runs[name], what)
                row.append("–" if found is None else f"{100 * found.value:.1f}")
            row.append(_signed(results, pair, what))
        if any(known):
            row += [f"{paper.baseline[i]:.2f} → {paper.aligned[i]:.2f}" if paper else "–" for i in range(2)]
        body.append(tuple(row))
    sides = ("before", "after") if pairs[0].aligned else (pairs[0].before, "backbone")
    header = ["backbone", *(f"{task}, {column}" for task in tasks for column in (*sides, "difference"))]
    header += ["published local", "published global"] if any(known) else []
    caption = (
        f"Macro recall in %, {HEAD_NAMES.get(head, head)}, {source} split; differences in points, "
        f"{_over(results, pairs, [Measured(source, head, t) for t in tasks])}."
    )
    return caption, Grid(tuple(header), tuple(body))


def _signed(results: Results, pair: BackbonePair, what: Measured) -> str:
    found = change(results, pair.before, pair.after, what)
    if found is None:
        return "–"
    text = f"{100 * found.value:+.1f}"
    if found.interval is not None:
        text += f" [{100 * found.interval[0]:+.1f}, {100 * found.interval[1]:+.1f}]"
    return text.replace("-", "\u2212")


def _over(results: Results, pairs: Sequence[BackbonePair], whats: Sequence[Measured]) -> str:
    found = [change(results, pair.before, pair.after, what) for pair in pairs for what in whats]
    kinds = {c.over for c in found if c is not None and c.over}
    words = {"images": "paired bootstrap over images", "seeds": "paired t over seeds"}
    if not kinds:
        return "without intervals (one seed, and no bootstrap)"
    return f"in brackets their 95 % intervals ({' or '.join(words[kind] for kind in sorted(kinds))})"


def _brackets(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
