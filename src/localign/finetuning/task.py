"""Classification fine-tuning as a task of the training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localign import rng
from localign.alignment.setup import CPU_BATCH, PUBLISHED_BATCH
from localign.backbones import Backbone, open_backbone
from localign.backbones.export import content_hash
from localign.data.classification import ImageLabels, SpreadSource, check_same_classes, labels_of
from localign.data.images import ImageData
from localign.data.loader import Batch
from localign.data.mixing import mix_labels
from localign.engine import BatchPlan, Outcome, StepResult, Task, train
from localign.engine.distributed import DistributedContext, choose_device
from localign.errors import UserError
from localign.finetuning.model import ImageClassifier, export_classifier
from localign.options.data import written_decode
from localign.options.finetune import LABEL_SMOOTHING, FinetuneConfig

SCENES_PER_VALIDATION = 2048
TOP_FIVE_FROM = 6
"""Fewest classes among which the five best say anything."""


def finetune(config: FinetuneConfig, backbone: Backbone | None = None) -> Outcome:
    """Fine-tune a backbone for classification; the same as `localign finetune`.

    Args:
        config: The options.
        backbone: Where to start, in place of the one that the config names; it stays as it is.

    Returns:
        The run's folder and results. ``localign.load(outcome.folder)`` is the backbone;
        :func:`localign.finetuning.load_classifier` gives it with its head.

    Raises:
        UserError: Bad options or data.
        RunFailure: Training does not recover from non-finite losses.
    """
    config = resolve_finetune(config)
    return train(FinetuneTask(config, backbone), config, "finetune")


def resolve_finetune(config: FinetuneConfig) -> FinetuneConfig:
    """The config with the defaults filled in that depend on the device and the data."""
    on_cpu = choose_device(config.device).type == "cpu"
    crop = config.crop or ("none" if config.is_scenes else "rrc")
    return replace(
        config,
        batch_size=config.batch_size or (CPU_BATCH if on_cpu else PUBLISHED_BATCH),
        crop=crop,
        decode=config.decode or written_decode(config, crop),
        val_images=config.val_images or (SCENES_PER_VALIDATION if config.is_scenes else None),
    )


class FinetuneTask(Task):
    """Cross-entropy over class folders or list labels, or binary cross-entropy over what scenes show.

    Args:
        config: Backbone, data, loss.
        backbone: The pre-trained model, which is copied; built from the config if not given.

    Raises:
        UserError: Data without labels, validation data with other classes, or an option that does not fit.
    """

    def __init__(self, config: FinetuneConfig, backbone: Backbone | None = None) -> None:
        self.config = config
        self.seed = config.seed
        self.device = torch.device("cpu")
        choose_device(config.device)  # a misspelt device fails before the weights are read
        backbone = backbone.copy(attention=config.attention) if backbone else _starting_backbone(config)
        self.data = ImageData(config, backbone.image_size)
        self.labels = labels_of(self.data.source, config.data)
        self.val_labels, self.val_indices = self._open_val()
        self.smoothing = self._smoothing()
        self.starting_hash = content_hash(backbone.vit.state_dict())
        with rng.seeded_globals(config.seed, "classification head"):
            self.model = ImageClassifier(
                backbone, self.labels.classes, multi_label=self.labels.multi_label, freeze=config.freeze
            )

    def _open_val(self) -> tuple[ImageLabels | None, Tensor]:
        """Labels of the validation source, and the places in it of the images that validation reads."""
        source, count = self.data.val_source, self.config.val_images
        if source is None:
            return None, torch.empty(0, dtype=torch.int64)
        spec = self.config.val or f"{self.config.data} (val)"
        labels = labels_of(source, spec)
        check_same_classes(self.labels, labels, spec)
        if count is None or count >= len(source):
            return labels, torch.arange(len(source))
        self.data.val_source = spread = SpreadSource(source, count)
        return labels, spread.indices

    def _smoothing(self) -> float:
        given = self.config.label_smoothing
        if not self.labels.multi_label:
            return LABEL_SMOOTHING if given is None else given
        if given:
            raise UserError(
                f"--label-smoothing is for images of one class each, which {self.config.data} does not have"
            )
        return 0.0

    @property
    def module(self) -> ImageClassifier:
        return self.model

    def samples(self) -> int:
        return len(self.data.source)

    def fingerprint(self) -> dict[str, str]:
        return {
            "data": self.data.source.fingerprint(),
            "labels": self.labels.fingerprint(),
            "starting weights": self.starting_hash[:16],
        }

    @property
    def micro_batch_multiple(self) -> int:
        return self.data.micro_batch_multiple

    def batches(self, plan: BatchPlan) -> Iterator[Batch]:
        return self.data.train_batches(plan)

    def set_grad_checkpointing(self) -> None:
        self.model.backbone.vit.set_grad_checkpointing(True)

    def views(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Normalised training images and their targets ``(batch, classes)``, both mixed where asked for."""
        images = batch.images.to(self.device)
        targets = self.labels.targets(batch.indices).to(self.device)
        if self.data.mixing is not None:
            images, own_share = self.data.mixing.mix(images, batch.positions, self.seed)
            targets = mix_labels(targets, own_share)
        return self.model.backbone.normalise(images), targets

    def step(self, model: nn.Module, batch: Batch) -> StepResult:
        images, targets = self.views(batch)
        total, count = classification_loss(model(images), targets, self.labels.multi_label, self.smoothing)
        return StepResult(total, count)

    def validate(self, module: nn.Module, context: DistributedContext) -> dict[str, float]:
        """Loss without smoothing, and how much is recognised.

        Returns:
            ``val_loss``; for images of one class ``val_top1`` and, from six classes on, ``val_top5``: shares
            of images whose class has the largest logit, or one of the five largest. For scenes ``val_recall``:
            recall above probability 0.5, averaged over the classes that occur. Empty without validation data.
        """
        labels = self.val_labels
        if labels is None:
            return {}
        multi = labels.multi_label
        loss = torch.zeros(2, device=self.device)
        counts = torch.zeros(2, len(labels.classes) if multi else 2, device=self.device)
        for batch in self.data.val_batches(context, self.micro_batch or min(64, self.config.batch_size)):
            targets = labels.targets(self.val_indices[batch.indices]).to(self.device)
            logits = module(self.model.backbone.normalise(batch.images.to(self.device)))
            loss += torch.stack(classification_loss(logits, targets, multi)).to(loss)
            counts += recognised(logits, targets) if multi else ranked(logits, targets)
        loss, (hits, of) = context.all_reduce(loss), context.all_reduce(counts)
        metrics = {"val_loss": float(loss[0] / loss[1].clamp(min=1))}
        shares = hits / of.clamp(min=1)
        if multi:
            return {**metrics, "val_recall": float(shares.sum() / (of > 0).sum().clamp(min=1))}
        names = ("val_top1", "val_top5") if len(labels.classes) >= TOP_FIVE_FROM else ("val_top1",)
        return {**metrics, **dict(zip(names, shares.tolist(), strict=False))}

    def check_skipped(self, images: Mapping[str, str]) -> None:
        self.data.check_skipped(images)

    def summary(self) -> dict[str, Any]:
        return {
            "backbone": self.model.backbone.name,
            "starting_sha256": self.starting_hash,
            "classes": list(self.model.classes),
            "multi_label": self.model.multi_label,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "trainable_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
        }

    def export(self, module: nn.Module, folder: Path, provenance: dict[str, Any]) -> None:
        assert isinstance(module, ImageClassifier)
        facts = {"method": "classification fine-tuning", "starting_sha256": self.starting_hash}
        export_classifier(module, folder, provenance={**facts, **provenance})


