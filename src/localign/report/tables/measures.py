"""What the probing figures and tables are made of: recall, differences, gains, and the trend, from results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from localign.report.tables.rows import class_names, measured, metric, probe_runs
from localign.statistics.paired import paired_difference

BASELINE_SUFFIX = "-baseline"
"""A backbone called like another one with this tail is that one before alignment."""
MIN_TREND = 3
KINDS = ("thing", "stuff")

Runs = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Measured:
    """What a head was asked: the figures of one source, head and task."""

    source: str
    head: str
    task: str


@dataclass(frozen=True)
class Estimate:
    """A recall over seeds, as fractions."""

    value: float
    """Mean over seeds."""
    interval: tuple[float, float] | None
    """95 % bootstrap interval over images, its bounds averaged over seeds; None where there is none."""
    seeds: tuple[float, ...]
    """The values behind the mean."""


@dataclass(frozen=True)
class Change:
    """A difference of two recalls, as fractions."""

    value: float
    interval: tuple[float, float] | None = None
    over: str = ""
    """What the interval is over: "images" (paired bootstrap) or "seeds" (paired t)."""

    @property
    def certain(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.interval is not None and self.interval[0] * self.interval[1] > 0


@dataclass(frozen=True)
class BackbonePair:
    """Two backbones that are held against each other."""

    label: str
    before: str
    after: str
    aligned: bool
    """Whether ``after`` is known to be ``before`` aligned; else they are just two backbones."""


@dataclass(frozen=True)
class Model:
    """One line of a chart: a backbone alone, or before and after alignment."""

    label: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class ClassGain:
    """What one class gained, as fractions."""

    index: int
    name: str
    kind: str
    """thing, stuff, other, or empty where unknown."""
    positives: int
    before: float
    after: float
    gain: float
    seeds: tuple[float, ...]
    """The gain of each seed."""


@dataclass(frozen=True)
class SizeBin:
    """Recall of objects of one size."""

    low: float
    high: float
    """Bounds of the share of an image's patches, 0..1."""
    positives: int
    seeds: tuple[float, ...]
    """Recall of each seed; empty for an empty bin."""


@dataclass(frozen=True)
class Trend:
    """``local = intercept + slope * global``, as fractions."""

    slope: float
    intercept: float

    def relative_locality(self, local: float, global_: float) -> float:
        """How far local recall lies above what the trend expects of this global recall."""
        return local - (self.intercept + self.slope * global_)


# -- which backbones -------------------------------------------------------------------------------------


def comparisons(results: Mapping[str, Any]) -> list[BackbonePair]:
    """Pairs of backbones: those that ``results["pairs"]`` lists, or that names tell; else all against the first.

    ``pairs`` holds ``[label, before, after]``; the names that tell are ``X-baseline`` beside ``X``, and
    ``baseline`` beside ``aligned``.
    """
    runs = probe_runs(results)
    told = [BackbonePair(str(n), str(b), str(a), True) for n, b, a in results.get("pairs") or ()]
    told = [c for c in told if c.before in runs and c.after in runs]
    if not told:
        found = [(n, n + BASELINE_SUFFIX, n) for n in runs if n + BASELINE_SUFFIX in runs]
        if {"baseline", "aligned"} <= set(runs):
            found.append((_backbone(runs["baseline"]), "baseline", "aligned"))
        told = [BackbonePair(*names, True) for names in found]
    if told:
        return told
    first, *others = runs or [""]
    return [BackbonePair(name, first, name, False) for name in others]


def _backbone(runs: Sequence[Mapping[str, Any]]) -> str:
    return next((str(r["backbone"]) for r in runs if r.get("backbone")), "backbone")


def models(results: Mapping[str, Any]) -> list[Model]:
    """The lines of a chart, in the order of the results: each pair has one, the rest stand alone."""
    runs = list(probe_runs(results))
    pairs = [c for c in comparisons(results) if c.aligned]
    lines = []
    for i, name in enumerate(runs):
        mine = [Model(c.label, name, c.after) for c in pairs if c.before == name]
        lines += mine
        if not mine and not any(c.after == name for c in pairs):
            # Alone, the first is what the others are compared with; among pairs, the name has to tell.
            before = name.endswith(BASELINE_SUFFIX) if pairs else i == 0
            lines.append(Model(name, name, None) if before else Model(name, None, name))
    return lines


def display_names(results: Mapping[str, Any]) -> dict[str, str]:
    """Every backbone's name as a reader should see it: of pairs, the label with "before" or "after"."""
    shown = {name: name for name in probe_runs(results)}
    pairs = [c for c in comparisons(results) if c.aligned]
    for pair in pairs:
        shown[pair.after] = f"{pair.label}, after"
        if sum(c.before == pair.before for c in pairs) == 1:
            shown[pair.before] = f"{pair.label}, before"
    return shown


# -- numbers ---------------------------------------------------------------------------------------------


def main_source(results: Mapping[str, Any]) -> str:
    """The source that is reported: test where there is one, else the first; empty without results."""
    found = measured(probe_runs(results))
    return found[0][0] if found else ""


def heads_of(results: Mapping[str, Any], task: str) -> list[str]:
    """Heads measured on a task of the main source, the transformer first."""
    source = main_source(results)
    return [h for s, t, h in measured(probe_runs(results)) if (s, t) == (source, task)]


