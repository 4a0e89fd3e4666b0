"""Options of `localign probe`, and of probing from Python."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from localign.errors import UserError, did_you_mean
from localign.options.names import HEAD_NAMES, INTERVENTIONS, TASKS, Cache, ImageSize, Precision, Protocol

MAX_STEPS = 20_000
"""The published length on COCO-Stuff is 18,482 steps."""
CacheDtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class HeadSpec:
    """One head to train."""

    head: str
    """``linear``, ``mlp`` or ``transformer``."""
    task: str
    """``local``, ``global`` or ``majority``."""
    intervention: str = "none"
    """``none``, ``cls-only`` or ``anonymous``; the latter two for transformer heads on ``local`` and ``majority``."""

    @property
    def label(self) -> str:
        """The head's name in results, ``transformer`` or ``transformer-anonymous``."""
        return self.head if self.intervention == "none" else f"{self.head}-{self.intervention}"

    def check(self) -> None:
        """Check the names.

        Raises:
            UserError: A name is unknown, or the intervention does not apply to the head or task.
        """
        for kind, value, known in (
            ("probing head", self.head, HEAD_NAMES),
            ("probing task", self.task, TASKS),
            ("intervention", self.intervention, INTERVENTIONS),
        ):
            if value not in known:
                hint = did_you_mean(value, known)
                raise UserError(f"unknown {kind} {value!r}; known: {', '.join(known)}{hint}")
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
    """Heads to train on frozen features, and their training. The defaults are the published settings."""

    heads: tuple[str, ...] = ("transformer", "mlp", "linear")
    """Names of heads, with an intervention appended as in ``transformer-cls-only``."""
    tasks: tuple[str, ...] = ("local", "global")
    """``local`` (classes in a patch), ``global`` (classes in an image), ``majority`` (main class of a patch)."""
    seed: int = 0
    """First seed. The seed decides the initial weights of the heads."""
    seeds: int = 1
    """Number of seeds, ``seed`` to ``seed + seeds - 1``, all trained in one pass."""
    epochs: float = 5.0
    """Passes over the training images; ignored if ``steps`` is given."""
    steps: int | None = None
    """Optimiser steps; default: from ``epochs``."""
    until_converged: bool = False
    """Instead of a fixed length, train each head until its loss on a held-out fifth of the training images has stopped
    falling, and report the weights that had the lowest loss there; ``epochs`` and ``steps`` are ignored."""
    max_steps: int = MAX_STEPS
    """Optimiser steps after which a head that has not converged is stopped, with ``until_converged``."""
    batch: int = 32
    """Images per optimiser step, over all ranks."""
    lr: float = 1e-3
    """Peak learning rate."""
    final_lr: float = 1e-4
    """Learning rate at the last step."""
    warmup_steps: int | None = None
    """Optimiser steps of linear warm-up; default: 500, or a tenth of all steps if that is less. With
    ``until_converged``: one epoch, at least 50 and at most 500 steps."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on all parameters."""
    protocol: Protocol = "fixed"
    """``fixed``: report the heads after the last step. ``published``: evaluate every epoch on the reported images and
    report each head's best epoch by macro recall, which is optimistic."""
    precision: Precision = "auto"
    """``fp32``, ``bf16`` (autocast), or ``auto``: bf16 on CUDA, fp32 elsewhere."""
    cache: Cache = "auto"
    """Storage of features: ``none`` (a forward pass at every step), ``disk``, ``device`` (in memory), or ``auto``: in
    memory if they need at most half of the free memory, else on disk."""
    cache_dtype: str = "bfloat16"
    """Dtype of stored features: ``float32``, ``float16`` or ``bfloat16``."""
    extract_batch: int = 32
    """Images per forward pass of the backbone and of the evaluation."""
    workers: int = 0
    """Loader processes per rank; 0 loads in the main process."""
    curve_images: int = 512
    """Images for each point of the validation-loss curve, which tells whether heads have converged; 0 for no curve.
    With ``until_converged``, the most training images to hold out."""

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
            ("max_steps", 1),
            ("curve_images", 0),
            ("workers", 0),
        ):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.epochs <= 0 or (self.steps is not None and self.steps < 1):
            raise UserError("probing needs at least one step: epochs > 0 and steps >= 1")
        if self.until_converged and self.protocol == "published":
            raise UserError("the published protocol has a fixed length; give it epochs or steps")
        if not 0 < self.final_lr <= self.lr:
            raise UserError(f"learning rates must satisfy 0 < final_lr <= lr, got {self.final_lr}, {self.lr}")
        self.specs()

    @property
    def all_seeds(self) -> range:
        """The seeds of the heads."""
        return range(self.seed, self.seed + self.seeds)

    def specs(self) -> tuple[HeadSpec, ...]:
        """Every head on every task; interventions only on tasks with one prediction per patch."""
        specs = []
        for name in self.heads:
            head, _, intervention = name.partition("-")
            for task in self.tasks:
                if intervention and task == "global":
                    continue
                specs.append(HeadSpec(head, task, intervention or "none"))
        for spec in specs:
            spec.check()  # a misspelt name must fail before hours of feature extraction
        if not specs or len(set(specs)) != len(specs):
            raise UserError(f"probing needs heads and tasks, each once: {self.heads}, {self.tasks}")
        return tuple(specs)

    def resolved(self, images: int) -> tuple[int, int]:
        """Steps, with ``until_converged`` the most steps, and warm-up steps for a number of training images.

        Raises:
            UserError: The warm-up is as long as the training.
        """
        steps, warmup = self.steps or max(1, int(self.epochs * images) // self.batch), 500
        if self.until_converged:
            steps, warmup = self.max_steps, min(500, max(50, images // self.batch))
        warmup = min(warmup, steps // 10) if self.warmup_steps is None else self.warmup_steps
        if not 0 <= warmup < steps:
            raise UserError(f"warm-up of {warmup} steps must be shorter than the training of {steps} steps")
        return steps, warmup

    def epoch_ends(self, images: int) -> dict[int, int]:
        """Last step of each epoch -> number of the epoch, both from 1. The last epoch may be incomplete."""
        steps, _ = self.resolved(images)
        epochs = -(-steps * self.batch // images)
        return {min(steps, -(-epoch * images // self.batch)): epoch for epoch in range(1, epochs + 1)}


@dataclass(frozen=True, kw_only=True)
class ProbeCommandConfig:
    """Train small heads on frozen features and measure patch-level and image-level recall (section 4)."""

    GROUPS: ClassVar[Mapping[str, str]] = {
        "Model": "backbone layer weights image_size max_patches model_kwargs",
        "Data": "data train_scenes test_scenes things_only ignore",
        "Heads": "heads tasks protocol seeds",
        "Optimisation": "epochs steps max_steps batch_size lr",
        "Features": "cache cache_dir cache_dtype",
        "Run": "out device precision seed workers",
    }

    backbone: str = "scenes-vit"
    """Backbones to probe, separated by commas: names, run or export folders, or folders or Hub repositories of
    transformers or timm. NAME=path sets the name in results. The other backbones are compared with the first."""
    layer: int = -1
    """Block whose tokens are probed, counted from 0, or from the end if negative. -1 is the last block, after the final
    norm. Any other block is read without the norm, as -2 by a vision-language baseline."""
    data: str = "scenes"
    """scenes, or a folder of labelled images: the layout of COCO-Stuff or ADE20k, or classes.json with images/ and
    masks/ (each with train and val)."""
    things_only: bool = False
    """COCO-Stuff only: treat stuff as unlabeled."""
    ignore: int | None = None
    """Value of label map pixels that belong to no class and count nowhere; default: the key "ignore" of classes.json,
    else 255 if that is not a class."""
    out: str = "runs/probe"
    """Folder for results.json, tables, figures and report.html."""
    heads: tuple[str, ...] = ("transformer", "mlp", "linear")
    """Heads to train: transformer, mlp, linear, transformer-cls-only, transformer-anonymous."""
    tasks: tuple[str, ...] = ("local", "global")
    """local (classes in a patch), global (classes in an image), majority (main class of a patch)."""
    seed: int = 0
    """First seed. The seed decides the initial weights of the heads, not the order of the samples."""
    seeds: int = 1
    """Number of seeds, all trained in one pass."""
    protocol: Protocol = "fixed"
    """fixed: choose nothing on the reported images. published: report each head's best epoch, chosen on the reported
    images, which is optimistic."""
    epochs: float | None = None
    """Passes over the training images; default: train each head until its loss on a held-out fifth of the training
    images stops falling, and report its weights with the lowest such loss. With --protocol published, 5."""
    steps: int | None = None
    """Optimizer steps, instead of --epochs."""
    max_steps: int | None = None
    """Optimizer steps after which a head that has not converged is stopped, without --epochs and --steps; default
    20000."""
    batch_size: int = 32
    """Images per step, over all ranks."""
    lr: float = 1e-3
    """Peak learning rate. It falls to a tenth."""
    cache: Cache = "auto"
    """Storage of features: none (a forward pass at every step), disk, device (in memory), or auto: device if they need
    at most half of the free memory, else disk."""
    cache_dir: str | None = None
    """Folder of the disk cache, which later runs can reuse; default OUT/cache."""
    cache_dtype: CacheDtype = "bfloat16"
    """Dtype of stored features."""
    precision: Precision = "auto"
    """fp32, bf16 (autocast), or auto: bf16 on CUDA, fp32 elsewhere."""
    train_scenes: int | None = None
    """Scenes to train heads on; default 6000."""
    test_scenes: int | None = None
    """Scenes to report on; default 4000."""
    weights: str = "pretrained"
    """Weights of backbones given by name: pretrained, none (random), or a weight file."""
    image_size: ImageSize | None = None
    """Side of the input of all backbones in pixels, or HEIGHTxWIDTH; default each one's own. Positions are
    resampled."""
    max_patches: int | None = None
    """Native resolution: each image keeps its aspect ratio and is resized to at most this many patches; for the heads
    mlp and linear. Default one size for all images."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm's constructor for backbones given by name."""
    workers: int = 0
    """Loader processes per rank."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise UserError("--steps and --epochs contradict each other; give one")
        if self.max_steps is not None and not self.until_converged:
            given = "--steps" if self.steps else "--epochs" if self.epochs else "--protocol published"
            raise UserError(f"--max-steps has no effect with {given}, which trains for a fixed length")
        if self.cache_dir is not None and self.cache in ("none", "device"):
            raise UserError(f"--cache-dir has no effect with --cache {self.cache}")
        if self.data != "scenes" and (self.train_scenes is not None or self.test_scenes is not None):
            raise UserError("--train-scenes and --test-scenes apply to --data scenes only")
        if self.ignore is not None and self.data == "scenes":
            raise UserError("--ignore applies to folders of label maps only, not to --data scenes")
        if self.max_patches is not None and self.max_patches < 4:
            raise UserError(f"--max-patches must be at least 4, not {self.max_patches}")
        self.named_backbones()
        self.probe_config()

    @property
    def until_converged(self) -> bool:
        """Whether heads are trained until they have converged, and not for a fixed length."""
        return self.epochs is None and self.steps is None and self.protocol != "published"

    def named_backbones(self) -> dict[str, str]:
        """Name in results -> name or path to load, in the order given.

        Raises:
            UserError: A name is empty or used twice.
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
                raise UserError(f"two backbones have the name {name!r}; give other names with NAME=path")
            named[name] = source
        return named

    def probe_config(self) -> ProbeConfig:
        """The settings of the benchmark."""
        return ProbeConfig(
            heads=self.heads,
            tasks=self.tasks,
            seed=self.seed,
            seeds=self.seeds,
            protocol=self.protocol,
            steps=self.steps,
            epochs=self.epochs if self.epochs is not None else ProbeConfig.epochs,
            until_converged=self.until_converged,
            max_steps=MAX_STEPS if self.max_steps is None else self.max_steps,
            batch=self.batch_size,
            lr=self.lr,
            final_lr=self.lr / 10,
            cache=self.cache,
            cache_dtype=self.cache_dtype,
            precision=self.precision,
            workers=self.workers,
        )


def file_name(name: str) -> str:
    """A folder name for a backbone."""
    return re.sub(r"[^\w.-]+", "-", name)
