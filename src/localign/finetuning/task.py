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
from localign.backbones import Backbone, create_backbone
from localign.backbones.export import content_hash
from localign.data.classification import ImageLabels, SpreadSource, check_same_classes, labels_of
from localign.data.images import ImageData
from localign.data.loader import Batch
from localign.data.mixing import mix_labels
from localign.engine import BatchPlan, Outcome, StepResult, Task, train
from localign.engine.distributed import DistributedContext, choose_device
from localign.engine.log import print_results
from localign.errors import UserError
from localign.finetuning.model import ImageClassifier, export_classifier
from localign.options.data import written_decode
from localign.options.finetune import LABEL_SMOOTHING, FinetuneConfig

SCENES_PER_VALIDATION = 2048
TOP_FIVE_FROM = 6
"""Smallest number of classes for which top-5 accuracy is reported."""


def run_finetune(config: FinetuneConfig) -> None:
    """Fine-tune a backbone, and print the results.

    Raises:
        UserError: Bad options or data.
        RunFailure: The run cannot continue.
    """
    outcome = finetune(config)
    if outcome.is_main:
        print_results(outcome.folder, outcome.results)


def finetune(config: FinetuneConfig, backbone: Backbone | None = None) -> Outcome:
    """Fine-tune a backbone for classification; the same as `localign finetune`.

    Args:
        config: The options.
        backbone: The pre-trained backbone, instead of the config's; it does not change.

    Returns:
        The run's folder and results. ``localign.load(outcome.folder)`` loads the backbone, and
        :func:`localign.finetuning.load_classifier` the backbone with its head.

    Raises:
        UserError: Bad options or data.
        RunFailure: Training does not recover from non-finite losses.
    """
    config = resolve_finetune(config)
    return train(FinetuneTask(config, backbone), config, "finetune")


def resolve_finetune(config: FinetuneConfig) -> FinetuneConfig:
    """The config with all defaults that depend on the device and the data."""
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
    """Cross-entropy for class folders and lists; binary cross-entropy for scenes, which show several classes.

    Args:
        config: Backbone, data and loss.
        backbone: The pre-trained backbone, which is copied; by default built from the config.

    Raises:
        UserError: The data have no labels, the validation data have other classes, or an option does not apply.
    """

    def __init__(self, config: FinetuneConfig, backbone: Backbone | None = None) -> None:
        self.config = config
        self.seed = config.seed
        self.device = torch.device("cpu")
        choose_device(config.device)  # a misspelt device fails before the weights are read
        backbone = backbone.copy(attention=config.attention) if backbone else _starting_backbone(config)
        self.data = ImageData(config, backbone.image_size, backbone.preprocessing)
        self.labels = labels_of(self.data.source, config.data)
        self.val_labels, self.val_indices = self._open_val()
        self.smoothing = self._smoothing()
        self.starting_hash = content_hash(backbone.vit.state_dict())
        with rng.seeded_globals(config.seed, "classification head"):
            self.model = ImageClassifier(
                backbone, self.labels.classes, multi_label=self.labels.multi_label, freeze=config.freeze
            )

    def _open_val(self) -> tuple[ImageLabels | None, Tensor]:
        """Labels of the validation source, and the indices of the images that validation reads."""
        source, count = self.data.val_source, self.config.val_images
        if source is None:
            return None, torch.empty(0, dtype=torch.int64)
        spec = self.config.val or f"{self.config.data} (val)"
        labels = labels_of(source, spec)
        check_same_classes(self.labels, labels, spec)
        if count is None or count >= len(source):
            return labels, torch.arange(len(source))
        self.data.val_source = subset = SpreadSource(source, count)
        return labels, subset.indices

    def _smoothing(self) -> float:
        given = self.config.label_smoothing
        if not self.labels.multi_label:
            return LABEL_SMOOTHING if given is None else given
        if given:
            raise UserError(
                f"--label-smoothing needs images of one class each; images of {self.config.data} have several"
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

    def data_files(self) -> Iterator[tuple[str, str]]:
        return self.data.data_files()

    @property
    def micro_batch_multiple(self) -> int:
        return self.data.micro_batch_multiple

    def batches(self, plan: BatchPlan) -> Iterator[Batch]:
        return self.data.train_batches(plan)

    def set_grad_checkpointing(self) -> None:
        self.model.backbone.vit.set_grad_checkpointing(True)

    def views(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Normalised training images and their targets ``(batch, classes)``, mixed by mixup or CutMix if enabled."""
        images = batch.images.to(self.device)
        targets = self.labels.targets(batch.indices).to(self.device)
        if self.data.mixing is not None:
            images, image_share = self.data.mixing.mix(images, batch.positions, self.seed)
            targets = mix_labels(targets, image_share)
        return self.model.backbone.normalise(images), targets

    def step(self, model: nn.Module, batch: Batch) -> StepResult:
        images, targets = self.views(batch)
        total, count = classification_loss(model(images), targets, self.labels.multi_label, self.smoothing)
        return StepResult(total, count)

    def validate(self, module: nn.Module, context: DistributedContext) -> dict[str, float]:
        """Validation loss without label smoothing, and accuracy or recall.

        Returns:
            ``val_loss``; for images of one class each ``val_top1`` and, with six classes or more, ``val_top5``: the
            shares of images whose class has the largest logit, or one of the five largest. For scenes ``val_recall``:
            the recall at probability 0.5, averaged over the classes that occur. Empty without validation data.
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
            counts += recall_counts(logits, targets) if multi else accuracy_counts(logits, targets)
        loss, (hits, totals) = context.all_reduce(loss), context.all_reduce(counts)
        metrics = {"val_loss": float(loss[0] / loss[1].clamp(min=1))}
        shares = hits / totals.clamp(min=1)
        if multi:
            return {**metrics, "val_recall": float(shares.sum() / (totals > 0).sum().clamp(min=1))}
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
    return create_backbone(
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
    """The loss as a sum over its terms, and the number of terms, both scalars.

    Args:
        logits: ``(batch, classes)``.
        targets: Floating point, the same shape: class probabilities, or with ``multi_label`` the presence of classes.
        multi_label: Binary cross-entropy with a term for each pair of image and class, instead of cross-entropy with a
            term for each image.
        smoothing: Label smoothing of cross-entropy: the share of the target spread evenly over the classes.
    """
    if multi_label:
        loss = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="sum")
        return loss, loss.new_tensor(float(targets.numel()))
    loss = F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=smoothing)
    return loss, loss.new_tensor(float(len(targets)))


def accuracy_counts(logits: Tensor, targets: Tensor) -> Tensor:
    """For images of one class each: ``[[top-1 hits, top-5 hits], [images, images]]``."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    correct = targets.gather(1, best)
    hits = torch.stack([correct[:, 0].sum(), correct.sum()])
    return torch.stack([hits, torch.full_like(hits, len(targets))])


def recall_counts(logits: Tensor, targets: Tensor) -> Tensor:
    """For images of several classes: true positives and positives by class, ``(2, classes)``."""
    return torch.stack([((logits > 0) * targets).sum(0), targets.sum(0)])
