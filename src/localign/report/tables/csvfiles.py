"""A probing run's figures as CSV, one line per measured number; recalls are fractions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from localign.files import replace_text
from localign.report.figures.drawing import to_csv
from localign.report.tables.measures import class_kinds
from localign.report.tables.rows import class_names, probe_runs

Results = Mapping[str, Any]
_RECALLS = (
    "backbone", "head", "task", "seed", "source", "protocol", "macro_recall", "macro_recall_low",
    "macro_recall_high", "macro_precision", "macro_f1", "accuracy",
)  # fmt: skip
_CLASSES = (
    "backbone", "head", "task", "seed", "source", "class_id", "class", "kind", "positives", "recall",
    "precision", "f1",
)  # fmt: skip
_SIZES = ("backbone", "head", "task", "seed", "source", "share_low", "share_high", "positives", "recall")


def write_csv(results: Results, folder: Path) -> list[Path]:
    """Write ``recalls.csv``, ``classes.csv`` and ``sizes.csv``, those that have lines; returns their paths."""
    names, kinds = class_names(results), class_kinds(results)
    recalls: list[tuple[Any, ...]] = []
    classes: list[tuple[Any, ...]] = []
    sizes: list[tuple[Any, ...]] = []
    for start, outcome, cell in _cells(results):
        low, high = cell.get("macro_recall_interval") or (None, None)
        figures = (cell.get(k) for k in ("macro_precision", "macro_f1", "accuracy"))
        recalls.append((*start, outcome.get("protocol"), cell.get("macro_recall"), low, high, *figures))
        lists = [cell.get(f"class_{k}") or [] for k in ("positives", "recall", "precision", "f1")]
        # The majority label of maps that say several things of a pixel is a code, not a class.
        coded = len(lists[1]) != len(names)
        for i in range(len(lists[1])):
            named = (f"code {i}", None) if coded else (names[i], kinds[i] if kinds else None)
            classes.append((*start, i, *named, *(v[i] if i < len(v) else None for v in lists)))
        shares = cell.get("size_recall") or []
        for b, recall in enumerate(shares):
            counts = cell.get("size_positives") or [None] * len(shares)
            sizes.append((*start, b / len(shares), (b + 1) / len(shares), counts[b], recall))
    files = (("recalls", _RECALLS, recalls), ("classes", _CLASSES, classes), ("sizes", _SIZES, sizes))
    paths = []
    for name, header, rows in files:
        if rows:
            paths.append(folder / f"{name}.csv")
            replace_text(paths[-1], to_csv(header, rows))
    return paths


def _cells(results: Results) -> Iterator[tuple[tuple[Any, ...], Mapping[str, Any], Mapping[str, Any]]]:
    """(backbone, head, task, seed, source), outcome and figures of everything measured."""
    for backbone, outcomes in probe_runs(results).items():
        for i, outcome in enumerate(outcomes):
            for source, heads in outcome.get("results", {}).items():
                for head, tasks in heads.items():
                    for task, cell in tasks.items():
                        yield (backbone, head, task, outcome.get("seed", i), source), outcome, cell
