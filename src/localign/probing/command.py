"""`localign probe`: what one or more backbones know about patches and images."""

# Annotations stay types here: the command line is made from this module's config class.

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from localign.backbones import Backbone, open_backbone
from localign.engine import run_folder
from localign.engine.config import Precision
from localign.engine.distributed import DistributedContext, distributed_context
from localign.engine.log import Bar, Stopwatch, say
from localign.errors import UserError
from localign.pictures import save_predictions
from localign.probing import LabelledSource, ProbeConfig, Probed, Progress, probe_heads
from localign.probing.datasets import open_labelled
from localign.probing.training import Cache, Protocol
from localign.report import build_report
from localign.report.probing import write_probe_report
from localign.report.tables.measures import Measured, change, comparisons, estimate
from localign.report.tables.rows import measured
from localign.statistics.bootstrap import interval

TRAIN_SCENES, TEST_SCENES = 6000, 4000
SOURCE = "test"
"""What the images that heads are judged on are called in results."""


@dataclass(frozen=True, kw_only=True)
class ProbeCommandConfig:
    """Train small heads on frozen features and measure patch-level and image-level recall (section 4)."""

    backbone: str = "scenes-vit"
    """Backbones to probe, separated by commas: names, run folders or export folders, each maybe as NAME=path
    with the name it goes by in results; the first is what the others are compared with."""
    data: str = "scenes"
    """scenes, or a folder of labelled images: COCO-Stuff's or ADE20k's layout, or images/ and masks/ (each
    with train and val) and classes.json."""
    things_only: bool = False
    """Of COCO-Stuff: the things alone; stuff counts as unlabeled."""
    out: str = "runs/probe"
    """Folder for results.json, tables, figures and report.html."""
    heads: tuple[str, ...] = ("transformer", "mlp", "linear")
    """transformer, mlp, linear, and the interventions transformer-cls-only and transformer-anonymous."""
    tasks: tuple[str, ...] = ("local", "global")
    """local (classes of a patch), global (of the image), majority (of a patch's pixels)."""
    seed: int = 0
    """First seed; seeds decide how heads are initialised. All see the same samples in the same order."""
    seeds: int = 1
    """How many seeds, all trained in one pass."""
    protocol: Protocol = "fixed"
    """fixed: report what the last step left. published: report each head's best epoch on the reported images
    themselves, which flatters."""
    epochs: float | None = None
    """Passes over the training images; default 5."""
    steps: int | None = None
    """Optimizer steps, instead of epochs."""
    batch_size: int = 32
    """Images per step, over all ranks."""
    lr: float = 1e-3
    """Peak learning rate, falling to a tenth."""
    cache: Cache = "auto"
    """Features: none (a forward pass at every step), disk, device (in memory); auto: device where they take at
    most half of what is free, else disk."""
    cache_dir: str | None = None
    """Folder of the disk cache, used again by later runs; default OUT/cache."""
    cache_dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    """Type of stored features."""
    precision: Precision = "auto"
    """fp32, bf16 (autocast), or auto: bf16 on CUDA, fp32 elsewhere."""
    train_scenes: int | None = None
    """Of scenes: images to train heads on; default 6000."""
    test_scenes: int | None = None
    """Of scenes: images to measure on; default 4000."""
    weights: str = "pretrained"
    """Of names: pretrained, none (random), or a weight file."""
    image_size: int | None = None
    """Of names: side of the square input, pixels."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """Of names: further arguments of timm's constructor."""
    workers: int = 0
    """Loader processes per rank."""
    device: str = "auto"
    """Where features are made and heads trained: auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise UserError("--steps and --epochs contradict each other; give one")
        if self.cache_dir is not None and self.cache in ("none", "device"):
            raise UserError(f"--cache-dir has no effect with --cache {self.cache}")
        if self.data != "scenes" and (self.train_scenes is not None or self.test_scenes is not None):
            raise UserError("--train-scenes and --test-scenes go with --data scenes")
        self.named_backbones()
        self.probe_config()

    def named_backbones(self) -> dict[str, str]:
        """Name in results -> name or path to load, in order.

        Raises:
            UserError: an empty or repeated name.
        """
        named: dict[str, str] = {}
        for entry in self.backbone.split(","):
            name, equals, source = (part.strip() for part in entry.partition("="))
            source = source if equals else name
            if not name or not source:
                raise UserError(
                    f"--backbone takes names or NAME=path, separated by commas, not {self.backbone!r}"
                )
            if _file_name(name) in map(_file_name, named):
                raise UserError(f"two backbones go by the name {name!r}; give them names, as in NAME=path")
            named[name] = source
        return named

    def probe_config(self) -> ProbeConfig:
        """The part that is the benchmark's own."""
        return ProbeConfig(
            heads=self.heads,
            tasks=self.tasks,
            seed=self.seed,
            seeds=self.seeds,
            protocol=self.protocol,
            steps=self.steps,
            epochs=self.epochs if self.epochs is not None else ProbeConfig.epochs,
            batch=self.batch_size,
            lr=self.lr,
            final_lr=self.lr / 10,
            cache=self.cache,
            cache_dtype=self.cache_dtype,
            precision=self.precision,
            workers=self.workers,
        )


def _file_name(name: str) -> str:
    """A backbone's name as that of a folder."""
    return re.sub(r"[^\w.-]+", "-", name)


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
            cache_folder=cache / _file_name(name),
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
        bars[what].at(done, total)
        if total and done >= total:
            bars.pop(what).close()

    try:
        yield progress
    finally:
        for bar in bars.values():
            bar.close()
