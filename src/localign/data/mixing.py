"""Mixup and CutMix of images, and of labels where a task has labels.

The sample at global position p is mixed with its neighbour p ^ 1, and the random draws of a pair are keyed by
p // 2. A pair never crosses a micro-batch, so a sample is mixed the same way on any number of ranks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from localign import rng
from localign.errors import UserError


class Mixing:
    """Mixup, CutMix or both, between the two images of each pair of neighbours.

    Each pair draws lam ~ Beta(alpha, alpha). Mixup returns ``lam * own + (1 - lam) * other``. CutMix pastes a box
    from the other image; the box covers 1 - lam of the area before it is clipped at the border. If both are
    given, each pair uses Mixup or CutMix with probability 0.5.

    Args:
        mixup: Mixup's alpha, > 0, or None.
        cutmix: CutMix's alpha, > 0, or None.

    Raises:
        UserError: Neither is given, or an alpha is not positive.
    """

    def __init__(self, mixup: float | None = None, cutmix: float | None = None) -> None:
        if mixup is None and cutmix is None:
            raise UserError("mixing needs an alpha for Mixup or CutMix")
        for name, alpha in (("Mixup", mixup), ("CutMix", cutmix)):
            if alpha is not None and not (alpha > 0 and math.isfinite(alpha)):
                raise UserError(f"the alpha of {name} must be a positive number, not {alpha}")
        self.mixup, self.cutmix = mixup, cutmix

    def __call__(self, images: Tensor, positions: Tensor, seed: int) -> Tensor:
        """Mix a micro-batch on its own device.

        Args:
            images: ``(batch, channels, H, W)``, uint8 or floating point.
            positions: int64 ``(batch,)``, global positions: pairs of neighbours (2k, 2k + 1); on any device.
            seed: The run's seed.

        Returns:
            A new tensor of the same shape and dtype (uint8 is rounded).

        Raises:
            UserError: The micro-batch splits a pair.
        """
        return self.mix(images, positions, seed)[0]

    def mix(self, images: Tensor, positions: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Mix a micro-batch, and return the share of its own image that each sample keeps.

        Takes the arguments of :meth:`__call__` and raises the same errors.

        Returns:
            The mixed images, and float32 ``(batch,)`` on the same device: each sample's share of its own image in
            0..1, after CutMix's box is clipped. The rest is its neighbour's share; see :func:`mix_labels`.
        """
        samples = positions.tolist()
        first, second = samples[::2], samples[1::2]
        if len(first) != len(second) or any(p % 2 or q != p + 1 for p, q in zip(first, second, strict=True)):
            raise UserError(
                f"mixing needs micro-batches of whole neighbouring pairs; these {len(samples)} samples split a pair"
            )
        height, width = images.shape[-2:]
        draws = [self._draw(seed, p // 2, height, width) for p in first]
        weights = torch.tensor([lam for lam, _ in draws], dtype=torch.float32).to(images.device)
        boxes = torch.tensor([box for _, box in draws], dtype=torch.int64).reshape(-1, 4).to(images.device)
        own = _own_share(weights, boxes, height, width)[:, None, None]
        pairs = images.reshape(-1, 2, *images.shape[1:]) if samples else images[None]
        values = pairs if images.is_floating_point() else pairs.float()
        mixed = torch.where(own == 1, values, own * values + (1 - own) * values.flip(1))
        mixed = mixed if images.is_floating_point() else mixed.round()
        share = own.mean(dim=(1, 2, 3, 4)).repeat_interleave(2)
        return mixed.to(images.dtype).reshape(images.shape), share

    def _draw(self, seed: int, pair: int, height: int, width: int) -> tuple[float, tuple[int, int, int, int]]:
        """(weight of the own image, box of the other image as top, left, bottom, right) of one pair.

        Mixup returns an empty box, CutMix a weight of 1.
        """
        generator = rng.generator(seed, "mixing", pair)
        cut = self.mixup is None or (self.cutmix is not None and generator.random() < 0.5)
        alpha = self.cutmix if cut else self.mixup
        assert alpha is not None
        weight = float(generator.beta(alpha, alpha))
        if not cut:
            return weight, (0, 0, 0, 0)
        side = math.sqrt(1.0 - weight)
        rows, columns = int(height * side), int(width * side)
        top = int(generator.integers(height)) - rows // 2
        left = int(generator.integers(width)) - columns // 2
        return 1.0, (max(top, 0), max(left, 0), min(top + rows, height), min(left + columns, width))


def Mixup(alpha: float) -> Mixing:
    """Mixup only (Zhang et al., 2018); the paper's ablation uses alpha 0.5."""
    return Mixing(mixup=alpha)


def CutMix(alpha: float) -> Mixing:
    """CutMix only (Yun et al., 2019); the paper's ablation uses alpha 1.0."""
    return Mixing(cutmix=alpha)


def mix_labels(targets: Tensor, own_share: Tensor) -> Tensor:
    """Mix targets in the same shares as :meth:`Mixing.mix` mixed their images.

    Args:
        targets: Floating point ``(batch, classes)``.
        own_share: ``(batch,)``, from :meth:`Mixing.mix`.

    Returns:
        The mixed targets, ``(batch, classes)``, of the same dtype.
    """
    others = targets.reshape(-1, 2, *targets.shape[1:]).flip(1).flatten(0, 1)
    return others.lerp(targets, own_share[:, None].to(targets.dtype))


def _own_share(weights: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """The weight of the own image at each pixel: float32 ``(pairs, H, W)``."""
    rows = torch.arange(height, device=boxes.device)
    columns = torch.arange(width, device=boxes.device)
    top, left, bottom, right = (edge[:, None] for edge in boxes.unbind(1))
    in_rows, in_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return torch.where(in_rows[:, :, None] & in_columns[:, None, :], 0.0, weights[:, None, None])
