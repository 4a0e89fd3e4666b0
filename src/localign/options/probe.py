"""Options of `localign probe`, and of probing from Python."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from localign.errors import UserError, did_you_mean
from localign.options.names import HEAD_NAMES, INTERVENTIONS, TASKS, Cache, Precision, Protocol

CacheDtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class HeadSpec:
    """One head to train."""

    head: str
    """``linear``, ``mlp`` or ``transformer``."""
    task: str
    """``local``, ``global`` or ``majority``."""
    intervention: str = "none"
    """``none``, ``cls-only`` or ``anonymous``; transformer heads with a prediction per patch only."""

    @property
    def label(self) -> str:
        """The head's name in results, ``transformer`` or ``transformer-anonymous``."""
        return self.head if self.intervention == "none" else f"{self.head}-{self.intervention}"

    def check(self) -> None:
        """Refuse what is no head.

        Raises:
            UserError: An unknown name, or an intervention where it has no meaning.
        """
        for kind, value, known in (
            ("probing head", self.head, HEAD_NAMES),
            ("probing task", self.task, TASKS),
            ("intervention", self.intervention, INTERVENTIONS),
        ):
            if value not in known:
                near = did_you_mean(value, known)
                raise UserError(f"unknown {kind} {value!r}; known: {', '.join(known)}{near}")
        if self.intervention != "none" and self.head != "transformer":
            raise UserError(
                f"the intervention {self.intervention!r} applies to the transformer head, not to {self.head}"
            )
        if self.intervention != "none" and self.task == "global":
            raise UserError(
                f"the intervention {self.intervention!r} predicts per patch; it has no global task"
            )


@dataclass(frozen=True)
class ProbeConfig:
    """What is trained on the frozen features, and how; the defaults are the published settings."""

    heads: tuple[str, ...] = ("transformer", "mlp", "linear")
    """Head names; an intervention is written behind its head, as in ``transformer-cls-only``."""
    tasks: tuple[str, ...] = ("local", "global")
    """``local`` (the classes in a patch), ``global`` (in the image), ``majority`` (of a patch's pixels)."""
    seed: int = 0
    """The first seed; seeds decide how heads are initialised."""
    seeds: int = 1
    """How many: ``seed`` .. ``seed + seeds - 1``, all in one pass."""
    epochs: float = 5.0
    """Passes over the training images; not used where ``steps`` is given."""
    steps: int | None = None
    """Optimiser steps; empty: as many as ``epochs`` asks for."""
    batch: int = 32
    """Images per optimiser step, over all ranks."""
    lr: float = 1e-3
    """Peak learning rate."""
    final_lr: float = 1e-4
    """Learning rate at the last step."""
    warmup_steps: int | None = None
    """Optimiser steps of linear warm-up; empty: 500, or a tenth of all steps where that is less."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on all parameters."""
    protocol: Protocol = "fixed"
    """``fixed``: report what the last step left. ``published``: judge every epoch on the reported images and
    report each head's best, by macro recall; which chooses on what it reports."""
    precision: Precision = "auto"
    """``fp32``, ``bf16`` (autocast), or ``auto``: bf16 on CUDA, fp32 elsewhere."""
    cache: Cache = "auto"
    """``none`` (a forward pass at every step), ``disk``, ``device`` (in memory), or ``auto``: in memory where
    it takes no more than half of what is free, else on the disk."""
    cache_dtype: str = "bfloat16"
    """How kept features are stored: ``float32``, ``float16`` or ``bfloat16``."""
    extract_batch: int = 32
    """Images per forward pass where no gradients are needed."""
    workers: int = 0
    """Processes that load images, per rank; 0 loads in the main process."""
    curve_images: int = 512
    """Images behind each point of the validation-loss curve; 0 draws none."""

    def __post_init__(self) -> None:
        choices = (
            ("precision", get_args(Precision)),
            ("protocol", get_args(Protocol)),
            ("cache", get_args(Cache)),
            ("cache_dtype", get_args(CacheDtype)),
        )
        for name, known in choices:
            if getattr(self, name) not in known:
                raise UserError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        for name, least in (
            ("batch", 1),
            ("extract_batch", 1),
            ("seeds", 1),
            ("curve_images", 0),
            ("workers", 0),
        ):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.epochs <= 0 or (self.steps is not None and self.steps < 1):
            raise UserError("probing needs at least one step: epochs > 0 and steps >= 1")
        if not 0 < self.final_lr <= self.lr:
            raise UserError(f"learning rates must satisfy 0 < final_lr <= lr, got {self.final_lr}, {self.lr}")
        self.specs()

    @property
    def all_seeds(self) -> range:
        """The seeds of the heads."""
        return range(self.seed, self.seed + self.seeds)

    def specs(self) -> tuple[HeadSpec, ...]:
        """All heads x tasks; an intervention only with tasks that predict per patch."""
        specs = []
        for name in self.heads:
            head, _, intervention = name.partition("-")
            for task in self.tasks:
                if intervention and task == "global":
                    continue
                specs.append(HeadSpec(head, task, intervention or "none"))
        for spec in specs:
            spec.check()  # a misspelt name fails here, before hours of feature extraction
        if not specs or len(set(specs)) != len(specs):
            raise UserError(f"probing needs heads and tasks, each once: {self.heads}, {self.tasks}")
        return tuple(specs)

    def resolved(self, images: int) -> tuple[int, int]:
        """(steps, warm-up steps) for a number of training images.

        Raises:
            UserError: the warm-up is as long as the training.
        """
        steps = self.steps or max(1, int(self.epochs * images) // self.batch)
        warmup = min(500, steps // 10) if self.warmup_steps is None else self.warmup_steps
        if not 0 <= warmup < steps:
            raise UserError(f"warm-up of {warmup} steps must be shorter than the training of {steps} steps")
        return steps, warmup

    def epoch_ends(self, images: int) -> dict[int, int]:
        """Step -> epoch, from 1, for the steps after which an epoch is over; the last may be cut short."""
        steps, _ = self.resolved(images)
        epochs = -(-steps * self.batch // images)
        return {min(steps, -(-epoch * images // self.batch)): epoch for epoch in range(1, epochs + 1)}


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
    cache_dtype: CacheDtype = "bfloat16"
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
            if file_name(name) in map(file_name, named):
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


def file_name(name: str) -> str:
    """A backbone's name as that of a folder."""
    return re.sub(r"[^\w.-]+", "-", name)
