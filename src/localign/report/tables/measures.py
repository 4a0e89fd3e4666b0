"""The numbers behind the probing figures and tables: recall, differences, gains, and the trend over backbones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np

from localign.report.tables.rows import (
    MetricKey,
    class_names,
    macro_recalls,
    measured,
    metrics_of,
    probe_runs,
)
from localign.results import ProbeOutcome, ProbeResults, all_converged
from localign.statistics.paired import paired_difference, seed_differences

BASELINE_SUFFIX = "-baseline"
"""A backbone named ``X-baseline`` is the backbone ``X`` before alignment."""
MIN_TREND = 3
"""Backbones that a trend needs."""
KINDS = ("thing", "stuff")
NOT_CONVERGED = "(heads not converged)"
"""Marks a difference of backbones some of whose heads were still learning."""
NOT_CONVERGED_NOTE = (
    "A difference with the mark (heads not converged) is of heads of which at least one was still learning when its "
    "training ended: it tells how fast heads learn, not what the features hold."
)


@dataclass(frozen=True)
class Estimate:
    """Macro recall over seeds, as fractions."""

    value: float
    """Mean over seeds."""
    interval: tuple[float, float] | None
    """95 % bootstrap interval over images, its bounds averaged over seeds; None where results have none."""
    seeds: tuple[float, ...]
    """The recall of each seed."""


@dataclass(frozen=True)
class Change:
    """The difference of two recalls, as fractions."""

    value: float
    interval: tuple[float, float] | None = None
    """95 % interval."""
    over: str = ""
    """The units that the interval resamples: "images" (paired bootstrap) or "seeds" (paired t)."""
    converged: bool | None = None
    """Whether all heads behind it had converged; None where that is not known."""

    @property
    def significant(self) -> bool:
        """Whether the interval excludes zero."""
        return self.interval is not None and self.interval[0] * self.interval[1] > 0


@dataclass(frozen=True)
class BackbonePair:
    """Two backbones to compare."""

    label: str
    before: str
    after: str
    aligned: bool
    """Whether ``after`` is ``before`` after alignment; otherwise they are unrelated backbones."""


@dataclass(frozen=True)
class ChartLine:
    """One line of a chart: a single backbone, or a backbone before and after alignment."""

    label: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class ClassGain:
    """The gain in recall of one class, as fractions."""

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
    """Bounds of the share of an image's patches that the object covers, 0..1."""
    positives: int
    seeds: tuple[float, ...]
    """Recall of each seed; empty for an empty bin."""


@dataclass(frozen=True)
class Trend:
    """``local = intercept + slope * global``, as fractions."""

    slope: float
    intercept: float

    def relative_locality(self, local: float, global_: float) -> float:
        """Local recall minus the local recall that the trend predicts from global recall."""
        return local - (self.intercept + self.slope * global_)


# -- backbones -------------------------------------------------------------------------------------------


def comparisons(results: ProbeResults) -> list[BackbonePair]:
    """The pairs of backbones to compare.

    The pairs in ``results["pairs"]``, as ``[label, before, after]``; without any, the pairs that names give:
    ``X-baseline`` with ``X``, and ``baseline`` with ``aligned``. Without those either, the first backbone with each
    of the others.
    """
    runs = probe_runs(results)
    pairs = [BackbonePair(str(n), str(b), str(a), True) for n, b, a in results.get("pairs") or ()]
    pairs = [pair for pair in pairs if pair.before in runs and pair.after in runs]
    if not pairs:
        named = [(n, n + BASELINE_SUFFIX, n) for n in runs if n + BASELINE_SUFFIX in runs]
        if {"baseline", "aligned"} <= set(runs):
            named.append((_backbone_name(runs["baseline"]), "baseline", "aligned"))
        pairs = [BackbonePair(*names, True) for names in named]
    if pairs:
        return pairs
    first, *others = runs or [""]
    return [BackbonePair(name, first, name, False) for name in others]


def _backbone_name(outcomes: Sequence[ProbeOutcome]) -> str:
    return next((str(o["backbone"]) for o in outcomes if o.get("backbone")), "backbone")


def chart_lines(results: ProbeResults) -> list[ChartLine]:
    """The lines of a chart, in the order of the results: one per aligned pair and one per remaining backbone."""
    runs = list(probe_runs(results))
    pairs = [pair for pair in comparisons(results) if pair.aligned]
    lines = []
    for i, name in enumerate(runs):
        own = [ChartLine(pair.label, name, pair.after) for pair in pairs if pair.before == name]
        lines += own
        if not own and not any(pair.after == name for pair in pairs):
            # Without pairs, the first backbone is the reference of the others; beside pairs, the name decides.
            before = name.endswith(BASELINE_SUFFIX) if pairs else i == 0
            lines.append(ChartLine(name, name, None) if before else ChartLine(name, None, name))
    return lines


def display_names(results: ProbeResults) -> dict[str, str]:
    """Every backbone's name for readers: in pairs, the label with "before" or "after"."""
    names = {name: name for name in probe_runs(results)}
    pairs = [pair for pair in comparisons(results) if pair.aligned]
    for pair in pairs:
        names[pair.after] = f"{pair.label}, after"
        if sum(other.before == pair.before for other in pairs) == 1:
            names[pair.before] = f"{pair.label}, before"
    return names


def unconverged(results: ProbeResults) -> list[str]:
    """The heads that had not converged, as ``backbone: head (task)``; a head with several seeds once."""
    return [
        f"{name}: {key.head} ({key.task})"
        for name, outcomes in probe_runs(results).items()
        for key in measured({name: outcomes})
        if key.source == main_source(results) and all_converged(outcomes, key.head, key.task) is False
    ]


# -- recall ----------------------------------------------------------------------------------------------


