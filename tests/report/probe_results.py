"""Made-up results of probing, with the types that commands write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localign.results import Metrics, ProbeOutcome, Results

HEADS = ("transformer", "mlp", "linear", "transformer-anonymous", "transformer-cls-only")
COST = dict(zip(HEADS, (0.0, 0.1, 0.2, 0.05, 0.15), strict=True))


def class_list(count: int) -> list[str]:
    """``count`` names; every third is long, and one has characters that LaTeX and Markdown treat specially."""
    names = [f"class {i}" + " of things with a rather long name" * (i % 3 == 0) for i in range(count)]
    return ["unlabeled", "50 % of_$ {a} & b | ^~#", *names[2:]]


def metrics(recall: float, classes: int, spread: NDArray[np.float64], interval: bool = True) -> Metrics:
    """Metrics of one head on one task; the last class has no positives, the last size bin is empty."""
    recalls = [float(v) for v in np.clip(recall + spread, 0.01, 0.99)]
    sizes = [float(np.clip(recall * (0.5 + 0.1 * b), 0, 1)) for b in range(9)]
    found: Metrics = {
        "macro_recall": recall,
        "macro_precision": 0.5,
        "macro_f1": 0.4,
        "accuracy": 0.9,
        "class_recall": [*recalls[:-1], None],
        "class_precision": [*recalls[:-1], None],
        "class_f1": [*recalls[:-1], None],
        "class_positives": [*(1000 - i for i in range(classes - 1)), 0],
        "size_recall": [*sizes, None],
        "size_positives": [*(10 ** (6 - b // 2) for b in range(9)), 0],
    }
    if interval:
        found["macro_recall_interval"] = [recall - 0.01, recall + 0.02]
    return found


def outcome(
    local: float,
    global_: float,
    *,
    seed: int = 0,
    classes: int = 10,
    heads: Sequence[str] = HEADS,
    interval: bool = True,
    backbone: str = "tiny",
) -> ProbeOutcome:
    """One backbone, one seed."""
    spread = np.random.default_rng([seed, round(1e6 * local)]).normal(0, 0.05, classes)
    results = {
        head: {
            task: metrics(recall - COST[head], classes, spread, interval)
            for task, recall in (("local", local), ("global", global_))
        }
        for head in heads
    }
    return {
        "backbone": backbone, "seed": seed, "protocol": "fixed", "classes": class_list(classes),
        "train": {"images": 9, "curve": []}, "results": {"test": results},
    }  # fmt: skip


def results(
    recalls: Mapping[str, tuple[float, float]],
    *,
    seeds: int = 1,
    classes: int = 10,
    kinds: bool = False,
    **options: Any,
) -> Results:
    """Results of backbones with these local and global recalls; each further seed is a point worse."""
    probe = {
        name: [
            outcome(local - 0.01 * s, global_ - 0.01 * s, seed=s, classes=classes, **options)
            for s in range(seeds)
        ]
        for name, (local, global_) in recalls.items()
    }
    half = (classes - 1) // 2
    return {
        "command": "probe",
        "config": {},
        "classes": class_list(classes),
        "class_kinds": ["other", *["thing"] * half, *["stuff"] * (classes - 1 - half)] if kinds else None,
        "probe": probe,
        "differences": [],
        "notes": [],
    }


def twenty_pairs() -> dict[str, tuple[float, float]]:
    """Ten backbones with long names before and after alignment."""
    found = {}
    for i in range(10):
        name = f"some/folder/with/a/long/path/backbone-{i}-vit-large-patch14-384px"
        found[f"{name}-baseline"] = (0.3 + 0.015 * i, 0.45 + 0.01 * i)
        found[name] = (0.34 + 0.012 * i, 0.46 + 0.01 * i)
    return found


def pictures(names: Sequence[str], classes: Sequence[str], side: int = 4) -> dict[str, Any]:
    """Two images and predictions of these backbones on a grid of patches."""
    draw = np.random.default_rng(0)
    truth = draw.random((2, side * side, len(classes))) > 0.8
    truth[..., 1] = True
    return {
        "images": draw.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8),
        "grid": np.array([side, side]),
        "truth": truth,
        "class_names": np.array(list(classes)),
        **{f"probability_{n}": draw.random(truth.shape).astype(np.float16) for n in names},
    }