def main_head(results: Mapping[str, Any]) -> str:
    """The head that figures of one head show: the transformer where it was trained, else the first."""
    heads = [h for task in ("local", "global", "majority") for h in heads_of(results, task)]
    return heads[0] if heads else ""


def estimate(runs: Sequence[Mapping[str, Any]], what: Measured) -> Estimate | None:
    """Macro recall of one backbone; None where no seed has a finite one."""
    cells = [_cell(run, what) for run in runs]
    values = [float(c["macro_recall"]) for c in cells if _finite(c.get("macro_recall"))]
    if not values:
        return None
    bounds = [c["macro_recall_interval"] for c in cells if _interval(c.get("macro_recall_interval"))]
    interval = None
    if bounds:
        low, high = np.mean(np.asarray(bounds, dtype=np.float64), axis=0)
        interval = (float(low), float(high))
    return Estimate(sum(values) / len(values), interval, tuple(values))


def change(results: Mapping[str, Any], before: str, after: str, what: Measured) -> Change | None:
    """The difference of two backbones: the paired bootstrap of the results, else paired over seeds."""
    for entry in results.get("differences") or ():
        named = (entry.get("name"), entry.get("against"), entry.get("head"), entry.get("task"))
        same = (
            named == (after, before, what.head, what.task) and entry.get("source", what.source) == what.source
        )
        if same and _finite(entry.get("difference")):
            bounds = entry.get("interval")
            interval = (float(bounds[0]), float(bounds[1])) if _interval(bounds) else None
            return Change(float(entry["difference"]), interval, "images" if interval else "")
    runs = probe_runs(results)
    sides = (
        [metric(r, what.source, what.head, what.task, "macro_recall") for r in runs.get(name, ())]
        for name in (before, after)
    )
    found = paired_difference(*sides)
    if found.difference is None:
        return None
    half = found.half_width
    interval = None if half is None else (found.difference - half, found.difference + half)
    return Change(found.difference, interval, "seeds" if interval else "")


def _cell(run: Mapping[str, Any], what: Measured) -> Mapping[str, Any]:
    found = run.get("results", {}).get(what.source, {}).get(what.head, {}).get(what.task)
    return found if isinstance(found, Mapping) else {}


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _interval(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(_finite(v) for v in value)


# -- classes and sizes -----------------------------------------------------------------------------------


def class_kinds(results: Mapping[str, Any]) -> list[str]:
    """thing, stuff or other of every class; empty where unknown."""
    runs = [r for side in probe_runs(results).values() for r in side]
    found: list[Any] = results.get("class_kinds") or next(
        (r["class_kinds"] for r in runs if r.get("class_kinds")), []
    )
    return [str(kind) for kind in found]


def class_gains(results: Mapping[str, Any], pair: BackbonePair, what: Measured) -> list[ClassGain]:
    """Gain of every class that was measured on both sides, the largest first."""
    runs = probe_runs(results)
    before, after = ([_cell(r, what) for r in runs.get(n, ())] for n in (pair.before, pair.after))
    names, kinds = class_names(results), class_kinds(results)
    counts: list[int] = next(
        (c["class_positives"] for c in (*before, *after) if c.get("class_positives")), []
    )
    gains = []
    for i, positives in enumerate(counts):
        sides = [[_entry(c.get("class_recall"), i) for c in side] for side in (before, after)]
        mean = paired_difference(*sides)
        if not positives or mean.difference is None or mean.baseline is None or mean.aligned is None:
            continue
        seeds = [paired_difference([b], [a]).difference for b, a in _pairs(*sides)]
        gains.append(
            ClassGain(
                i,
                names[i] if i < len(names) else f"class {i}",
                kinds[i] if i < len(kinds) else "",
                int(positives),
                mean.baseline,
                mean.aligned,
                mean.difference,
                tuple(g for g in seeds if g is not None),
            )
        )
    return sorted(gains, key=lambda g: -g.gain)


def size_bins(runs: Sequence[Mapping[str, Any]], what: Measured) -> list[SizeBin]:
    """Recall per object size of one backbone; empty where sizes were not told apart."""
    cells = [c for c in (_cell(r, what) for r in runs) if c.get("size_recall")]
    if not cells:
        return []
    count = len(cells[0]["size_recall"])
    positives = cells[0].get("size_positives") or [0] * count
    return [
        SizeBin(
            b / count,
            (b + 1) / count,
            int(positives[b]),
            tuple(float(v) for v in (_entry(c["size_recall"], b) for c in cells) if v is not None),
        )
        for b in range(count)
    ]


def _entry(values: Sequence[float | None] | None, index: int) -> float | None:
    value = values[index] if values is not None and index < len(values) else None
    return value if _finite(value) else None


def _pairs(before: list[float | None], after: list[float | None]) -> list[tuple[float | None, float | None]]:
    count = max(len(before), len(after))
    before, after = (side * count if len(side) == 1 else side for side in (before, after))
    return list(zip(before, after, strict=False))


# -- trend -----------------------------------------------------------------------------------------------


def fit_trend(points: Sequence[tuple[float, float]]) -> Trend | None:
    """Least squares of local on global recall.

    Args:
        points: ``(local, global)`` of each backbone.

    Returns:
        None for fewer than three backbones, or where all have the same global recall.
    """
    if len(points) < MIN_TREND:
        return None
    local, global_ = np.asarray(points, dtype=np.float64).T
    if np.ptp(global_) < 1e-9:
        return None
    slope, intercept = np.polyfit(global_, local, 1)
    return Trend(float(slope), float(intercept))
