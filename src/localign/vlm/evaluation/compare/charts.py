"""From a comparison to its figures: radar charts on the pool's scales, and bars in percent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

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
from localign.vlm.evaluation.compare.comparison import Comparison

_ENDINGS = ("-Accuracy", "-ExactMatch", "-Overall", "-All", "-final", "-Pure")
_PLAIN = {"vqav2": "VQAv2", "gqa": "GQA"}
"""Benchmarks whose figure has no name of its own."""


def comparison_drawings(comparison: Comparison) -> tuple[list[Drawing], list[str]]:
    """A radar for each figure and bars for each panel; and, a line each, what is not drawn and why."""
    keys = [key for key in _headlines(comparison) if key in comparison["z_scores"]["means"]]
    axes = [_axis(comparison, key) for key in keys]
    panels: dict[str, list[Panel]] = {}
    for panel in comparison["panels"]:
        panels.setdefault(panel["figure"], []).append(_panel(comparison, panel, keys))
    style = looks([model for group in panels.values() for panel in group for model in panel.models])
    shared = [i for i, axis in enumerate(axes) if axis.models > 1]
    notes = [f"{axis.label} is not on the radar: no other model has it" for axis in axes if axis.models == 1]
    drawings: list[Drawing] = []
    why = _why_no_radar(len(shared), axes)
    if why:
        notes = [f"no radar is drawn: {why}; the bars have all figures"]
    else:
        scores = comparison["z_scores"]["scores"]
        scale = scale_of([row[keys[i]] for row in scores.values() for i in shared if keys[i] in row])
        on = [axes[i] for i in shared]
        if all(axis.models == 2 for axis in on):
            notes.append("of two models the radar tells only which is better, not by how much; the bars do")
        for figure, group in panels.items():
            cut = [_only(panel, shared) for panel in group]
            drawings.append(radar_drawing(on, cut, scale, style, _name("radar", figure)))
    drawings += [
        scores_drawing(axes, panel, style, _name("bars", figure, panel.title))
        for figure, group in panels.items()
        for panel in group
    ]
    return _unlike(drawings), notes


def _headlines(comparison: Comparison) -> list[str]:
    """The figures that stand for the benchmarks, as z-scores are called."""
    return [
        f"{name}: {figure}"
        for name, part in comparison["benchmarks"].items()
        for figure in next(iter(part["outcomes"].values()))["headline"]
    ]


def _why_no_radar(shared: int, axes: Sequence[Axis]) -> str:
    if all(axis.models < 2 for axis in axes):
        return "its scales are those of several models, and there is one"
    if shared < FEWEST:
        return f"it takes {FEWEST} figures that several models have, not {shared}"
    return ""


def _axis(comparison: Comparison, key: str) -> Axis:
    scales = comparison["z_scores"]
    return Axis(_label(key), scales["means"][key], scales["deviations"][key], scales["models"][key])


def _label(key: str) -> str:
    """``pope: accuracy__POPE-final-Accuracy`` as ``POPE``."""
    benchmark, figure = key.split(": ", 1)
    label = figure.removeprefix("accuracy__")
    if label == "accuracy":
        return _PLAIN.get(benchmark, benchmark)
    for ending in _ENDINGS:
        label = label.removesuffix(ending)
    return label.replace("-", " ") if benchmark != "textvqa-ocr" else "TextVQA with OCR"


def _panel(comparison: Comparison, panel: Mapping[str, Any], keys: Sequence[str]) -> Panel:
    prefix = "".join(f"{part}/" for part in (panel["figure"], panel["panel"]) if part)
    models = {
        label.removeprefix(prefix): [_score(comparison, label, key) for key in keys]
        for label in panel["models"]
    }
    return Panel(panel["panel"], models)


def _score(comparison: Comparison, label: str, key: str) -> Score | None:
    name, figure = key.split(": ", 1)
    z = comparison["z_scores"]["scores"][label].get(key)
    if z is None:
        return None
    part = comparison["benchmarks"][name]
    found = part["outcomes"][label]["figures"][figure]
    difference = part["differences"].get(label, {}).get(figure, {"value": None, "interval": None})
    ends = difference["interval"]
    return Score(
        found["value"],
        z,
        None if found["interval"] is None else (found["interval"][0], found["interval"][1]),
        tuple(found["seeds"]),
        difference["value"],
        ends is not None and ends[0] * ends[1] > 0,
    )


def _only(panel: Panel, shared: Sequence[int]) -> Panel:
    return Panel(panel.title, {model: [row[i] for i in shared] for model, row in panel.models.items()})


def _name(*parts: str) -> str:
    return "-".join([parts[0], *(slug(part) for part in parts[1:] if part)])


def _unlike(drawings: Sequence[Drawing]) -> list[Drawing]:
    """Names that differ only in signs that no file name has would overwrite each other."""
    taken: dict[str, int] = {}
    found = []
    for drawing in drawings:
        taken[drawing.name] = taken.get(drawing.name, 0) + 1
        number = taken[drawing.name]
        name = drawing.name if number == 1 else f"{drawing.name}-{number}"
        found.append(replace(drawing, name=name))
    return found
