"""The parts of the page that a probing run has: its tables and figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from localign.report import captions, html
from localign.report.figures import Drawing
from localign.report.probing import ProbeReport
from localign.report.style import data_uri, png, svg
from localign.report.tables import rows as tables
from localign.report.tables.measures import (
    BackbonePair,
    Measured,
    change,
    comparisons,
    display_names,
    estimate,
    main_head,
    main_source,
)

_SENTENCES = 3
"""Up to so many comparisons, the lead tells each."""
_TITLES = {
    "recall": "Recall",
    "comparison": "BackbonePair",
    "relative_locality": "Relative locality",
}


def headline(results: Mapping[str, Any]) -> str:
    """What was measured; with few comparisons, what each came to."""
    pairs, head = comparisons(results), main_head(results)
    names = display_names(results)
    if not 0 < len(pairs) <= _SENTENCES:
        return f"Recall of heads on the frozen features of {len(names)} backbone{'s' * (len(names) > 1)}."
    what = Measured(main_source(results), head, "local")
    told = [_sentence(results, pair, what, names) for pair in pairs]
    return (
        " ".join(t for t in told if t) or f"Recall of heads on the frozen features of {len(names)} backbones."
    )


def _sentence(
    results: Mapping[str, Any], pair: BackbonePair, what: Measured, names: Mapping[str, str]
) -> str:
    runs = tables.probe_runs(results)
    before, after = (estimate(runs[n], what) for n in (pair.before, pair.after))
    moved = change(results, pair.before, pair.after, what)
    if before is None or after is None or moved is None:
        return ""
    chance = "no interval: one seed, and no bootstrap"
    if moved.interval is not None:
        low, high = (f"{100 * b:+.1f}".replace("-", "\u2212") for b in moved.interval)
        chance = f"95\u00a0% interval {low} to {high}, over {moved.over}"
        if not moved.certain:
            chance += ": it includes no change"
    points = f"{100 * moved.value:+.1f}".replace("-", "\u2212")
    return (
        f"Local macro recall ({tables.HEAD_NAMES.get(what.head, what.head)}): {names[pair.before]} "
        f"{100 * before.value:.1f}\u00a0%, {names[pair.after]} {100 * after.value:.1f}\u00a0%, "
        f"{points} points ({chance})."
    )


def tiles(results: Mapping[str, Any]) -> list[html.Tile]:
    """Local recall of each backbone."""
    what = Measured(main_source(results), main_head(results), "local")
    shown = display_names(results)
    found = {n: estimate(runs, what) for n, runs in tables.probe_runs(results).items()}
    return [
        html.Tile(shown[n], f"{100 * e.value:.1f} %", f"local macro recall, {what.head}")
        for n, e in found.items()
        if e is not None
    ]


def sections(report: ProbeReport) -> list[str]:
    """Tables, then figures."""
    parts = []
    for name, (caption, grid) in report.tables.items():
        table = tables.to_html(grid)
        if name == "recall":
            caption = f"{captions.RECALL} {caption}"
        parts.append(html.section(_TITLES.get(name, name), table, html.paragraph(caption, "muted")))
    figures = [html.figure(_uri(drawing), *drawing.words) for drawing in report.drawings]
    return [*parts, html.section("Figures", *figures)]


def _uri(drawing: Drawing) -> str:
    if drawing.vector:
        return data_uri(svg(drawing.figure), "image/svg+xml")
    return data_uri(png(drawing.figure), "image/png")
