"""The embedded backbone: a small ViT trained on image-level labels of scenes, which name objects without locations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localign import rng
from localign.alignment.teacher import mask_images
from localign.backbones import Backbone, save_backbone
from localign.backbones.building import build_vit
from localign.data.cached_scenes import CachedScenes
from localign.data.images import planned_batches
from localign.data.loader import Batch
from localign.data.scenes import SceneConfig
from localign.data.transforms import TrainTransform
from localign.engine import BatchPlan, StepResult, Task, train
from localign.engine.distributed import DistributedContext
from localign.engine.log import print_results
from localign.options.names import EMBEDDED
from localign.options.pretrain import PretrainConfig

ARCHITECTURE = "vit_tiny_patch16_224"


class Classifier(nn.Module):
    """A backbone whose pooled output predicts the shape-colour pairs in an image."""

    def __init__(self, backbone: Backbone, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images to logits ``(batch, pairs)``."""
        logits: Tensor = self.head(self.backbone.pooled(images))
        return logits


class PretrainTask(Task):
    """Binary cross-entropy over shape-colour pairs, predicted from the class token."""

    def __init__(self, config: PretrainConfig, scenes: SceneConfig | None = None) -> None:
        self.config = config
        self.seed = config.seed
        self.device = torch.device("cpu")
        self.scene_config = scenes or SceneConfig()
        kwargs = {
            "img_size": self.scene_config.image_size,
            "patch_size": config.patch_size,
            "embed_dim": config.width,
            "depth": config.depth,
            "num_heads": config.num_heads,
        }
        with rng.seeded_globals(config.seed, "pretrain weights"):
            vit = build_vit(ARCHITECTURE, kwargs, pretrained=False)
            backbone = Backbone(vit, name=EMBEDDED, architecture=ARCHITECTURE, model_kwargs=kwargs)
            self.model = Classifier(backbone, len(self.scene_config.classes) - 1)
        self.source = CachedScenes(self.scene_config, "pretrain", config.scenes)
        self.pairs = torch.from_numpy(self.source.pair_presence()).float()

    @property
    def module(self) -> Classifier:
        return self.model

    def samples(self) -> int:
        return len(self.source)

    def fingerprint(self) -> dict[str, str]:
        return {"data": self.source.fingerprint()}

    def batches(self, plan: BatchPlan) -> Iterator[Batch]:
        transform = TrainTransform(self.scene_config.image_size, crop="none", hflip=0.5)
        return planned_batches(self.source, transform, plan)

    def step(self, model: nn.Module, batch: Batch) -> StepResult:
        images = self._hide(self.model.backbone.normalise(batch.images), batch.positions)
        targets = self.pairs[batch.indices].to(self.device)
        loss = F.binary_cross_entropy_with_logits(model(images).float(), targets, reduction="sum")
        return StepResult(loss, torch.tensor(float(targets.numel()), device=self.device))

    def _hide(self, images: Tensor, positions: Tensor) -> Tensor:
        """Hide patches of some images, so that the backbone can later be a teacher of masked views."""
        if not self.config.hidden_images or not self.config.most_hidden:
            return images
        backbone = self.model.backbone
        draws = rng.uniform(self.seed, "hide patches", positions, 2 + backbone.num_patches)
        share = draws[:, :1] * self.config.most_hidden * (draws[:, 1:2] < self.config.hidden_images)
        keep = (draws[:, 2:] >= share)[:, None].to(images.device)
        return mask_images(images, keep, backbone.grid, backbone.patch_size)

    @torch.no_grad()
    def validate(self, module: nn.Module, context: DistributedContext) -> dict[str, float]:
        """Loss and macro recall over the pairs at probability 0.5, on the validation split."""
        val = CachedScenes(self.scene_config, "val", self.config.val_scenes)
        truth = torch.from_numpy(val.pair_presence())
        logits = []
        for begin in range(0, len(val), 250):
            images = torch.from_numpy(val.images[begin : begin + 250]).permute(0, 3, 1, 2).to(self.device)
            logits.append(module(self.model.backbone.normalise(images)).float().cpu())
        scores = torch.cat(logits)
        hit = ((scores > 0) & truth).sum(0) / truth.sum(0).clamp(min=1)
        loss = F.binary_cross_entropy_with_logits(scores, truth.float())
        return {"val_loss": float(loss), "val_recall": float(hit.mean())}

    def summary(self) -> dict[str, Any]:
        return {"backbone": EMBEDDED, "parameters": sum(p.numel() for p in self.model.backbone.parameters())}

    def export(self, module: nn.Module, folder: Path, provenance: dict[str, Any]) -> None:
        assert isinstance(module, Classifier)
        facts = {"method": "image-level pre-training on scenes", **provenance}
        # float16 halves the size in the package. Everyone starts from these rounded weights.
        save_backbone(module.backbone, folder, provenance=facts, dtype=torch.float16)


def run_pretrain(config: PretrainConfig) -> None:
    """Pre-train the embedded backbone, and print the results.

    Raises:
        UserError: Bad options.
        RunFailure: The run cannot continue.
    """
    outcome = train(PretrainTask(config), config, "pretrain")
    if outcome.is_main:
        print_results(outcome.folder, outcome.results)
