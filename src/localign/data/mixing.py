"""Mixup and CutMix of images, and of labels where there are some: the alignment has none to mix.

The partner of the sample at global position p is its neighbour p ^ 1, and what is drawn for the pair is keyed
by p // 2. Pairs never cross a micro-batch, so a sample is mixed alike on any number of ranks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from localign import rng
from localign.errors import UserError


class Mixing:
    """Mixup and / or CutMix between the two images of each pair of neighbours.

    With lam ~ Beta(alpha, alpha) drawn per pair, Mixup gives ``lam * own + (1 - lam) * other``; CutMix puts a
    box of the other image, of area share 1 - lam before it is clipped at the border, in its place. Where both
    are given each pair takes one of them with probability 0.5.

    Args:
        mixup: Mixup's alpha, > 0, or None.
        cutmix: CutMix's alpha, > 0, or None.

    Raises:
        UserError: Neither is given, or an alpha is not positive.
    """

    def __init__(self, mixup: float | None = None, cutmix: float | None = None) -> None:
        if mixup is None and cutmix is None:
            raise UserError("mixing needs an alpha for Mixup or for CutMix")
        for name, alpha in (("Mixup", mixup), ("CutMix", cutmix)):
            if alpha is not None and not (alpha > 0 and math.isfinite(alpha)):
                raise UserError(f"{name}'s alpha must be a positive number, not {alpha}")
        self.mixup, self.cutmix = mixup, cutmix

    def __call__(self, images: Tensor, positions: Tensor, seed: int) -> Tensor:
        """Mix a micro-batch on its own device.

        Args:
            images: ``(batch, channels, H, W)``, uint8 or floating point.
            positions: int64 ``(batch,)``, consecutive global positions from an even one; on any device.
            seed: The run's seed.

        Returns:
            A new tensor of the images' shape and dtype (uint8 is rounded).

        Raises:
            UserError: The micro-batch does not consist of whole pairs.
        """
        return self.mix(images, positions, seed)[0]

    def mix(self, images: Tensor, positions: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """As calling it, with what each sample kept of itself.

        Returns:
            The mixed images; and float32 ``(batch,)`` on their device, the share in 0..1 of each sample's own
            image, after CutMix's box was clipped. The rest is its neighbour's; see :func:`mix_labels`.
        """
        places = positions.tolist()
        first, second = places[::2], places[1::2]
        if len(first) != len(second) or any(p % 2 or q != p + 1 for p, q in zip(first, second, strict=True)):
            raise UserError(
                f"mixing needs micro-batches of whole neighbouring pairs, not {len(places)} samples"
            )
        height, width = images.shape[-2:]
        draws = [self._draw(seed, p // 2, height, width) for p in first]
        weights = torch.tensor([lam for lam, _ in draws], dtype=torch.float32).to(images.device)
        boxes = torch.tensor([box for _, box in draws], dtype=torch.int64).reshape(-1, 4).to(images.device)
        own = _own_share(weights, boxes, height, width)[:, None, None]
        pairs = images.unflatten(0, (-1, 2)) if places else images[None]
        exact = pairs if images.is_floating_point() else pairs.float()
        mixed = torch.where(own == 1, exact, own * exact + (1 - own) * exact.flip(1))
        mixed = mixed if images.is_floating_point() else mixed.round()
        share = own.mean(dim=(1, 2, 3, 4)).repeat_interleave(2)
        return mixed.to(images.dtype).reshape(images.shape), share

    def _draw(self, seed: int, pair: int, height: int, width: int) -> tuple[float, tuple[int, int, int, int]]:
        """(Mixup's weight of the own image, CutMix's box as top, left, bottom, right); one is void."""
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
    """Mixup alone (Zhang et al., 2018); the paper's ablation takes alpha 0.5."""
    return Mixing(mixup=alpha)


def CutMix(alpha: float) -> Mixing:
    """CutMix alone (Yun et al., 2019); the paper's ablation takes alpha 1.0."""
    return Mixing(cutmix=alpha)


def mix_labels(targets: Tensor, own_share: Tensor) -> Tensor:
    """Targets mixed in the shares in which :meth:`Mixing.mix` mixed their images.

    Args:
        targets: Floating point ``(batch, classes)``.
        own_share: ``(batch,)``, as given by :meth:`Mixing.mix`.
    """
    others = targets.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return others.lerp(targets, own_share[:, None].to(targets.dtype))


def _own_share(weights: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Per pair and pixel, the own image's share: float32 ``(pairs, H, W)``."""
    rows = torch.arange(height, device=boxes.device)
    columns = torch.arange(width, device=boxes.device)
    top, left, bottom, right = (edge[:, None] for edge in boxes.unbind(1))
    in_rows, in_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return torch.where(in_rows[:, :, None] & in_columns[:, None, :], 0.0, weights[:, None, None])
