"""MaskEmbed with averaging instead of the decoder (section 4.3, table 1 and appendix B.3 of the paper)."""

from __future__ import annotations

from torch import Tensor, nn

from localign.alignment.losses import reconstruction_loss
from localign.alignment.objectives.base import MaskedObjective, visible_mean


class Averaging(MaskedObjective):
    """The mean embedding of the visible patches reproduces the teacher's pooled output for the masked image.

    A view without visible patches has no mean and does not count in the loss. The paper avoids such views with block
    masks, which never hide every patch.
    """

    method = "MaskEmbed with averaging"

    def predict(self, model: nn.Module, images: Tensor, views: Tensor) -> Tensor:
        """``(batch * masks, width)``."""
        return visible_mean(model(images)[:, self.num_prefix_tokens :], views)

    def loss(self, prediction: Tensor, target: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        return reconstruction_loss(prediction, target, self.loss_name, views.any(dim=-1).flatten())
