"""Intervals over images: the bootstrap of macro recall, vectorised.

A replicate draws as many images as there are, with replacement. How often it draws each is one row of a
weight matrix ``(replicates, images)``; times the counts ``(images, classes)`` that gives every class's hits
and positives in every replicate at once. The weights are keyed by replicate and number of images alone: two
models judged on the same images are compared on the same draws, so their difference is paired.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from localign import rng

REPLICATES = 1000
LEVEL = 0.95
SEED = 0
"""The same for every run: what is compared must be drawn alike."""
CHUNK_BYTES = 64 * 2**20
"""Of the weight matrix that is held at a time."""


def replicate_weights(images: int, begin: int, end: int) -> Tensor:
    """How often replicates begin..end-1 draw each image.

    Returns:
        float32 ``(end - begin, images)``, each row of sum ``images``; a function of its own replicate only.
    """
    weights = np.empty((end - begin, images), dtype=np.float32)
    for row, replicate in enumerate(range(begin, end)):
        drawn = rng.generator(SEED, "bootstrap", replicate).integers(images, size=images)
        weights[row] = np.bincount(drawn, minlength=images)
    return torch.from_numpy(weights)


def macro_recalls(counts: Sequence[tuple[Tensor, Tensor]], replicates: int = REPLICATES) -> list[Tensor]:
    """Macro recall in every replicate, for several heads judged on the same images.

    Args:
        counts: Per head, right positive predictions and positives, integers ``(images, classes)``, on one
            device. The mean is over the classes that occur in the replicate.
        replicates: How many.

    Returns:
        Per head float64 ``(replicates,)`` on the CPU; NaN where no class occurs.
    """
    if not counts:
        return []
    images, device = len(counts[0][0]), counts[0][0].device
    step = max(1, CHUNK_BYTES // (4 * max(1, images)))
    parts: list[list[Tensor]] = [[] for _ in counts]
    for begin in range(0, replicates, step):
        weights = replicate_weights(images, begin, min(begin + step, replicates)).to(device)
        for part, (hits, positives) in zip(parts, counts, strict=True):
            recall = (weights @ hits.float()) / (weights @ positives.float())
            part.append(recall.nanmean(dim=1).cpu().double())
    return [torch.cat(part) for part in parts]


def interval(recalls: Tensor) -> list[float] | None:
    """The 95 % percentile interval, ``[low, high]``, of a figure's replicates; None where none is defined."""
    known = recalls[~recalls.isnan()]
    if not len(known):
        return None
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=known.dtype)
    return [float(v) for v in torch.quantile(known, tails)]
