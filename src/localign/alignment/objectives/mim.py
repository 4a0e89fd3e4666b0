"""Masked image modelling with the teacher's tokens as labels: a published companion method, run before alignment."""

from __future__ import annotations

from torch import Tensor, nn

from localign.alignment.objectives.base import MaskedObjective
from localign.alignment.teacher import mask_images


class MaskedImageModelling(MaskedObjective):
    """The student sees masked images and predicts the teacher's tokens of the whole image, without a decoder.

    The teacher is not masked: with the same masked input, the teacher's own weights would already be the solution. This
    way the student has to infer the hidden content.
    """

    method = "masked image modelling"

    def target(self, images: Tensor, views: Tensor) -> Tensor:
        """``(batch * masks, tokens, width)``, the same for all masks of one image."""
        tokens = self.teacher(images, views.new_ones(len(images), 1, views.shape[2]))
        targets: Tensor = tokens.repeat_interleave(views.shape[1], dim=0)
        return targets

    def predict(self, model: nn.Module, images: Tensor, views: Tensor) -> Tensor:
        """``(batch * masks, tokens, width)``."""
        output: Tensor = model(mask_images(images, views, self.grid, self.patch_size))
        return output
