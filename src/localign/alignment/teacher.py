"""The frozen teacher: outputs of the pre-trained model for masked images."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn

from localign.backbones import Backbone
from localign.backbones.attention import fuse_attention
from localign.backbones.native import NativeImages, native_tokens
from localign.errors import UserError
from localign.options.names import TargetName

_CPU_VIEWS = 24
"""Views computed at once on a CPU. Attention on CPUs is not fused, so this bounds the memory of attention matrices."""


def mask_images(images: Tensor, keep_mask: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Hide patches by setting their normalised pixels to 0, the mean colour.

    Pixels to the right of and below the last full patch belong to no patch and are 0 in every view.

    Args:
        images: Normalised, ``(batch, 3, height, width)``.
        keep_mask: bool ``(batch, masks, rows * columns)``, True = visible.
        grid: Rows and columns of patches.
        patch: Patch height and width, pixels.

    Returns:
        ``(batch * masks, 3, height, width)``; the views of one image are adjacent.
    """
    batch, masks, _ = keep_mask.shape
    pixels = keep_mask.view(batch, masks, 1, *grid).to(images.dtype)
    pixels = pixels.repeat_interleave(patch[0], dim=3).repeat_interleave(patch[1], dim=4)
    below, right = images.shape[2] - pixels.shape[3], images.shape[3] - pixels.shape[4]
    if below or right:
        pixels = nn.functional.pad(pixels, (0, right, 0, below))
    return (images[:, None] * pixels).flatten(0, 1)


class Teacher(nn.Module):
    """A frozen backbone and the choice of its output that the student reproduces.

    Args:
        backbone: The pre-trained model; set to eval mode without gradients, never part of a checkpoint.
        target: ``penultimate``: tokens after the second-to-last block and the final norm. ``last``: tokens after the
            last block and the final norm. ``cls``: the pooled output of a backbone whose only prefix token is the class
            token. ``pooled``: the pooled output of any pooling (class token, average, attention).
        pooled: Whether to give the pooled output too, as a token in front of the target's.
        statistics: Mean and standard deviation that images arrive normalised with; default the backbone's own.

    Raises:
        UserError: The target is unknown; ``cls`` is given for a backbone without exactly one prefix token; ``cls`` or
            ``pooled`` for a backbone without pooling; or ``penultimate`` for a backbone with one block.
    """

    scale: Tensor
    pooled_scale: Tensor
    """The spread of pooled outputs, in units of :attr:`scale`."""

    def __init__(
        self,
        backbone: Backbone,
        target: TargetName = "penultimate",
        *,
        pooled: bool = False,
        statistics: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        if target not in get_args(TargetName):
            raise UserError(f"unknown target {target!r}; known: {', '.join(get_args(TargetName))}")
        if target == "cls" and backbone.num_prefix_tokens != 1:
            raise UserError(
                f"target cls needs a backbone with exactly one prefix token; {backbone.name} has "
                f"{backbone.num_prefix_tokens} (see target pooled)"
            )
        if (pooled or target in ("cls", "pooled")) and not backbone.vit.global_pool:
            wanted = "maskembed+" if pooled else f"target {target}"
            raise UserError(
                f"{wanted} needs a pooled output; {backbone.name} has no pooling (alignment removes it)"
            )
        if target == "penultimate" and backbone.depth < 2:
            raise UserError(
                f"target penultimate needs two blocks or more; {backbone.name} has {backbone.depth}"
            )
        self.backbone = backbone.eval().requires_grad_(False)
        self._computing = self.backbone
        self.target = target
        self.with_pooled = pooled
        same = statistics is None or np.allclose(statistics, (backbone.mean, backbone.std), rtol=0, atol=1e-6)
        self.statistics = None if same else statistics
        """Mean and standard deviation that images arrive normalised with, if they are not the backbone's own."""
        self.layer = -2 if target == "penultimate" else -1
        self.register_buffer("scale", torch.ones((), device=next(backbone.parameters()).device))
        self.register_buffer("pooled_scale", torch.ones_like(self.scale))

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode, regardless of ``mode``."""
        return super().train(False)

    def prepare(self, device: torch.device) -> None:
        """Prepare a fast copy of the backbone for a device. It shares its weights with :attr:`backbone`."""
        self._computing = self.backbone
        if device.type == "cpu":
            weights = {id(parameter): parameter for parameter in self.backbone.parameters()}
            self._computing = copy.deepcopy(self.backbone, weights)
            fuse_attention(self._computing, device)

    @torch.no_grad()
    def forward(self, images: Tensor | NativeImages, keep_mask: Tensor | None = None) -> Tensor:
        """Targets of every masked view, divided by the target scale.

        Args:
            images: Normalised, ``(batch, 3, height, width)`` or of several sizes.
            keep_mask: bool ``(batch, masks, patches)``, True = visible. None: the images themselves are the views.

        Returns:
            ``(batch * masks, tokens, width)``, or ``(batch * masks, width)`` for ``cls`` and ``pooled``. A pooled
            output besides the tokens is the first token.
        """
        if isinstance(images, NativeImages):
            images = images if keep_mask is None else images.masked(keep_mask)
            return self.of_views(images) / self.scale
        if self.statistics is not None:
            images = self._renormalised(images, *self.statistics)
        if keep_mask is not None:
            images = mask_images(images, keep_mask, self.backbone.grid, self.backbone.patch_size)
        return self.of_views(images) / self.scale

    def _renormalised(self, images: Tensor, *statistics: Sequence[float]) -> Tensor:
        """Images in the backbone's own normalisation; ``statistics`` are the mean and deviation they arrive with."""
        mean, std, own_mean, own_std = (
            torch.tensor(values, device=images.device, dtype=images.dtype).view(1, -1, 1, 1)
            for values in (*statistics, self.backbone.mean, self.backbone.std)
        )
        return images * (std / own_std) + (mean - own_mean) / own_std

    def of_views(self, views: Tensor | NativeImages) -> Tensor:
        """Unscaled targets of images ``(views, 3, height, width)`` that are already masked or cropped."""
        on_cpu = self.scale.device.type == "cpu"
        if on_cpu and len(views) > _CPU_VIEWS and not torch.compiler.is_compiling():
            parts = (views[first : first + _CPU_VIEWS] for first in range(0, len(views), _CPU_VIEWS))
            return torch.cat([self._of_views(some) for some in parts])
        return self._of_views(views)

    def _of_views(self, views: Tensor | NativeImages) -> Tensor:
        if isinstance(views, NativeImages):
            return native_tokens(self._computing, views, layer=self.layer)
        if self.with_pooled:
            tokens, pooled = self._computing.tokens_and_pooled(views, layer=self.layer)
            return torch.cat([pooled[:, None], tokens], dim=1)
        if self.target in ("cls", "pooled"):
            return self._computing.pooled(views)
        return self._computing.tokens(views, layer=self.layer)
