"""Alignment at native resolution: images keep their aspect ratio, so a batch holds images of several sizes.

The budget of patches per image bounds a micro-batch: it takes no more memory than the same number of square images of
that many patches. Sizes follow from the images alone, and masks from seed, position and size, so a resumed run sees the
same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from localign.alignment.losses import reconstruction_loss, select_tokens
from localign.alignment.masks import MaskSampler
from localign.alignment.objectives.base import MaskedObjective
from localign.alignment.task import AlignTask
from localign.backbones import Backbone
from localign.backbones.native import Grid, NativeImages, check_native, normalised
from localign.data.images import ImageData
from localign.data.loader import Batch
from localign.data.transforms import NativeView
from localign.options.align import AlignConfig


def align_task(config: AlignConfig, backbone: Backbone | None = None) -> AlignTask:
    """The task of an alignment: at native resolution if the config has a budget of patches.

    Raises:
        UserError: As for :class:`~localign.alignment.task.AlignTask`.
    """
    return AlignTask(config, backbone) if config.max_patches is None else NativeAlignTask(config, backbone)


class NativeAlignTask(AlignTask):
    """MaskEmbed on images of several sizes. The loss is the mean over the tokens of all images, without padding.

    Raises:
        UserError: As for :class:`~localign.alignment.task.AlignTask`, or the backbone's positions fit one grid only.
    """

    objective: MaskedObjective

    def _open(self, backbone: Backbone) -> ImageData:
        check_native(backbone)
        assert self.config.max_patches is not None
        view = NativeView(backbone.patch_size, self.config.max_patches, backbone.preprocessing.interpolation)
        return ImageData(self.config, backbone.image_size, backbone.preprocessing, view)

    def views(self, batch: Batch, purpose_seed: int | None = None) -> tuple[NativeImages, Tensor]:
        """The normalised images of a batch, and their keep-masks, which hide the padding, on the device."""
        grids = tuple((int(rows), int(columns)) for rows, columns in batch.grids)
        images = normalised(self.teacher.backbone, batch.images.to(self.device), grids)
        if purpose_seed is None and batch.views is not None:
            keep = batch.views
        else:
            keep = _drawn(self.objective.masks, self.seed if purpose_seed is None else purpose_seed, batch)
        return images, keep.to(self.device)

    def _drawing(self) -> Callable[[Batch], Tensor]:
        return partial(_drawn, self.objective.masks, self.seed)

    def _counted_target(self, images: NativeImages, views: Tensor) -> Tensor:
        return self.objective.target(images, views)[self._valid(images, views)]  # type: ignore[arg-type]

    def _valid(self, images: NativeImages, views: Tensor) -> Tensor:
        """bool ``(views, tokens)``: True for tokens, False for padding."""
        return images.valid(self.objective.num_prefix_tokens).repeat_interleave(views.shape[1], dim=0)

    def _loss(self, model: nn.Module, images: Any, views: Tensor) -> tuple[Tensor, Tensor]:
        target = self.objective.target(images, views)
        prediction = self.objective.predict(model, images, views)
        counted = self._valid(images, views)
        selected = select_tokens(
            views.flatten(0, 1), self.objective.num_prefix_tokens, self.objective.loss_tokens
        )
        counted = counted if selected is None else counted & selected
        return reconstruction_loss(prediction, target, self.objective.loss_name, counted)

    def worst_case_batch(self, samples: int) -> Batch:
        height, width = self.teacher.backbone.patch_size
        assert self.config.max_patches is not None
        patches = torch.zeros(samples, self.config.max_patches, 3 * height * width, dtype=torch.uint8)
        positions = torch.arange(samples)
        # The last image has padding behind it, so that attention takes a mask.
        grids = ((1, self.config.max_patches),) * (samples - 1) + ((1, 1),)
        return Batch(patches, positions, torch.zeros_like(positions), (), grids)

    def throughput(self, batch: Batch) -> dict[str, int]:
        return {"patches": sum(rows * columns for rows, columns in batch.grids)}

    def monitor(self, batch: Batch) -> dict[str, float]:
        return {}  # it measures images of one size

    def export(self, module: nn.Module, folder: Path, provenance: dict[str, Any]) -> None:
        super().export(module, folder, {"max_patches": self.config.max_patches, **provenance})


def _drawn(masks: MaskSampler, seed: int, batch: Batch) -> Tensor:
    grids = tuple((int(rows), int(columns)) for rows, columns in batch.grids)
    return padded_masks(masks, seed, batch.positions, grids, batch.images.shape[1])


def padded_masks(
    masks: MaskSampler, seed: int, positions: Tensor, grids: tuple[Grid, ...], longest: int
) -> Tensor:
    """Keep-masks of images of several sizes, bool ``(images, masks, longest)``, False behind an image's patches.

    Args:
        masks: Draws the masks of one grid.
        seed: The run's seed.
        positions: int64 ``(images,)``, global positions in the stream of samples.
        grids: The grid of each image.
        longest: Patches of the largest image.
    """
    padded = torch.zeros(len(grids), masks.masks_per_image, longest, dtype=torch.bool)
    for grid in dict.fromkeys(grids):
        rows = [number for number, other in enumerate(grids) if other == grid]
        padded[rows, :, : grid[0] * grid[1]] = masks(seed, positions[rows], grid)
    return padded
