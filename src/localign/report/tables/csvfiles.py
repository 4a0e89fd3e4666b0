"""The metrics of a probing run as CSV, one line per measured number; recalls are fractions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from localign.files import replace_text
from localign.report.figures.drawing import to_csv
from localign.report.tables.measures import class_kinds
from localign.report.tables.rows import class_names, probe_runs
from localign.results import Metrics, ProbeOutcome, ProbeResults, all_converged

Row = tuple[Any, ...]
_RECALLS = (
    "backbone", "head", "task", "seed", "source", "protocol", "macro_recall", "macro_recall_low",
    "macro_recall_high", "macro_precision", "macro_f1", "accuracy", "converged",
)  # fmt: skip
_CLASSES = (
    "backbone", "head", "task", "seed", "source", "class_id", "class", "kind", "positives", "recall",
    "precision", "f1",
)  # fmt: skip
_SIZES = ("backbone", "head", "task", "seed", "source", "share_low", "share_high", "positives", "recall")


def write_csv(results: ProbeResults, folder: Path) -> list[Path]:
    """Write ``recalls.csv``, ``classes.csv`` and ``sizes.csv``, leaving out empty ones; returns their paths."""
    names, kinds = class_names(results), class_kinds(results)
    recalls: list[Row] = []
    classes: list[Row] = []
    sizes: list[Row] = []
    for start, outcome, metrics in _all_metrics(results):
        converged = all_converged([outcome], str(start[1]), str(start[2]))
        recalls.append((*start, *_recall_cells(outcome, metrics), converged))
        classes += [(*start, *cells) for cells in _class_rows(metrics, names, kinds)]
        sizes += [(*start, *cells) for cells in _size_rows(metrics)]
    files = (("recalls", _RECALLS, recalls), ("classes", _CLASSES, classes), ("sizes", _SIZES, sizes))
    paths = []
    for name, header, rows in files:
        if rows:
            paths.append(folder / f"{name}.csv")
            replace_text(paths[-1], to_csv(header, rows))
    return paths


def _recall_cells(outcome: ProbeOutcome, metrics: Metrics) -> Row:
    low, high = metrics.get("macro_recall_interval") or (None, None)
    means = (metrics.get("macro_precision"), metrics.get("macro_f1"), metrics.get("accuracy"))
    return outcome.get("protocol"), metrics.get("macro_recall"), low, high, *means


def _class_rows(metrics: Metrics, names: list[str], kinds: list[str]) -> Iterator[Row]:
    recalls = metrics.get("class_recall") or []
    others = (metrics.get("class_precision"), metrics.get("class_f1"))
    positives, precision, f1 = (values or [] for values in (metrics.get("class_positives"), *others))
    # Where label maps hold several classes per pixel, a majority label is a code and not a class.
    are_codes = len(recalls) != len(names)
    for i, recall in enumerate(recalls):
        named = (f"code {i}", None) if are_codes else (names[i], kinds[i] if kinds else None)
        counts = positives[i] if i < len(positives) else None
        yield (i, *named, counts, recall, *(v[i] if i < len(v) else None for v in (precision, f1)))


def _size_rows(metrics: Metrics) -> Iterator[Row]:
    recalls = metrics.get("size_recall") or []
    bins = len(recalls)
    counts = metrics.get("size_positives") or []
    for b, recall in enumerate(recalls):
        yield b / bins, (b + 1) / bins, counts[b] if counts else None, recall


def _all_metrics(results: ProbeResults) -> Iterator[tuple[Row, ProbeOutcome, Metrics]]:
    """(backbone, head, task, seed, source), outcome and metrics of everything that was measured."""
    for backbone, outcomes in probe_runs(results).items():
        for i, outcome in enumerate(outcomes):
            for source, heads in outcome.get("results", {}).items():
                for head, tasks in heads.items():
                    for task, metrics in tasks.items():
                        yield (backbone, head, task, outcome.get("seed", i), source), outcome, metrics
