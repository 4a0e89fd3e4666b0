"""All heads in one pass, against a run for each that makes its features at every step."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from localign.api import load
from localign.backbones import EMBEDDED, Backbone
from localign.bench.config import BenchConfig
from localign.bench.timing import Timing, hardware, timed
from localign.engine.distributed import choose_device
from localign.engine.log import say
from localign.probing import HeadSpec, ProbeConfig, probe
from localign.probing.datasets import labelled_scenes
from localign.probing.training import Cache

IMAGES, EPOCHS, REPEATS = 600, 5.0, 1
NOISE_SEEDS = 3
"""Seeds behind the scatter that differences are held against."""
SEPARATE = "separate runs"
WAYS: dict[str, Cache] = {"no cache": "none", "in memory": "device", "on the disk": "disk"}
"""Of the one pass: name -> cache."""

Outcome = dict[str, Any]
Job = tuple[str, HeadSpec | None]
"""A way, and of a separate run its head."""


def bench_probe(config: BenchConfig) -> dict[str, Any]:
    """Time separate runs, one for each head and task, and one pass with features in each mode.

    Every run draws its scenes, as a command of its own would. All are the same code: a separate run is one
    head without a cache. With repeats, the runs take turns and the best time of each counts.

    Raises:
        UserError: an unknown backbone.
    """
    device = choose_device(config.device)
    options: dict[str, Any] = {} if config.weights is None else {"weights": config.weights}
    backbone = load(config.backbone or EMBEDDED, **options)
    assert isinstance(backbone, Backbone)
    backbone.to(device)
    train, test = config.images or IMAGES, max(1, (config.images or IMAGES) // 4)
    suite = ProbeConfig(seed=config.seed, epochs=config.epochs or EPOCHS, curve_images=0, cache="none")

    def run(probe_config: ProbeConfig) -> list[Outcome]:
        with tempfile.TemporaryDirectory() as folder:
            sources = labelled_scenes("train", train), labelled_scenes("test", test)
            return probe(backbone, *sources, probe_config, device=device, cache_folder=Path(folder))

    run(replace(suite, steps=1))  # what only a first run pays
    jobs: dict[Job, ProbeConfig] = {
        (SEPARATE, spec): replace(suite, heads=(spec.head,), tasks=(spec.task,)) for spec in suite.specs()
    }
    for way, cache in WAYS.items():
        jobs[way, None] = replace(suite, cache=cache)
    outcomes: dict[Job, Outcome] = {}
    timings: dict[Job, list[Timing]] = {job: [] for job in jobs}
    for repeat in range(config.repeats or REPEATS):
        for job, probe_config in jobs.items():
            way, spec = job
            name = way if spec is None else f"{way}, {spec.label}, {spec.task}"
            say(f"{name}{f', repeat {repeat + 1}' if config.repeats else ''}")
            ((outcomes[job],), timing) = timed(lambda c=probe_config: run(c), device)  # type: ignore[misc]
            timings[job].append(timing)
    say(f"{NOISE_SEEDS} seeds, for the scatter over seeds")
    seeds = run(replace(suite, cache="device", seeds=NOISE_SEEDS))
    costs = {
        w: Timing.total(Timing.best(timings[job]) for job in jobs if job[0] == w) for w in (SEPARATE, *WAYS)
    }
    return {
        "backbone": backbone.name,
        "images": {"train": train, "test": test},
        "steps": suite.resolved(train)[0],
        "hardware": hardware(device),
        "ways": [_row(way, cost, costs[SEPARATE]) for way, cost in costs.items()],
        "recalls": [
            {
                "head": spec.label,
                "task": spec.task,
                **{way: _recall(outcomes[way, spec if way == SEPARATE else None], spec) for way in costs},
                "scatter": _deviation(_recall(outcome, spec) for outcome in seeds),
            }
            for spec in suite.specs()
        ],
    }


def _recall(outcome: Outcome, spec: HeadSpec) -> float | None:
    return outcome["results"]["val"][spec.label][spec.task]["macro_recall"]


def _deviation(recalls: Iterable[float | None]) -> float | None:
    known = [recall for recall in recalls if recall is not None]
    return statistics.stdev(known) if len(known) > 1 else None


def _row(way: str, cost: Timing, separate: Timing) -> dict[str, Any]:
    return {
        "way": way if way == SEPARATE else f"one pass, {way}",
        "times_cheaper": separate.wall / cost.wall,
        "times_cheaper_cpu": separate.cpu / cost.cpu,
        "seconds": asdict(cost),
    }
