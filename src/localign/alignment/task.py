"""Locality alignment as a task of the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from localign import rng
from localign.alignment.export import export_student
from localign.alignment.objectives.base import MaskedObjective
from localign.alignment.setup import build_objective, build_teacher, fresh_student, starting_backbone
from localign.alignment.student import Student
from localign.backbones import Backbone
from localign.backbones.attention import fuse_attention
from localign.backbones.export import content_hash
from localign.backbones.monitor import attention_logit_stats
from localign.data.images import ImageData
from localign.data.loader import Batch
from localign.engine.distributed import DistributedContext, choose_device
from localign.engine.log import say
from localign.engine.task import BatchPlan, StepResult, Task
from localign.options.align import AlignConfig

MONITOR_IMAGES = 4
_SCALE_CHUNK = 32


class AlignTask(Task):
    """Train a student to reproduce the frozen teacher's outputs for views of images, as the objective defines.

    Args:
        config: Backbone, objective, masks, target, loss, data.
        backbone: The pre-trained model; default: built from the config.

    Raises:
        UserError: The device, backbone or data does not exist, or the options do not fit the backbone.
    """

    def __init__(self, config: AlignConfig, backbone: Backbone | None = None) -> None:
        self.config = config
        self.seed = config.seed
        self.device = torch.device("cpu")
        choose_device(config.device)  # refuse a misspelt device before reading weights
        backbone = backbone or starting_backbone(config)
        self.teacher = build_teacher(config, backbone)
        self.objective = build_objective(config, self.teacher)
        self.data = self._open(backbone)
        self.normalise = backbone.normalise
        self.student = fresh_student(config, backbone, self.teacher.backbone.width)
        self.start_hash = content_hash(backbone.vit.state_dict())
        same = self.teacher.backbone is backbone
        self.teacher_hash = self.start_hash if same else content_hash(self.teacher.backbone.vit.state_dict())

    def _open(self, backbone: Backbone) -> ImageData:
        return ImageData(self.config, backbone.image_size, backbone.preprocessing)

    @property
    def module(self) -> Student:
        return self.student

    def samples(self) -> int:
        return len(self.data.source)

    def fingerprint(self) -> dict[str, str]:
        facts = {"data": self.data.source.fingerprint(), "starting weights": self.start_hash[:16]}
        return facts if self.config.teacher is None else {**facts, "teacher": self.teacher_hash[:16]}

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.teacher.to(device)
        self.teacher.prepare(device)
        fuse_attention(self.student, device)

    def data_files(self) -> Iterator[tuple[str, str]]:
        return self.data.data_files()

    @property
    def micro_batch_multiple(self) -> int:
        return self.data.micro_batch_multiple

    def batches(self, plan: BatchPlan) -> Iterator[Batch]:
        return self.data.train_batches(plan, self._drawing())

    def _drawing(self) -> Callable[[Batch], Tensor]:
        """Draws the objective's views of a batch; see :meth:`views`."""
        return partial(_drawn, self.objective.drawing(), self.seed)

    def compile(self) -> None:
        self.student.compile()
        self.teacher.compile()

    def set_grad_checkpointing(self) -> None:
        self.student.set_grad_checkpointing(True)

    @torch.no_grad()
    def on_train_start(self, context: DistributedContext, plan: BatchPlan) -> None:
        """Estimate the target scale on the first training images. Every rank gets the same value."""
        if isinstance(self.objective, MaskedObjective) and self.config.mask == "block" and context.is_main:
            grid = self.objective.grid
            share = self.objective.masks.visible_share(grid)
            say(
                f"block masks show {share:.0%} of the {grid[0]}x{grid[1]} patches on average; --keep-ratio "
                f"{self.config.keep_ratio} is the least that each shows"
            )
        if self.config.loss == "cosine":
            return  # the cosine does not depend on the scale
        count = self.config.scale_images
        steps = -(-count // _SCALE_CHUNK)
        alone = BatchPlan(self.seed, _SCALE_CHUNK, _SCALE_CHUNK, 0, 1, 0, 0, steps, False)
        self.teacher.scale.fill_(1.0)
        all_tokens, pooled = _Moments(), _Moments()
        for number, batch in enumerate(self.data.train_batches(alone)):
            images, views = self.views(batch)
            left = count - number * _SCALE_CHUNK
            target = self._counted_target(images[:left], views[:left])
            all_tokens.add(self.objective.scaled(target).reshape(-1, 1))
            if self.teacher.with_pooled:
                pooled.add(target[:, 0])
        self.teacher.scale.fill_(all_tokens.spread())
        if self.teacher.with_pooled:
            self.teacher.pooled_scale.fill_(pooled.spread() / float(self.teacher.scale))

    def _counted_target(self, images: Any, views: Tensor) -> Tensor:
        """The target, without tokens of padding."""
        return self.objective.target(images, views)

    def views(self, batch: Batch, purpose_seed: int | None = None) -> tuple[Any, Tensor]:
        """The normalised images of a batch and the objective's views, on the device.

        Args:
            batch: uint8 images and their positions.
            purpose_seed: Seed of the views instead of the run's seed; also turns off Mixup and CutMix.
        """
        images = batch.images.to(self.device)
        if self.data.mixing is not None and purpose_seed is None:
            images = self.data.mixing(images, batch.positions, self.seed)
        if purpose_seed is None and batch.views is not None:
            views = batch.views
        else:
            views = self.objective.draw(self.seed if purpose_seed is None else purpose_seed, batch.positions)
        return self.normalise(images), views.to(self.device)

    def step(self, model: nn.Module, batch: Batch) -> StepResult:
        return StepResult(*self._loss(model, *self.views(batch)))

    def _loss(self, model: nn.Module, images: Any, views: Tensor) -> tuple[Tensor, Tensor]:
        target = self.objective.target(images, views)
        return self.objective.loss(self.objective.predict(model, images, views), target, views)

    def validate(self, module: nn.Module, context: DistributedContext) -> dict[str, float]:
        """The training loss on validation images, with the same views at every validation."""
        if self.data.val_source is None:
            return {}
        sums = torch.zeros(2, device=self.device)
        views_seed = rng.key(self.seed, "validation masks") >> 1
        given = self.config.micro_batch
        micro = self.micro_batch or (given if isinstance(given, int) else min(64, self.config.batch_size))
        for batch in self.data.val_batches(context, micro):
            images, views = self.views(batch, purpose_seed=views_seed)
            sums += torch.stack(self._loss(module, images, views)).to(sums)
        sums = context.all_reduce(sums)
        return {"val_loss": float(sums[0] / sums[1].clamp(min=1))}

    def check_skipped(self, images: Mapping[str, str]) -> None:
        self.data.check_skipped(images)

    def monitor(self, batch: Batch) -> dict[str, float]:
        images = self.normalise(batch.images[:MONITOR_IMAGES].to(self.device))
        return attention_logit_stats(self.student.encoder.backbone, images)

    def state_dict(self) -> dict[str, Any]:
        state = {"target_scale": float(self.teacher.scale)}
        if self.teacher.with_pooled:
            state["pooled_scale"] = float(self.teacher.pooled_scale)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.teacher.scale.fill_(state["target_scale"])
        self.teacher.pooled_scale.fill_(state.get("pooled_scale", 1.0))

    def summary(self) -> dict[str, Any]:
        backbone = self.student.encoder.backbone
        trainable = sum(p.numel() for p in self.student.parameters() if p.requires_grad)
        return {
            "backbone": backbone.name,
            "soft_cap": backbone.soft_cap,
            "target_scale": float(self.teacher.scale),
            "teacher_sha256": self.teacher_hash,
            "parameters": sum(p.numel() for p in self.student.parameters()),
            "trainable_parameters": trainable,
        }

    def export(self, module: nn.Module, folder: Path, provenance: dict[str, Any]) -> None:
        assert isinstance(module, Student)
        facts = {
            "method": self.objective.method,
            "target_scale": float(self.teacher.scale),
            "teacher_sha256": self.teacher_hash,
        }
        export_student(module, folder, provenance={**facts, **provenance})


class _Moments:
    """Sums of numbers ``(count, channels)`` in float64, by channel."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, torch.zeros(1), torch.zeros(1)

    def add(self, numbers: Tensor) -> None:
        numbers = numbers.double()
        self.count += len(numbers)
        self.total = self.total + numbers.sum(0).cpu()
        self.squares = self.squares + numbers.square().sum(0).cpu()

    def spread(self) -> float:
        """The standard deviation; of several channels the root of the mean variance. 1 for equal numbers and NaN."""
        variance = (self.squares / self.count - (self.total / self.count).square()).clamp(min=0).mean()
        std = float(variance.sqrt())
        return std if std > 0 else 1.0


def _drawn(draw: Callable[[int, Tensor], Tensor], seed: int, batch: Batch) -> Tensor:
    return draw(seed, batch.positions)
