"""`localign probe`: what one or more backbones know about patches and images."""

# Annotations stay types here: the command line is made from this module's config class.

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from localign.api import load
from localign.backbones import Backbone
from localign.data.drawn import DrawnScenes
from localign.engine import run as runs
from localign.engine.distributed import choose_device
from localign.engine.log import Bar, say
from localign.errors import UserError
from localign.probing import AttributeLabels, FolderSegmentation, LabelledSource, ProbeConfig, probe_heads


@dataclass(frozen=True, kw_only=True)
class ProbeCommandConfig:
    """Train small heads on frozen features and measure patch-level and image-level recall (section 4)."""

    backbone: str = "scenes-vit"
    """Backbones to probe, separated by commas: names, run folders or export folders."""
    data: str = "scenes"
    """scenes, or a folder with images/ and masks/ (each with train and val) and classes.json."""
    out: str = "runs/probe"
    """Folder for results.json."""
    heads: tuple[str, ...] = ("transformer", "linear")
    """transformer, mlp, linear."""
    tasks: tuple[str, ...] = ("local", "global")
    """local (classes of a patch), global (of the image), majority (of a patch's pixels)."""
    seed: int = 0
    """Seed of heads and sample order."""
    steps: int | None = None
    """Optimizer steps per head; default as many as epochs give."""
    epochs: float = 5.0
    """Passes over the training images."""
    batch_size: int = 32
    """Images per step."""
    lr: float = 1e-3
    """Peak learning rate, falling to a tenth."""
    train_scenes: int = 6000
    """Of scenes: images to train heads on."""
    test_scenes: int = 4000
    """Of scenes: images to measure on."""
    weights: str = "pretrained"
    """Of names: pretrained, none (random), or a weight file."""
    image_size: int | None = None
    """Of names: side of the square input, pixels."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """Of names: further arguments of timm's constructor."""
    workers: int = 0
    """Loader processes."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where features are made and heads trained."""

    def probe_config(self) -> ProbeConfig:
        """The part that is the benchmark's own."""
        return ProbeConfig(
            heads=self.heads,
            tasks=self.tasks,
            seed=self.seed,
            steps=self.steps,
            epochs=self.epochs,
            batch=self.batch_size,
            lr=self.lr,
            final_lr=self.lr / 10,
            workers=self.workers,
        )


def labelled_scenes(split: str, length: int) -> AttributeLabels:
    """Scenes with attribute labels: each shape, each colour, ground."""
    scenes = DrawnScenes(split=split, length=length)
    return AttributeLabels(scenes, scenes.config.attributes, scenes.config.attribute_table())


def labelled_folder(folder: Path, split: str) -> LabelledSource:
    """One split of a folder with ``images/<split>*``, ``masks/<split>*`` and ``classes.json``.

    Raises:
        UserError: The folder is not laid out like that.
    """
    found = sorted(folder.glob(f"images/{split}*"))
    if not found:
        raise UserError(f"{folder} has no images/{split}*; it needs images/, masks/ and classes.json")
    return FolderSegmentation(found[0], folder / "masks" / found[0].name, folder / "classes.json")


def probe_backbones(config: ProbeCommandConfig) -> list[Backbone]:
    """The backbones a command line names; options for names do not go with folders."""
    loaded = []
    for name in config.backbone.split(","):
        options: dict[str, Any] = {
            k: v
            for k, v in (
                ("weights", config.weights if config.weights != "pretrained" else None),
                ("image_size", config.image_size),
                ("model_kwargs", config.model_kwargs or None),
            )
            if v is not None
        }
        if Path(name).is_dir() and options:
            raise UserError(
                f"{name} is an exported backbone; --{next(iter(options)).replace('_', '-')} is for names"
            )
        backbone = load(name, **options)
        assert isinstance(backbone, Backbone)
        loaded.append(backbone)
    return loaded


def run_probe(config: ProbeCommandConfig) -> dict[str, Any]:
    """Probe every backbone and write ``results.json``."""
    probe_config = config.probe_config()
    device = choose_device(config.device)
    backbones = probe_backbones(config)
    train, test = _sources(config)
    results = []
    for name, backbone in zip(config.backbone.split(","), backbones, strict=True):
        say(f"probing {name}")
        outcome = probe_with_bar(backbone.to(device), train, {"test": test}, probe_config, str(device))[0]
        results.append({**outcome, "name": name})
        _print_recalls(name, outcome["results"]["test"])
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"command": "probe", "config": asdict(config), "versions": runs.provenance(), "probes": results}
    runs.save_config(folder, "probe", config)
    print(f"results    {runs.write_results(folder, content)}")
    return content


def probe_with_bar(
    backbone: Backbone,
    train: LabelledSource,
    sources: dict[str, LabelledSource],
    config: ProbeConfig,
    device: str,
) -> tuple[dict[str, Any], Any]:
    """:func:`localign.probing.probe_heads` with a progress bar on a terminal."""
    bars: dict[str, Bar] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in bars:
            bars[what] = Bar(what, total)
        bars[what].at(done, total)
        if total and done >= total:
            bars.pop(what).close()

    try:
        return probe_heads(backbone, train, sources, config, device=device, progress=progress)
    finally:
        for bar in bars.values():
            bar.close()


def _sources(config: ProbeCommandConfig) -> tuple[LabelledSource, LabelledSource]:
    if config.data == "scenes":
        return labelled_scenes("train", config.train_scenes), labelled_scenes("test", config.test_scenes)
    folder = Path(config.data)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    return labelled_folder(folder, "train"), labelled_folder(folder, "val")


def _print_recalls(name: str, results: dict[str, dict[str, dict[str, Any]]]) -> None:
    for head, tasks in results.items():
        for task, metrics in tasks.items():
            recall = metrics["macro_recall"]
            shown = "undefined" if recall is None or math.isnan(recall) else f"{100 * recall:.2f} %"
            print(f"{name:<30} {head:<12} {task:<9} macro recall {shown}")
