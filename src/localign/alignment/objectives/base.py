"""What an objective is to the alignment task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from localign.alignment.losses import reconstruction_loss, select_tokens
from localign.alignment.masks import MaskSampler
from localign.alignment.teacher import Teacher
from localign.options.names import DecoderName, LossName, TokenSelection


@dataclass(frozen=True)
class ObjectiveOptions:
    """What an objective needs to know of the options of an alignment."""

    loss: LossName
    decoder: DecoderName = "none"
    loss_tokens: TokenSelection = "all"
    """Of masked objectives: the tokens that the loss goes over."""
    masks: MaskSampler | None = None
    """Of masked objectives."""


class Objective(ABC):
    """Which views of an image the teacher sees, and how the student's embeddings account for them.

    An objective has no weights: the student is ``encoder`` (backbone and linear head) and, with
    ``--decoder transformer``, the decoder. It is used as::

        views = objective.draw(seed, positions)
        target = objective.target(images, views)
        loss_sum, weight = objective.loss(objective.predict(model, images, views), target, views)

    Args:
        options: They go with the objective, see :data:`localign.options.align.OBJECTIVE_CHOICES`.
        teacher: Already on the right layer.

    Raises:
        UserError: The views do not fit the backbone's grid.
    """

    method: ClassVar[str]
    """What an export says about where it came from."""

    def __init__(self, options: ObjectiveOptions, teacher: Teacher) -> None:
        self.loss_name: LossName = options.loss
        self.decodes = options.decoder == "transformer"
        self.teacher = teacher
        self.grid = teacher.backbone.grid
        self.patch_size = teacher.backbone.patch_size
        self.num_prefix_tokens = teacher.backbone.num_prefix_tokens

    @abstractmethod
    def draw(self, seed: int, positions: Tensor) -> Tensor:
        """The views of each image, a function of the seed and the image's global position alone.

        Args:
            seed: The run's, or one for a purpose of its own.
            positions: int64 ``(batch,)``.

        Returns:
            On the CPU, first dimension ``batch``; the objective's own code for a view.
        """

    @abstractmethod
    def target(self, images: Tensor, views: Tensor) -> Tensor:
        """What the teacher makes of the views, divided by the target scale, without gradient.

        Args:
            images: Normalised, ``(batch, 3, height, width)``.
            views: From :meth:`draw`, on the images' device.

        Returns:
            ``(batch * views per image, ...)``; the views of one image are neighbours.
        """

    @abstractmethod
    def predict(self, model: nn.Module, images: Tensor, views: Tensor) -> Tensor:
        """What the student makes of them, with gradient.

        Args:
            model: The student, perhaps compiled and replicated: it is called once, as a whole.
            images: As for :meth:`target`.
            views: As for :meth:`target`.
        """

    def loss(self, prediction: Tensor, target: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        """The loss summed over its terms, and how many there are."""
        return reconstruction_loss(prediction, target, self.loss_name)


class MaskedObjective(Objective):
    """An objective whose views are keep-masks: bool ``(batch, masks, patches)``, True = visible."""

    def __init__(self, options: ObjectiveOptions, teacher: Teacher) -> None:
        super().__init__(options, teacher)
        assert options.masks is not None
        self.loss_tokens = options.loss_tokens
        self.masks = options.masks
        self.masks.check(self.grid)

    def draw(self, seed: int, positions: Tensor) -> Tensor:
        return self.masks(seed, positions, self.grid)

    def target(self, images: Tensor, views: Tensor) -> Tensor:
        return self.teacher(images, views)

    def loss(self, prediction: Tensor, target: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        selected = select_tokens(views.flatten(0, 1), self.num_prefix_tokens, self.loss_tokens)
        return reconstruction_loss(prediction, target, self.loss_name, selected)


def visible_sum(embeddings: Tensor, keep_mask: Tensor) -> Tensor:
    """Patch vectors ``(batch, patches, width)``, summed over what each mask keeps.

    Args:
        embeddings: Without prefix tokens.
        keep_mask: bool ``(batch, masks, patches)``, True = visible.

    Returns:
        float32 ``(batch * masks, width)``, whatever the precision around it: hundreds of terms add up.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        return (keep_mask.float() @ embeddings.float()).flatten(0, 1)


def visible_mean(embeddings: Tensor, keep_mask: Tensor) -> Tensor:
    """As :func:`visible_sum`, divided by how many patches each mask keeps; 0 for a mask that keeps none."""
    count = keep_mask.sum(-1).clamp(min=1).flatten()
    return visible_sum(embeddings, keep_mask) / count[:, None]
