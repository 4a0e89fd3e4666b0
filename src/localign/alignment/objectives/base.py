"""The interface of objectives, and what masked objectives share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from localign.alignment.losses import reconstruction_loss, select_tokens
from localign.alignment.masks import MaskSampler
from localign.alignment.teacher import Teacher
from localign.options.names import DecoderName, LossName, Readout, TokenSelection


@dataclass(frozen=True)
class PlusWeights:
    """Weights of the terms that ``maskembed+`` adds to MaskEmbed's loss; 0 leaves a term out."""

    readout: Readout
    """How patch vectors combine to a view's pooled output: their sum or mean over the visible patches."""
    readout_weight: float
    pooled_weight: float
    preserve_weight: float


@dataclass(frozen=True)
class ObjectiveOptions:
    """The options of an alignment that its objective uses."""

    loss: LossName
    decoder: DecoderName = "none"
    loss_tokens: TokenSelection = "all"
    """Tokens that count in the loss; masked objectives only."""
    masks: MaskSampler | None = None
    """Required by masked objectives."""
    plus: PlusWeights | None = None
    """Required by ``maskembed+``."""


class Objective(ABC):
    """Defines which views of an image the teacher sees, and how the student predicts the teacher's outputs.

    An objective has no weights. The student consists of an encoder (backbone and linear head) and, with
    ``--decoder transformer``, a decoder. Usage::

        views = objective.draw(seed, positions)
        target = objective.target(images, views)
        loss_sum, weight = objective.loss(objective.predict(model, images, views), target, views)

    Args:
        options: Options that the objective accepts, see :data:`localign.options.align.OBJECTIVE_CHOICES`.
        teacher: The frozen teacher with its target.

    Raises:
        UserError: The views do not fit the backbone's grid.
    """

    method: ClassVar[str]
    """Name of the method in the provenance of exports."""

    def __init__(self, options: ObjectiveOptions, teacher: Teacher) -> None:
        self.loss_name: LossName = options.loss
        self.decodes = options.decoder == "transformer"
        self.teacher = teacher
        self.grid = teacher.backbone.grid
        self.patch_size = teacher.backbone.patch_size
        self.num_prefix_tokens = teacher.backbone.num_prefix_tokens

    @abstractmethod
    def drawing(self) -> Callable[[int, Tensor], Tensor]:
        """:meth:`draw` as a function that holds no model, for loader processes."""

    def draw(self, seed: int, positions: Tensor) -> Tensor:
        """Draw the views of each image, as a function of the seed and the image's global position.

        Args:
            seed: The run's seed, or a seed for one purpose such as validation.
            positions: int64 ``(batch,)``, global positions in the stream of samples.

        Returns:
            A tensor on the CPU whose first dimension is ``batch``, in the objective's own encoding of views.
        """
        return self.drawing()(seed, positions)

    @abstractmethod
    def target(self, images: Tensor, views: Tensor) -> Tensor:
        """The teacher's outputs for the views, divided by the target scale, without gradient.

        Args:
            images: Normalised, ``(batch, 3, height, width)``.
            views: From :meth:`draw`, on the images' device.

        Returns:
            ``(batch * views per image, ...)``; the views of one image are adjacent.
        """

    def scaled(self, target: Tensor) -> Tensor:
        """The part of a target whose standard deviation is the target scale."""
        return target

    @abstractmethod
    def predict(self, model: nn.Module, images: Tensor, views: Tensor) -> Any:
        """The student's predictions of the target, with gradient.

        Args:
            model: The student, possibly compiled or wrapped for data parallelism, so it must be called as a module and
                only once.
            images: See :meth:`target`.
            views: See :meth:`target`.
        """

    def loss(self, prediction: Any, target: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        """The loss summed over its terms, and the number of terms: two float32 scalars."""
        return reconstruction_loss(prediction, target, self.loss_name)


class MaskedObjective(Objective):
    """An objective whose views are keep-masks: bool ``(batch, masks, patches)``, True = visible."""

    def __init__(self, options: ObjectiveOptions, teacher: Teacher) -> None:
        super().__init__(options, teacher)
        assert options.masks is not None
        self.loss_tokens = options.loss_tokens
        self.masks = options.masks
        self.masks.check(self.grid)
        self._empty_output: Tensor | None = None

    def drawing(self) -> Callable[[int, Tensor], Tensor]:
        return partial(self.masks, grid=self.grid)

    def target(self, images: Tensor, views: Tensor) -> Tensor:
        target: Tensor = self.teacher(images, views)
        return target

    @torch.no_grad()
    def empty_output(self, device: torch.device) -> Tensor:
        """f(0), the unscaled output for a fully hidden image: ``(1, ...)``, computed once in float32."""
        if self._empty_output is None or self._empty_output.device != device:
            with torch.autocast(device.type, enabled=False):
                blank = torch.zeros(1, 3, *self.teacher.backbone.image_size, device=device)
                self._empty_output = self.teacher.of_views(blank)
        return self._empty_output

    def loss(self, prediction: Any, target: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        selected = select_tokens(views.flatten(0, 1), self.num_prefix_tokens, self.loss_tokens)
        return reconstruction_loss(prediction, target, self.loss_name, selected)


def visible_sum(embeddings: Tensor, keep_mask: Tensor) -> Tensor:
    """Sum the vectors of the patches that each mask keeps.

    Args:
        embeddings: ``(batch, patches, width)``, without prefix tokens.
        keep_mask: bool ``(batch, masks, patches)``, True = visible.

    Returns:
        float32 ``(batch * masks, width)``, also under autocast, because hundreds of terms are summed.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        return (keep_mask.float() @ embeddings.float()).flatten(0, 1)


def visible_mean(embeddings: Tensor, keep_mask: Tensor) -> Tensor:
    """The mean vector of the patches that each mask keeps, see :func:`visible_sum`; 0 for a mask that keeps none."""
    count = keep_mask.sum(-1).clamp(min=1).flatten()
    return visible_sum(embeddings, keep_mask) / count[:, None]
