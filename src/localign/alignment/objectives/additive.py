"""The additive approximation (section 3.1 and appendix C.1, eq. 2 of the paper)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from localign.alignment.losses import reconstruction_loss
from localign.alignment.objectives.base import MaskedObjective, ObjectiveOptions, visible_sum
from localign.alignment.teacher import Teacher


class Additive(MaskedObjective):
    """Patch vectors whose sum over the visible patches reproduces the teacher's output of the masked image.

    The paper asks for ``m^T g = f(m(x))`` at every mask m. At m = 0 the left side is 0 and the right side,
    the output for an image of nothing but mean colour, is not, so no g can meet it. The teacher's output is
    therefore counted from there: the target is ``f(m(x)) - f(0)``, with the same f(0) for every image.

    With masks from the Shapley kernel the solution is each patch's Shapley value (see
    :mod:`localign.alignment.shapley`). The kernel never draws the empty and the full set, because it weighs
    them infinitely: they have to be met exactly. The first one is, by what was just said; for the second, the
    patch vectors share the difference between ``f(x) - f(0)`` and their sum equally, in every loss. The
    all-visible view gives that sum and is no term of the loss then.
    """

    method = "additive reconstruction"

    def __init__(self, options: ObjectiveOptions, teacher: Teacher) -> None:
        super().__init__(options, teacher)
        self.exact_sum = self.masks.kind == "shapley"
        self._nothing: Tensor | None = None

    def target(self, images: Tensor, views: Tensor) -> Tensor:
        """``(batch * masks, width)``."""
        return self.teacher(images, views) - self.nothing(images) / self.teacher.scale

    @torch.no_grad()
    def nothing(self, images: Tensor) -> Tensor:
        """f(0), the unscaled output for an all-hidden image: ``(1, width)``, computed once in float32."""
        if self._nothing is None or self._nothing.device != images.device:
            with torch.autocast(images.device.type, enabled=False):
                self._nothing = self.teacher.of_views(torch.zeros_like(images[:1]))
        return self._nothing

    def predict(self, model: nn.Module, images: Tensor, views: Tensor) -> Tensor:
        """The patch vectors g, ``(batch, patches, width)``: embeddings over the root of the number of patches.

        That is how a sum of so many independent terms grows; without it the first optimizer steps on a large
        grid would overshoot by an order of magnitude.
        """
        return model(images)[:, self.num_prefix_tokens :] / math.sqrt(views.shape[-1])

    def loss(self, prediction: Tensor, target: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        vectors, target = prediction.float(), target.unflatten(0, views.shape[:2])
        if self.exact_sum:
            missing = target[:, -1] - vectors.sum(dim=1)
            vectors = vectors + missing[:, None] / vectors.shape[1]
            target, views = target[:, :-1], views[:, :-1]
        return reconstruction_loss(visible_sum(vectors, views), target.flatten(0, 1), self.loss_name)
