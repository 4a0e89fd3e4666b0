"""Training of all probing heads in one pass, against one run per head that computes features at every step."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.config import ProbingConfig
from benchmarks.plain import plain_run
from localign.backbones import create_backbone
from localign.bench.show import show, timing_table, write_measurements
from localign.bench.timing import Timing, hardware, timed
from localign.engine.distributed import choose_device
from localign.engine.log import say
from localign.options.names import EMBEDDED, Cache
from localign.probing import HeadSpec, LabelledSource, ProbeConfig, probe
from localign.probing.datasets import labelled_scenes
from localign.results import ProbeOutcome

IMAGES, EPOCHS, REPEATS = 600, 5.0, 1
NOISE_SEEDS = 3
"""Number of seeds for the scatter, to which differences are compared."""
PLAIN, SEPARATE = "plain runs", "runs of the suite"
WAYS: dict[str, Cache] = {
    "one pass, no cache": "none",
    "one pass, in memory": "device",
    "one pass, on the disk": "disk",
}
"""Modes of the one pass: name -> cache."""

Recalls = dict[HeadSpec, float | None]


@dataclass(frozen=True)
class ProbeJob:
    """One timed run."""

    way: str
    name: str
    """Name of the run, unique for its way."""
    run: Callable[[], Recalls]


def run_bench_probe(config: ProbingConfig) -> None:
    """Run the benchmark, write its JSON file, and print its tables."""
    content = write_measurements(config, bench_probe(config))
    show(probe_tables(content), config)


def bench_probe(config: ProbingConfig) -> dict[str, Any]:
    """Time one run per head and task, in a plain script and in the suite without a cache, and one pass in each mode.

    Every run draws its scenes, as a separate command would. With repeats, the runs take turns, and the fastest time
    of each run counts.

    Raises:
        UserError: The backbone is unknown.
    """
    device = choose_device(config.device)
    options: dict[str, Any] = {} if config.weights is None else {"weights": config.weights}
    backbone = create_backbone(config.backbone or EMBEDDED, **options)
    backbone.to(device)
    train, test = config.images or IMAGES, max(1, (config.images or IMAGES) // 4)
    suite = ProbeConfig(seed=config.seed, epochs=config.epochs or EPOCHS, curve_images=0, cache="none")

    def sources() -> tuple[LabelledSource, LabelledSource]:
        return labelled_scenes("train", train), labelled_scenes("test", test)

    def plain(spec: HeadSpec) -> Recalls:
        return {spec: plain_run(backbone, *sources(), spec, suite, device)}

    def run_suite(probe_config: ProbeConfig) -> list[Recalls]:
        with tempfile.TemporaryDirectory() as folder:
            outcomes = probe(backbone, *sources(), probe_config, device=device, cache_folder=Path(folder))
        return [{spec: _recall(outcome, spec) for spec in probe_config.specs()} for outcome in outcomes]

    def jobs() -> Iterator[ProbeJob]:
        for spec in suite.specs():
            name, alone = f"{spec.label}, {spec.task}", replace(suite, heads=(spec.head,), tasks=(spec.task,))
            yield ProbeJob(PLAIN, name, partial(plain, spec))
            yield ProbeJob(SEPARATE, name, lambda alone=alone: run_suite(alone)[0])  # type: ignore[misc]
        for way, cache in WAYS.items():
            together = replace(suite, cache=cache)
            yield ProbeJob(way, "all", lambda together=together: run_suite(together)[0])  # type: ignore[misc]

    run_suite(replace(suite, steps=1))  # warm-up
    recalls: dict[str, Recalls] = {}
    timings: dict[tuple[str, str], list[Timing]] = {}
    for _ in range(config.repeats or REPEATS):
        for job in jobs():
            say(f"{job.way}: {job.name}")
            measured, timing = timed(job.run, device)
            recalls.setdefault(job.way, {}).update(measured)
            timings.setdefault((job.way, job.name), []).append(timing)
    say(f"{NOISE_SEEDS} seeds, for the scatter over seeds")
    seeds = run_suite(replace(suite, cache="device", seeds=NOISE_SEEDS))
    costs = {
        way: Timing.total(Timing.best(t) for (w, _), t in timings.items() if w == way) for way in recalls
    }
    return {
        "backbone": backbone.name,
        "images": {"train": train, "test": test},
        "steps": suite.resolved(train)[0],
        "hardware": hardware(device),
        "ways": [{"way": way, **_cost(cost, costs)} for way, cost in costs.items()],
        "recalls": [
            {
                "head": spec.label,
                "task": spec.task,
                **{way: by_spec[spec] for way, by_spec in recalls.items()},
                "scatter": _deviation(seed[spec] for seed in seeds),
            }
            for spec in suite.specs()
        ],
    }


def _recall(outcome: ProbeOutcome, spec: HeadSpec) -> float | None:
    return outcome["results"]["val"][spec.label][spec.task]["macro_recall"]


def _deviation(recalls: Iterable[float | None]) -> float | None:
    known = [recall for recall in recalls if recall is not None]
    return statistics.stdev(known) if len(known) > 1 else None


def _cost(cost: Timing, costs: dict[str, Timing]) -> dict[str, Any]:
    """Seconds, and the ratio to the seconds of both kinds of separate runs."""
    cheaper = {way: asdict(costs[way].over(cost)) for way in (PLAIN, SEPARATE)}
    return {"seconds": asdict(cost), "times_cheaper": cheaper}


def probe_tables(content: dict[str, Any]) -> list[Table]:
    """Tables of the cost of each way, and of the recalls, which should agree."""
    images = content["images"]
    title = f"6 heads on {content['backbone']}, {content['steps']} steps on {images['train']} scenes"
    numbers = ("wall, s", "CPU, s", f"times cheaper than {PLAIN}", f"than {SEPARATE}")
    costs = timing_table(title, content, ("way",), numbers)
    for row in content["ways"]:
        seconds, cheaper = row["seconds"], row["times_cheaper"]
        ratios = [f"{cheaper[way]['wall']:.2f} (CPU {cheaper[way]['cpu']:.2f})" for way in (PLAIN, SEPARATE)]
        costs.add_row(row["way"], f"{seconds['wall']:.1f}", f"{seconds['cpu']:.1f}", *ratios)
    ways = [name for name in content["recalls"][0] if name not in ("head", "task", "scatter")]
    recalls = Table(
        title=f"Macro recall, %, on {images['test']} scenes",
        caption="scatter: standard deviation over seeds, in points",
    )
    for i, name in enumerate(("head", "task", *ways, "largest difference", "scatter")):
        recalls.add_column(name, justify="left" if i < 2 else "right")
    for row in content["recalls"]:
        values = [row[way] for way in ways]
        known = None not in values
        recalls.add_row(
            row["head"],
            row["task"],
            *(_percent(v) for v in values),
            _percent(max(values) - min(values) if known else None),
            _percent(row["scatter"]),
        )
    return [costs, recalls]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"