def _starting_backbone(config: FinetuneConfig) -> Backbone:
    return open_backbone(
        config.backbone,
        attention=config.attention,
        weights=config.weights,
        image_size=config.image_size,
        model_kwargs=config.model_kwargs,
        seed=config.seed,
    )


def classification_loss(
    logits: Tensor, targets: Tensor, multi_label: bool, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The loss as a sum, and what it went over, both scalars.

    Args:
        logits: ``(batch, classes)``.
        targets: Floating point, the same shape: probabilities of one class each, or presence of every class.
        multi_label: Binary cross-entropy over all pairs of image and class, rather than cross-entropy over
            images.
        smoothing: Of cross-entropy's targets: the share spread evenly over the classes.
    """
    if multi_label:
        loss = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="sum")
        return loss, loss.new_tensor(float(targets.numel()))
    loss = F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=smoothing)
    return loss, loss.new_tensor(float(len(targets)))


def ranked(logits: Tensor, targets: Tensor) -> Tensor:
    """For images of one class: ``(2, 2)``, how many have theirs first and among the first five, and of how many."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    right = targets.gather(1, best)
    hits = torch.stack([right[:, 0].sum(), right.sum()])
    return torch.stack([hits, torch.full_like(hits, len(targets))])


def recognised(logits: Tensor, targets: Tensor) -> Tensor:
    """For images of several classes: ``(2, classes)``, right positive predictions, and positives."""
    return torch.stack([((logits > 0) * targets).sum(0), targets.sum(0)])
