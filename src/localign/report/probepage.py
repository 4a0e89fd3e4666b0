"""The parts of the page that are particular to probing runs."""

from __future__ import annotations

from collections.abc import Mapping

from localign.options.names import TASKS
from localign.report import captions, html
from localign.report.figures import Drawing
from localign.report.probing import ProbeReport
from localign.report.style import data_uri, png, svg
from localign.report.tables import rows as tables
from localign.report.tables.measures import (
    BackbonePair,
    change,
    comparisons,
    display_names,
    estimate,
    heads_of,
    main_head,
    main_source,
)
from localign.report.tables.rows import MetricKey
from localign.results import ProbeResults

_SENTENCES = 3
"""Up to this number of comparisons, the headline has a sentence for each."""
_TITLES = {
    "recall": "Recall",
    "comparison": "Comparison",
    "relative_locality": "Relative locality",
}


def headline(results: ProbeResults) -> str:
    """The result of each comparison if there are few; otherwise the number of backbones."""
    pairs, names = comparisons(results), display_names(results)
    key = MetricKey(main_source(results), main_head(results), "local")
    sentences = [_sentence(results, pair, key, names) for pair in pairs] if len(pairs) <= _SENTENCES else []
    backbones = f"{len(names)} backbone{'s' * (len(names) > 1)}"
    return " ".join(filter(None, sentences)) or f"Recall of heads on the frozen features of {backbones}."


def other_heads(results: ProbeResults) -> list[str]:
    """One line for each comparison by another head or on another task than the headline's, if comparisons are few."""
    pairs, names = comparisons(results), display_names(results)
    if len(pairs) > _SENTENCES:
        return []
    keys = [MetricKey(main_source(results), head, task) for task in TASKS for head in heads_of(results, task)]
    main = MetricKey(main_source(results), main_head(results), "local")
    lines = [_sentence(results, pair, key, names) for key in keys if key != main for pair in pairs]
    return [line for line in lines if line]


def _sentence(results: ProbeResults, pair: BackbonePair, key: MetricKey, names: Mapping[str, str]) -> str:
    runs = tables.probe_runs(results)
    before, after = (estimate(runs[n], key) for n in (pair.before, pair.after))
    difference = change(results, pair.before, pair.after, key)
    if before is None or after is None or difference is None:
        return ""
    chance = "no interval: one seed, and no bootstrap"
    if difference.interval is not None:
        low, high = (f"{100 * b:+.1f}".replace("-", "\u2212") for b in difference.interval)
        chance = f"95\u00a0% interval {low} to {high}, over {difference.over}"
        if not difference.significant:
            chance += ", which includes no change"
    if difference.converged is False:
        chance += "; heads not converged, so this tells how fast they learn"
    points = f"{100 * difference.value:+.1f}".replace("-", "\u2212")
    return (
        f"{key.task.capitalize()} macro recall ({tables.HEAD_NAMES.get(key.head, key.head)}): {names[pair.before]} "
        f"{100 * before.value:.1f}\u00a0%, {names[pair.after]} {100 * after.value:.1f}\u00a0%, "
        f"{points} points ({chance})."
    )


def tiles(results: ProbeResults) -> list[html.Tile]:
    """Local recall of each backbone."""
    key = MetricKey(main_source(results), main_head(results), "local")
    names = display_names(results)
    recalls = {name: estimate(outcomes, key) for name, outcomes in tables.probe_runs(results).items()}
    return [
        html.Tile(names[name], f"{100 * recall.value:.1f} %", f"local macro recall, {key.head}")
        for name, recall in recalls.items()
        if recall is not None
    ]


def sections(report: ProbeReport) -> list[str]:
    """The tables, then the figures."""
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
