"""`localign probe`: what one or more backbones know about patches and images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from localign.backbones import Backbone, open_backbone
from localign.engine import run_folder
from localign.engine.distributed import DistributedContext, distributed_context
from localign.engine.log import Bar, Stopwatch, say
from localign.errors import UserError
from localign.options.probe import ProbeCommandConfig, file_name
from localign.pictures import save_predictions
from localign.probing import LabelledSource, ProbeConfig, Probed, Progress, probe_heads
from localign.probing.datasets import open_labelled
from localign.report import build_report
from localign.report.probing import write_probe_report
from localign.report.tables.measures import Measured, change, comparisons, estimate
from localign.report.tables.rows import measured
from localign.statistics.bootstrap import interval

TRAIN_SCENES, TEST_SCENES = 6000, 4000
SOURCE = "test"
"""What the images that heads are judged on are called in results."""


def load_backbones(config: ProbeCommandConfig) -> dict[str, Backbone]:
    """The backbones a command line names; options for names leave exported folders as they are.

    Raises:
        UserError: such an option where there are folders only.
    """
    options: dict[str, Any] = {
        k: v
        for k, v in (
            ("weights", config.weights if config.weights != "pretrained" else None),
            ("image_size", config.image_size),
            ("model_kwargs", config.model_kwargs or None),
        )
        if v is not None
    }
    named = config.named_backbones()
    if options and all(Path(source).is_dir() for source in named.values()):
        option = next(iter(options)).replace("_", "-")
        raise UserError(f"{next(iter(named.values()))} is an exported backbone; --{option} is for names")
    loaded = {}
    for name, source in named.items():
        loaded[name] = open_backbone(source, **({} if Path(source).is_dir() else options))
    return loaded


def run_probe(config: ProbeCommandConfig) -> None:
    """Probe every backbone; write results, pictures, tables, figures and the report."""
    with distributed_context(config.device) as context:
        probed = _probe_all(config, context)
    if not context.is_main:
        return
    Console().print(recall_table(probed))
    folder = Path(config.out)
    written = write_probe_report(folder)
    print(f"results    {folder / run_folder.RESULTS_FILE}, and {len(written)} tables and figures beside it")
    print(f"report     {build_report(folder)}")


def _probe_all(config: ProbeCommandConfig, context: DistributedContext) -> dict[str, Any]:
    """The content of ``results.json``, which is written with ``pictures.npz`` beside it."""
    clock = Stopwatch()
    probe_config = config.probe_config()
    backbones = load_backbones(config)
    train = open_labelled(
        config.data, "train", scenes=config.train_scenes or TRAIN_SCENES, things_only=config.things_only
    )
    test = open_labelled(
        config.data, "test", scenes=config.test_scenes or TEST_SCENES, things_only=config.things_only
    )
    folder = Path(config.out)
    cache = Path(config.cache_dir) if config.cache_dir is not None else folder / "cache"
    probed: dict[str, list[Probed]] = {}
    timings = {"data": clock.elapsed}
    for name, backbone in backbones.items():
        if context.is_main:
            say(f"probing {name}")
        before = clock.elapsed
        probed[name] = probe_with_bar(
            backbone.to(context.device),
            train,
            {SOURCE: test},
            probe_config,
            context,
            cache_folder=cache / file_name(name),
            replace_cache=config.cache_dir is None,
        )
        backbone.cpu()
        timings[name] = clock.elapsed - before
    timings["total"] = clock.elapsed
    outcomes = {name: [p.outcome for p in seeds] for name, seeds in probed.items()}
    first = next(iter(outcomes.values()))[0]
    content = {
        "command": "probe",
        "config": asdict(config),
        "versions": run_folder.provenance(),
        "classes": first["classes"],
        "class_kinds": first["class_kinds"],
        "protocol": first["protocol"],
        "timings": timings,
        "probe": outcomes,
    }
    content["differences"] = [
        entry
        for c in comparisons(content)
        for entry in differences(c.after, probed[c.after], c.before, probed[c.before])
    ]
    content["notes"] = _notes(config, first)
    if context.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        run_folder.save_config(folder, "probe", config)
        save_predictions(folder, backbones, probed, test)
        run_folder.write_results(folder, content)
    return content


def differences(name: str, ours: list[Probed], against: str, theirs: list[Probed]) -> list[dict[str, Any]]:
    """What one backbone gained over another: means over seeds, with paired bootstrap intervals over images."""
    found = []
    for source, spec in ours[0].recalls:
        sides = [
            [p.outcome["results"][source][spec.label][spec.task]["macro_recall"] for p in side]
            for side in (ours, theirs)
        ]
        replicates = [torch.stack([p.recalls[source, spec] for p in side]).mean(0) for side in (ours, theirs)]
        known = all(value is not None for side in sides for value in side)
        found.append(
            {
                "name": name,
                "against": against,
                "head": spec.label,
                "task": spec.task,
                "source": source,
                "difference": float(np.mean(sides[0]) - np.mean(sides[1])) if known else None,
                "interval": interval(replicates[0] - replicates[1]),
            }
        )
    return found


def _notes(config: ProbeCommandConfig, outcome: Mapping[str, Any]) -> list[str]:
    images = outcome["sources"]
    steps = outcome["config"]["steps"]
    chosen = {
        "fixed": f"Figures are of the heads as the last of {steps} steps left them; nothing was chosen on them.",
        "published": f"Of every head the best epoch of {steps} steps is reported, chosen on the images that are "
        "reported, as the published benchmark does: such figures flatter.",
    }
    return [
        f"Heads are trained on {images['train']['images']} images of {config.data} and judged on "
        f"{images[SOURCE]['images']}, with frozen backbones in eval mode.",
        chosen[config.protocol],
        "Intervals are 95 % percentile intervals of 1000 bootstrap replicates over images; differences are paired.",
        f"Seeds {config.seed} to {config.seed + config.seeds - 1} differ in how heads are initialised; the order of "
        "the samples is the same for all."
        if config.seeds > 1
        else f"One seed ({config.seed}).",
    ]


def recall_table(content: Mapping[str, Any]) -> Table:
    """Macro recall of every backbone, head and task with its interval, and the gain over what it is held against."""
    pairs = {c.after: c.before for c in comparisons(content)}
    seeds = max(len(side) for side in content["probe"].values())
    table = Table(
        title="Macro recall, %",
        caption=f"in brackets 95 % intervals over images; {content['protocol']} protocol; "
        f"{seeds} seed{'s' if seeds > 1 else ''}",
    )
    for i, column in enumerate(("backbone", "head", "task", "recall", *(["difference"] if pairs else []))):
        table.add_column(column, justify="left" if i < 3 else "right", no_wrap=i > 0)
    for name, outcomes in content["probe"].items():
        for source, task, head in measured({name: outcomes}):
            what = Measured(source, head, task)
            row = [name, head, task, _percent(estimate(outcomes, what))]
            if name in pairs:
                row.append(_percent(change(content, pairs[name], name, what), "+"))
            table.add_row(*row)
        table.add_section()
    return table


def _percent(found: Any, sign: str = "") -> str:
    if found is None:
        return "undefined"
    bounds = found.interval
    shown = f"{100 * found.value:{sign}.1f}"
    return shown if bounds is None else f"{shown} [{100 * bounds[0]:{sign}.1f}, {100 * bounds[1]:{sign}.1f}]"


def probe_with_bar(
    backbone: Backbone,
    train: LabelledSource,
    sources: dict[str, LabelledSource],
    config: ProbeConfig,
    context: DistributedContext,
    **options: Any,
) -> list[Probed]:
    """:func:`localign.probing.probe_heads` with a progress bar on the main rank's terminal."""
    with progress_bars() as progress:
        shown = progress if context.is_main else None
        return probe_heads(backbone, train, sources, config, context=context, progress=shown, **options)


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A bar for whatever is being done."""
    bars: dict[str, Bar] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in bars:
            bars[what] = Bar(what, total)
        bars[what].update(done, total)
        if total and done >= total:
            bars.pop(what).close()

    try:
        yield progress
    finally:
        for bar in bars.values():
            bar.close()