def main_source(results: ProbeResults) -> str:
    """The source to report: test if there is one, otherwise the first; empty without results."""
    keys = measured(probe_runs(results))
    return keys[0].source if keys else ""


def heads_of(results: ProbeResults, task: str) -> list[str]:
    """Heads measured on a task of the main source, the transformer first."""
    source = main_source(results)
    return [k.head for k in measured(probe_runs(results)) if (k.source, k.task) == (source, task)]


def main_head(results: ProbeResults) -> str:
    """The head of figures that show one head: the transformer if it was trained, otherwise the first."""
    heads = [head for task in ("local", "global", "majority") for head in heads_of(results, task)]
    return heads[0] if heads else ""


def estimate(outcomes: Sequence[ProbeOutcome], key: MetricKey) -> Estimate | None:
    """Macro recall of one backbone; None where no seed has a finite recall."""
    values = [value for value in macro_recalls(outcomes, key) if _finite(value)]
    if not values:
        return None
    stored = [metrics_of(outcome, key).get("macro_recall_interval") for outcome in outcomes]
    bounds = [pair for pair in stored if _is_interval(pair)]
    interval = None
    if bounds:
        low, high = np.mean(np.asarray(bounds, dtype=np.float64), axis=0)
        interval = (float(low), float(high))
    return Estimate(sum(values) / len(values), interval, tuple(float(v) for v in values))


def change(results: ProbeResults, before: str, after: str, key: MetricKey) -> Change | None:
    """The difference of two backbones: the results' paired bootstrap if there is one, otherwise paired over seeds."""
    runs = probe_runs(results)
    converged = all_converged([*runs.get(before, ()), *runs.get(after, ())], key.head, key.task)
    for entry in results.get("differences") or ():
        named = (entry.get("name"), entry.get("against"), entry.get("head"), entry.get("task"))
        wanted = (after, before, key.head, key.task)
        value = entry.get("difference")
        if named == wanted and entry.get("source", key.source) == key.source and _finite(value):
            bounds = entry.get("interval")
            interval = (float(bounds[0]), float(bounds[1])) if _is_interval(bounds) else None
            return Change(float(value), interval, "images" if interval else "", converged)
    paired = paired_difference(*(macro_recalls(runs.get(name, ()), key) for name in (before, after)))
    if paired.difference is None:
        return None
    half = paired.half_width
    interval = None if half is None else (paired.difference - half, paired.difference + half)
    return Change(paired.difference, interval, "seeds" if interval else "", converged)


def percent_cell(number: Estimate | Change | None, digits: int = 1, missing: str = "–") -> str:
    """A recall or a difference in percent, with its interval in brackets; differences have a sign.

    A difference between heads of which one had not converged is followed by :data:`NOT_CONVERGED`.
    """
    if number is None:
        return missing
    style = f"{'+' if isinstance(number, Change) else ''}.{digits}f"
    text = f"{100 * number.value:{style}}"
    if number.interval is not None:
        low, high = number.interval
        text += f" [{100 * low:{style}}, {100 * high:{style}}]"
    text = text.replace("-", "\u2212")
    return f"{text} {NOT_CONVERGED}" if isinstance(number, Change) and number.converged is False else text


def _finite(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _is_interval(value: object) -> TypeGuard[Sequence[float]]:
    return isinstance(value, Sequence) and len(value) == 2 and all(_finite(v) for v in value)


# -- classes and sizes -----------------------------------------------------------------------------------


def class_kinds(results: ProbeResults) -> list[str]:
    """thing, stuff or other by class id; empty where unknown."""
    outcomes = [outcome for seeds in probe_runs(results).values() for outcome in seeds]
    kinds = results.get("class_kinds") or next(
        (o["class_kinds"] for o in outcomes if o.get("class_kinds")), None
    )
    return [str(kind) for kind in kinds or ()]


def class_gains(results: ProbeResults, pair: BackbonePair, key: MetricKey) -> list[ClassGain]:
    """The gain of every class with positives that was measured on both sides, the largest first."""
    runs = probe_runs(results)
    before, after = ([metrics_of(o, key) for o in runs.get(n, ())] for n in (pair.before, pair.after))
    names, kinds = class_names(results), class_kinds(results)
    counts = next((m["class_positives"] for m in (*before, *after) if m.get("class_positives")), [])
    gains = []
    for i, positives in enumerate(counts):
        sides = [[_entry(m.get("class_recall"), i) for m in side] for side in (before, after)]
        mean = paired_difference(*sides)
        if not positives or mean.difference is None or mean.baseline is None or mean.aligned is None:
            continue
        gains.append(
            ClassGain(
                i,
                names[i] if i < len(names) else f"class {i}",
                kinds[i] if i < len(kinds) else "",
                int(positives),
                mean.baseline,
                mean.aligned,
                mean.difference,
                tuple(seed_differences(*sides)),
            )
        )
    return sorted(gains, key=lambda gain: -gain.gain)


def size_bins(outcomes: Sequence[ProbeOutcome], key: MetricKey) -> list[SizeBin]:
    """Recall by object size of one backbone; empty where results have no sizes."""
    cells = [m for m in (metrics_of(outcome, key) for outcome in outcomes) if m.get("size_recall")]
    if not cells:
        return []
    count = len(cells[0]["size_recall"])
    positives = cells[0].get("size_positives") or [0] * count
    return [
        SizeBin(
            b / count,
            (b + 1) / count,
            int(positives[b]),
            tuple(float(v) for v in (_entry(m["size_recall"], b) for m in cells) if v is not None),
        )
        for b in range(count)
    ]


def _entry(values: Sequence[float | None] | None, index: int) -> float | None:
    value = values[index] if values is not None and index < len(values) else None
    return value if _finite(value) else None


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
