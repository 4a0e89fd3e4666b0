"""The charts of a comparison: radar charts in z-scores, and bar charts in percent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from localign.report.figures.drawing import Drawing, slug
from localign.report.figures.radar import (
    FEWEST,
    Axis,
    Panel,
    Score,
    looks,
    radar_drawing,
    scale_of,
)
from localign.report.figures.scores import scores_drawing
from localign.vlm.evaluation.compare.comparison import Comparison, PanelFacts

_SUFFIXES = ("-Accuracy", "-ExactMatch", "-Overall", "-All", "-final", "-Pure")
_LABELS = {"vqav2": "VQAv2", "gqa": "GQA"}
"""Labels of benchmarks whose metric is just named "accuracy"."""


def comparison_drawings(
    comparison: Comparison, colour_order: Sequence[str] = ()
) -> tuple[list[Drawing], list[str]]:
    """Draw a radar chart for each figure and a bar chart for each panel.

    Args:
        comparison: The comparison.
        colour_order: Names of models that take the first colours; all others follow in their own order.

    Returns:
        The charts, and notes on what is not drawn, one line each.
    """
    keys = [key for key in _headline_keys(comparison) if key in comparison["z_scores"]["means"]]
    axes = [_axis(comparison, key) for key in keys]
    panels: dict[str, list[Panel]] = {}
    for panel in comparison["panels"]:
        panels.setdefault(panel["figure"], []).append(_panel(comparison, panel, keys))
    drawn = [model for group in panels.values() for panel in group for model in panel.models]
    style = looks([*colour_order, *drawn])
    shared = [i for i, axis in enumerate(axes) if axis.models > 1]
    notes = [
        f"{axis.label} is not in the radar chart: only one model has it" for axis in axes if axis.models == 1
    ]
    drawings: list[Drawing] = []
    reason = _reason_without_radar(len(shared), axes)
    if reason:
        notes = [f"no radar chart: {reason}; the bar charts show all metrics"]
    else:
        scores = comparison["z_scores"]["scores"]
        scale = scale_of([row[keys[i]] for row in scores.values() for i in shared if keys[i] in row])
        shared_axes = [axes[i] for i in shared]
        if all(axis.models == 2 for axis in shared_axes):
            notes.append(
                "with two models the radar chart shows which model is better, but not by how much; see the bar charts"
            )
        for figure, group in panels.items():
            shared_panels = [_select(panel, shared) for panel in group]
            drawings.append(radar_drawing(shared_axes, shared_panels, scale, style, _name("radar", figure)))
    drawings += [
        scores_drawing(axes, panel, style, _name("bars", figure, panel.title))
        for figure, group in panels.items()
        for panel in group
    ]
    return _with_unique_names(drawings), notes


def _headline_keys(comparison: Comparison) -> list[str]:
    """The headline metrics, named as in the z-scores."""
    return [
        f"{name}: {metric}"
        for name, part in comparison["benchmarks"].items()
        for metric in next(iter(part["outcomes"].values()))["headline"]
    ]


def _reason_without_radar(shared: int, axes: Sequence[Axis]) -> str:
    """Why there is no radar chart; empty if there is one."""
    if all(axis.models < 2 for axis in axes):
        return "its scales need several models"
    if shared < FEWEST:
        return f"it needs at least {FEWEST} metrics that several models have, and there are {shared}"
    return ""


def _axis(comparison: Comparison, key: str) -> Axis:
    scales = comparison["z_scores"]
    return Axis(_label(key), scales["means"][key], scales["deviations"][key], scales["models"][key])


def _label(key: str) -> str:
    """``pope: accuracy__POPE-final-Accuracy`` as ``POPE``."""
    benchmark, metric = key.split(": ", 1)
    label = metric.removeprefix("accuracy__")
    if label == "accuracy":
        return _LABELS.get(benchmark, benchmark)
    for suffix in _SUFFIXES:
        label = label.removesuffix(suffix)
    return label.replace("-", " ") if benchmark != "textvqa-ocr" else "TextVQA with OCR"


def _panel(comparison: Comparison, panel: PanelFacts, keys: Sequence[str]) -> Panel:
    prefix = "".join(f"{part}/" for part in (panel["figure"], panel["panel"]) if part)
    models = {
        label.removeprefix(prefix): [_score(comparison, label, key) for key in keys]
        for label in panel["models"]
    }
    return Panel(panel["panel"], models)


def _score(comparison: Comparison, label: str, key: str) -> Score | None:
    name, metric = key.split(": ", 1)
    z = comparison["z_scores"]["scores"][label].get(key)
    if z is None:
        return None
    part = comparison["benchmarks"][name]
    found = part["outcomes"][label]["figures"][metric]
    assert found["value"] is not None  # a metric with a z-score is defined
    difference = part["differences"].get(label, {}).get(metric)
    ends = None if difference is None else difference["interval"]
    return Score(
        found["value"],
        z,
        None if found["interval"] is None else (found["interval"][0], found["interval"][1]),
        tuple(found["seeds"]),
        None if difference is None else difference["value"],
        ends is not None and ends[0] * ends[1] > 0,
    )


def _select(panel: Panel, columns: Sequence[int]) -> Panel:
    """The panel with some of its axes."""
    return Panel(panel.title, {model: [row[i] for i in columns] for model, row in panel.models.items()})


def _name(*parts: str) -> str:
    return "-".join([parts[0], *(slug(part) for part in parts[1:] if part)])


def _with_unique_names(drawings: Sequence[Drawing]) -> list[Drawing]:
    """Number drawings whose file names are equal once unsafe characters are replaced."""
    taken: dict[str, int] = {}
    found = []
    for drawing in drawings:
        taken[drawing.name] = taken.get(drawing.name, 0) + 1
        number = taken[drawing.name]
        name = drawing.name if number == 1 else f"{drawing.name}-{number}"
        found.append(replace(drawing, name=name))
    return found
