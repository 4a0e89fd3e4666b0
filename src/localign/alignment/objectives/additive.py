"""The additive approximation (section 3.1 and appendix C.1, eq. 2 of the paper)."""

from __future__ import annotations

import math

from torch import Tensor, nn

from localign.alignment.losses import reconstruction_loss
from localign.alignment.objectives.base import MaskedObjective, ObjectiveOptions, visible_sum
from localign.alignment.teacher import Teacher


class Additive(MaskedObjective):
    """Patch vectors whose sum over the visible patches reproduces the teacher's output for the masked image.

    The paper requires ``m^T g = f(m(x))`` for every mask m. At m = 0 the left side is 0, but the right side, the output
    for an image of the mean colour, is not, so no g satisfies it. The target is therefore ``f(m(x)) - f(0)``, with the
    same f(0) for every image.

    With masks from the Shapley kernel, the solution is each patch's Shapley value (see
    :mod:`localign.alignment.shapley`). The kernel gives the empty and the full set infinite weight: it never draws
    them, and the solution must meet both exactly. It always meets the empty set, because f(0) is subtracted. To meet
    the full set, every loss adds an equal share of the difference between ``f(x) - f(0)`` and the sum of the patch
    vectors to each vector. The all-visible view provides ``f(x)`` and is then not a term of the loss.
    """

    method = "additive reconstruction"

    def __init__(self, options: ObjectiveOptions, teacher: Teacher) -> None:
        super().__init__(options, teacher)
        self.exact_sum = self.masks.kind == "shapley"

    def target(self, images: Tensor, views: Tensor) -> Tensor:
        """``(batch * masks, width)``."""
        target: Tensor = self.teacher(images, views) - self.empty_output(images.device) / self.teacher.scale
        return target

    def predict(self, model: nn.Module, images: Tensor, views: Tensor) -> Tensor:
        """The patch vectors g, ``(batch, patches, width)``: embeddings divided by the root of the number of patches.

        A sum of n independent terms grows with the root of n. Without the division, the first optimizer steps on a
        large grid would overshoot by an order of magnitude.
        """
        output: Tensor = model(images)[:, self.num_prefix_tokens :] / math.sqrt(views.shape[-1])
        return output

    def loss(self, prediction: Tensor, target: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        vectors, target = prediction.float(), target.unflatten(0, views.shape[:2])
        if self.exact_sum:
            missing = target[:, -1] - vectors.sum(dim=1)
            vectors = vectors + missing[:, None] / vectors.shape[1]
            target, views = target[:, :-1], views[:, :-1]
        return reconstruction_loss(visible_sum(vectors, views), target.flatten(0, 1), self.loss_name)
