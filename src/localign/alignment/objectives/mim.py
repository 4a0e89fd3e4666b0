"""Masked image modelling with the teacher's tokens as labels: the published companion, run before alignment."""

from __future__ import annotations

from torch import Tensor, nn

from localign.alignment.objectives.base import MaskedObjective
from localign.alignment.teacher import mask_images


class MaskedImageModelling(MaskedObjective):
    """The student sees masked images and gives, without a decoder, the teacher's tokens of the whole image.

    The target is that of the whole image because the student is masked at its input: were the teacher masked
    alike, the two would see the same pixels and the teacher's own weights would be the solution. Here the
    student has to infer what is hidden.
    """

    method = "masked image modelling"

    def target(self, images: Tensor, views: Tensor) -> Tensor:
        """``(batch * masks, tokens, width)``, alike for all masks of one image."""
        whole = self.teacher(images, views.new_ones(len(images), 1, views.shape[2]))
        return whole.repeat_interleave(views.shape[1], dim=0)

    def predict(self, model: nn.Module, images: Tensor, views: Tensor) -> Tensor:
        """``(batch * masks, tokens, width)``."""
        return model(mask_images(images, views, self.grid, self.patch_size))
