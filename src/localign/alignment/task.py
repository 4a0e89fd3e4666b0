"""Locality alignment as a task of the training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from localign import rng
from localign.alignment.export import export_student
from localign.alignment.masks import MaskSampler
from localign.alignment.setup import build_objective, fresh_student, starting_backbone
from localign.alignment.student import Student
from localign.alignment.teacher import Teacher
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
        assert config.target is not None  # AlignConfig filled it in
        self.teacher = Teacher(backbone, config.target)
        self.objective = build_objective(config, self.teacher)
        self.data = self._open(backbone)
        self.student = fresh_student(config, backbone)
        self.teacher_hash = content_hash(backbone.vit.state_dict())

    def _open(self, backbone: Backbone) -> ImageData:
        return ImageData(self.config, backbone.image_size, backbone.preprocessing)

    @property
    def module(self) -> Student:
        return self.student

    def samples(self) -> int:
        return len(self.data.source)

    def fingerprint(self) -> dict[str, str]:
        return {"data": self.data.source.fingerprint(), "starting weights": self.teacher_hash[:16]}

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
        return self.data.train_batches(plan)

    def compile(self) -> None:
        self.student.compile()
        self.teacher.compile()

    def set_grad_checkpointing(self) -> None:
        self.student.set_grad_checkpointing(True)

    @torch.no_grad()
    def on_train_start(self, context: DistributedContext, plan: BatchPlan) -> None:
        """Estimate the target scale on the first training images. Every rank gets the same value."""
        if self.config.mask == "block" and context.is_main:
            grid = self.objective.grid
            share = MaskSampler.of(self.config.masks()).visible_share(grid)
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
        sums = torch.zeros(3, dtype=torch.float64)
        for number, batch in enumerate(self.data.train_batches(alone)):
            images, views = self.views(batch)
            left = count - number * _SCALE_CHUNK
            target = self._counted_target(images[:left], views[:left]).double()
            sums += torch.stack(
                [target.sum(), target.square().sum(), target.new_tensor(target.numel())]
            ).cpu()
        mean = sums[0] / sums[2]
        std = (sums[1] / sums[2] - mean.square()).clamp(min=0).sqrt()
        self.teacher.scale.fill_(float(std) if std > 0 else 1.0)

    def _counted_target(self, images: Any, views: Tensor) -> Tensor:
        """The target, without tokens of padding."""
        return self.objective.target(images, views)

    def views(self, batch: Batch, purpose_seed: int | None = None) -> tuple[Any, Tensor]:
        """The normalised images of a batch and the objective's views, on the device.

        Args:
            batch: uint8 images and their positions.
            purpose_seed: Seed of the views instead of the run's seed; also turns off Mixup and CutMix.
        """
        seed = self.seed if purpose_seed is None else purpose_seed
        images = batch.images.to(self.device)
        if self.data.mixing is not None and purpose_seed is None:
            images = self.data.mixing(images, batch.positions, self.seed)
        views = self.objective.draw(seed, batch.positions)
        return self.teacher.backbone.normalise(images), views.to(self.device)

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
        images = self.teacher.backbone.normalise(batch.images[:MONITOR_IMAGES].to(self.device))
        return attention_logit_stats(self.student.encoder.backbone, images)

    def state_dict(self) -> dict[str, Any]:
        return {"target_scale": float(self.teacher.scale)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.teacher.scale.fill_(state["target_scale"])

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
