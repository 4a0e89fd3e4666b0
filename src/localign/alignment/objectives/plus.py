"""MaskEmbed with linear read-outs and a kept pooled output: ``maskembed+``.

MaskEmbed changes what it does not train: the pooled output loses its meaning (zero-shot use breaks), and what a patch
embedding holds is not linearly readable, since the decoder alone reads it. The teacher's pass over a masked view gives
the view's pooled output at no further cost, so three terms use it.
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from localign.alignment.objectives.base import ObjectiveOptions, visible_mean, visible_sum
from localign.alignment.objectives.maskembed import MaskEmbed
from localign.alignment.teacher import Teacher


class MaskEmbedPlus(MaskEmbed):
    """MaskEmbed's loss plus three weighted terms, all means of squared errors.

    - Read-out: linear images of the patch embeddings, summed (or averaged) over the visible patches, give the teacher's
      pooled output of each view. A sum starts from the output of a fully hidden image, as in the additive objective.
    - Pooled: the decoder's first token, through a linear layer of its own, gives the same.
    - Preservation: the student's own pooled output of the whole image, by the teacher's final norm and pooling, stays
      the teacher's. This term needs a teacher of the student's width, and the all-visible mask for its target.

    Pooled outputs count in units of their spread over the views of the first training images, the tokens in units of
    the target scale. With all three weights 0, loss and gradients are MaskEmbed's.
    """

    method = "MaskEmbed+"

    def __init__(self, options: ObjectiveOptions, teacher: Teacher) -> None:
        super().__init__(options, teacher)
        assert options.plus is not None
        self.weights = options.plus

    def scaled(self, target: Tensor) -> Tensor:
        return target[:, 1:]

    def loss(self, prediction: Any, target: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        total, count = super().loss(prediction.tokens, target[:, 1:], views)
        pooled = target[:, 0].float() / self.teacher.pooled_scale
        weights = self.weights
        if weights.readout_weight:
            readout = self._readout_loss(prediction.vectors, pooled, views)
            total = total + weights.readout_weight * count * readout
        if weights.pooled_weight:
            total = total + weights.pooled_weight * count * F.mse_loss(prediction.pooled.float(), pooled)
        if weights.preserve_weight:
            preserve = self._preserve_loss(prediction.last, pooled, views)
            total = total + weights.preserve_weight * count * preserve
        return total, count

    def _readout_loss(self, vectors: Tensor, pooled: Tensor, views: Tensor) -> Tensor:
        if self.weights.readout == "sum":
            empty = self.empty_output(pooled.device)[:, 0] / self.teacher.scale / self.teacher.pooled_scale
            # A sum of n independent terms grows with the root of n.
            said = visible_sum(vectors / math.sqrt(vectors.shape[1]), views) + empty
            return F.mse_loss(said, pooled)
        seen = views.any(dim=-1).flatten()[:, None].float()
        errors = (visible_mean(vectors, views) - pooled).square() * seen
        return errors.sum() / (seen.sum() * pooled.shape[1]).clamp(min=1)

    def _preserve_loss(self, last: Tensor, pooled: Tensor, views: Tensor) -> Tensor:
        whole = pooled.unflatten(0, views.shape[:2])[:, -1]
        own = self.teacher.backbone.pool(last).float() / self.teacher.scale / self.teacher.pooled_scale
        return F.mse_loss(own, whole)
