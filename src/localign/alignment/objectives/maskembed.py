"""MaskEmbed (section 3.2 of the paper): a decoder reconstructs masked views from masked embeddings."""

from __future__ import annotations

from torch import Tensor, nn

from localign.alignment.objectives.base import MaskedObjective


class MaskEmbed(MaskedObjective):
    """The teacher sees masked images; the decoder sees embeddings of the whole image under the same masks (eq. 1)."""

    method = "MaskEmbed"

    def predict(self, model: nn.Module, images: Tensor, views: Tensor) -> Tensor:
        """``(batch * masks, tokens, width)``; for target ``cls`` only the first token: ``(batch * masks, width)``."""
        prediction = model(images, views)
        output: Tensor = prediction[:, 0] if self.teacher.target == "cls" else prediction
        return output
