"""All benchmarks by name."""

from __future__ import annotations

import importlib

from localign.errors import UserError, did_you_mean
from localign.vlm.scoring.base import Benchmark
from localign.vlm.scoring.boxes import BoxFrame
from localign.vlm.scoring.referring import Referring

BENCHMARKS = {
    "refcoco": "refcoco.RefCOCO",
    "ocid-ref": "ocid_ref.OCIDRef",
    "tallyqa": "tallyqa.TallyQA",
    "vsr": "vsr.VSR",
    "ai2d": "ai2d.AI2D",
    "textvqa": "textvqa.TextVQA",
    "textvqa-ocr": "textvqa.TextVQAWithOCR",
    "vqav2": "vqav2.VQAv2",
    "vizwiz": "vizwiz.VizWiz",
    "pope": "pope.POPE",
    "gqa": "gqa.GQA",
    "scenes": "scenes.Scenes",
}
"""Name to module of this folder and class. A module is imported when its benchmark is used."""


def benchmark_class(name: str) -> type[Benchmark]:
    """The class of a benchmark.

    Raises:
        UserError: There is no benchmark of this name.
    """
    if name not in BENCHMARKS:
        raise UserError(
            f"unknown benchmark {name!r}; known: {', '.join(BENCHMARKS)}{did_you_mean(name, BENCHMARKS)}"
        )
    module, class_name = BENCHMARKS[name].split(".")
    found: type[Benchmark] = getattr(importlib.import_module(f"localign.vlm.benchmarks.{module}"), class_name)
    return found


def benchmark(name: str, scoring: str | None = None, frame: BoxFrame | None = None) -> Benchmark:
    """Create a benchmark.

    Args:
        name: One of ``BENCHMARKS``.
        scoring: One of the benchmark's :attr:`~localign.vlm.scoring.base.Benchmark.scorings`; default its first.
        frame: The frame that answers with boxes must be in; default the frame that each answer declares. Benchmarks
            without boxes ignore it.

    Raises:
        UserError: There is no such benchmark or scoring.
    """
    found = benchmark_class(name)
    return found(scoring, frame) if issubclass(found, Referring) else found(scoring)
