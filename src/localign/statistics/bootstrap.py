"""The bootstrap over images: macro recall in many replicates at once, and percentile intervals.

A replicate draws as many images as there are, with replacement. How often it draws each image is one row of a weight
matrix ``(replicates, images)``. The matrix times counts ``(images, classes)`` gives the hits and positives of every
class in every replicate. Weights depend on the replicate and the number of images alone: two models on the same images
get the same draws, so their difference is paired.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from localign import rng

REPLICATES = 1000
LEVEL = 0.95
SEED = 0
"""Fixed, so that models of different runs are compared on the same draws."""
CHUNK_BYTES = 64 * 2**20
"""Memory for the part of the weight matrix that exists at a time."""


def replicate_weights(images: int, begin: int, end: int) -> Tensor:
    """How often each of the replicates ``begin..end-1`` draws each image.

    Returns:
        float32 ``(end - begin, images)``; each row sums to ``images`` and depends on its replicate only.
    """
    weights = np.empty((end - begin, images), dtype=np.float32)
    for row, replicate in enumerate(range(begin, end)):
        drawn = rng.generator(SEED, "bootstrap", replicate).integers(images, size=images)
        weights[row] = np.bincount(drawn, minlength=images)
    return torch.from_numpy(weights)


def weight_chunks(images: int, replicates: int, row_bytes: int) -> Iterator[Tensor]:
    """The weight matrix in chunks of consecutive replicates.

    Args:
        images: Columns of the matrix.
        replicates: Rows of the matrix.
        row_bytes: Memory that the caller needs per replicate; a chunk takes up to :data:`CHUNK_BYTES`.

    Yields:
        float32 ``(rows, images)``, see :func:`replicate_weights`.
    """
    step = max(1, CHUNK_BYTES // max(1, row_bytes))
    for begin in range(0, replicates, step):
        yield replicate_weights(images, begin, min(begin + step, replicates))


def macro_recalls(counts: Sequence[tuple[Tensor, Tensor]], replicates: int = REPLICATES) -> list[Tensor]:
    """Macro recall in every replicate, for several heads on the same images.

    Args:
        counts: Per head the true positives and the positives, integers ``(images, classes)``, all on one device.
        replicates: Number of replicates.

    Returns:
        Per head float64 ``(replicates,)`` on the CPU: the mean over the classes with positives in the replicate, NaN
        in a replicate without positives.
    """
    if not counts:
        return []
    images, device = len(counts[0][0]), counts[0][0].device
    parts: list[list[Tensor]] = [[] for _ in counts]
    for chunk in weight_chunks(images, replicates, row_bytes=4 * images):
        weights = chunk.to(device)
        for part, (hits, positives) in zip(parts, counts, strict=True):
            recall = (weights @ hits.float()) / (weights @ positives.float())
            part.append(recall.nanmean(dim=1).cpu().double())
    return [torch.cat(part) for part in parts]


def percentile_interval(replicates: Tensor) -> list[float] | None:
    """The 95 % percentile interval ``[low, high]`` of a statistic's replicates.

    Args:
        replicates: float ``(replicates,)``; NaN where a replicate does not define the statistic.

    Returns:
        None where no replicate defines it.
    """
    known = replicates[~replicates.isnan()]
    if not len(known):
        return None
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=known.dtype)
    return [float(v) for v in torch.quantile(known, tails)]
