"""Patch features of one model, small enough for a page, and principal components in a basis that models share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from localign.backbones import Backbone
from localign.engine.progress import ProgressCallback
from localign.errors import UserError
from localign.explore.attention import last_attention
from localign.pictures import joint_basis
from localign.text.printing import printable

INT8 = 127
"""The largest stored number of a patch."""
COLOUR_RANGE = (1.0, 99.0)
"""Percentiles of the components that become the darkest and the brightest colour."""


@dataclass(frozen=True)
class PageFeatures:
    """What a page holds of one model; k images, n patches, d channels."""

    features: NDArray[np.generic]
    """int8 or float16 ``(k, n, d)``: patch tokens of the last layer after the final norm, each in a scale of its own,
    which cosine similarities do not depend on."""
    error: float
    """The largest difference between a cosine similarity of stored features and of float32 features, over all pairs of
    patches of one image."""
    mean: NDArray[np.float64]
    """``(d,)``, the mean of the tokens, each scaled to length 1."""
    covariance: NDArray[np.float64]
    """``(d, d)``, of the same tokens."""
    attention: NDArray[np.uint8] | None
    """``(k, n, n)``, from patch (row) to patch, mean over heads of the last block; the largest of each row is 255."""
    attention_peak: NDArray[np.float32] | None
    """``(k, n)``, the largest of each row."""
    attention_prefix: NDArray[np.float32] | None
    """``(k, n)``, the share that goes to class and register tokens."""


def bytes_per_image(backbone: Backbone, dtype: str, attention: bool) -> int:
    """Bytes of one image's features and attention."""
    n = backbone.num_patches
    return n * backbone.width * np.dtype(dtype).itemsize + (n * n if attention else 0)


def quantise(tokens: Tensor, dtype: str) -> NDArray[np.generic]:
    """Tokens ``(..., d)``, each divided by its largest magnitude, as int8 (times 127) or float16."""
    scaled = tokens / tokens.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)
    if dtype == "int8":
        return (scaled * INT8).round().to(torch.int8).cpu().numpy()
    return scaled.half().cpu().numpy()


@torch.inference_mode()
def page_features(
    backbone: Backbone,
    images: Sequence[Tensor],
    *,
    dtype: str,
    attention: bool,
    batch_size: int,
    progress: ProgressCallback,
) -> PageFeatures:
    """Features of images, computed batch by batch; in memory are only the stored ones and one batch.

    Args:
        backbone: In eval mode.
        images: uint8 ``(3, height, width)`` at the backbone's size.
        dtype: ``int8`` or ``float16``.
        attention: Also return the attention, where the backbone has plain attention.
        batch_size: Images per forward pass.
        progress: Called after each batch.

    Raises:
        UserError: A token is not finite.
    """
    device, prefix = next(backbone.parameters()).device, backbone.num_prefix_tokens
    stored, rows, peaks, shares = [], [], [], []
    total = torch.zeros(backbone.width, dtype=torch.float64)
    products = torch.zeros(backbone.width, backbone.width, dtype=torch.float64)
    error = 0.0
    for start in range(0, len(images), batch_size):
        batch = torch.stack(list(images[start : start + batch_size])).to(device)
        with last_attention(backbone) as collected:
            tokens = backbone.tokens(backbone.normalise(batch)).float()[:, prefix:]
        if not tokens.isfinite().all():
            raise UserError(f"the features of {printable(backbone.name)} are not numbers; check the weights")
        unit = F.normalize(tokens, dim=-1).cpu()
        small = quantise(tokens, dtype)
        again = F.normalize(torch.from_numpy(small.astype(np.float32)), dim=-1)
        error = max(error, float((unit @ unit.mT - again @ again.mT).abs().max()))
        flat = unit.flatten(0, 1).double()
        total += flat.sum(dim=0)
        products += flat.T @ flat
        stored.append(small)
        if attention and collected:
            weights = collected[0][:, prefix:].cpu()
            shares.append(weights[..., :prefix].sum(dim=-1).numpy())
            peak = weights[..., prefix:].amax(dim=-1)
            peaks.append(peak.numpy())
            rows.append((weights[..., prefix:] / peak[..., None] * 255).round().to(torch.uint8).numpy())
        progress("features", start + len(batch), len(images))
    count = len(images) * backbone.num_patches
    mean = total / count
    covariance = products / count - torch.outer(mean, mean)
    return PageFeatures(
        features=np.concatenate(stored),
        error=error,
        mean=mean.numpy(),
        covariance=covariance.numpy(),
        attention=np.concatenate(rows) if rows else None,
        attention_peak=np.concatenate(peaks).astype(np.float32) if peaks else None,
        attention_prefix=np.concatenate(shares).astype(np.float32) if shares else None,
    )


@dataclass(frozen=True)
class Colours:
    """Patches of one model in three principal components."""

    rgb: NDArray[np.uint8]
    """``(k, n, 3)``."""
    share: list[float]
    """Share of the model's variance along each component."""
    basis: int
    """Number of the basis; colours of models with the same basis can be compared."""


def joint_colours(models: Sequence[PageFeatures]) -> list[Colours]:
    """Three principal components of each model's patches, in one basis for all models with the same number of channels.

    Tokens are scaled to length 1 and centred per model, and each model counts with the same total variance, so that
    neither a shift between models nor a larger spread decides the basis. The colour range is shared, too.
    """
    widths = list(dict.fromkeys(model.features.shape[-1] for model in models))
    found: dict[int, Colours] = {}
    for basis, width in enumerate(widths):
        group = [i for i, model in enumerate(models) if model.features.shape[-1] == width]
        variances = {i: max(float(np.trace(models[i].covariance)), 1e-30) for i in group}
        axes = joint_basis([models[i].covariance for i in group])
        scores = {i: _scores(models[i], axes) / np.sqrt(variances[i]) for i in group}
        low, high = np.percentile(
            np.concatenate([s.reshape(-1, 3) for s in scores.values()]), COLOUR_RANGE, axis=0
        )
        for i in group:
            share = np.einsum("dc,de,ec->c", axes, models[i].covariance, axes) / variances[i]
            found[i] = Colours(to_rgb(scores[i], low, high), share.tolist(), basis)
    return [found[i] for i in range(len(models))]


def to_rgb(
    scores: NDArray[np.floating], low: NDArray[np.floating], high: NDArray[np.floating]
) -> NDArray[np.uint8]:
    """Components ``(..., 3)`` as colours: ``low`` and less is 0, ``high`` and more is 255."""
    shares = ((scores - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    return np.asarray((shares * 255).round(), dtype=np.uint8)


def _scores(model: PageFeatures, axes: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(k, n, 3)``, from the stored features, image by image."""
    scores = []
    for patches in model.features:
        unit = patches.astype(np.float64)
        unit /= np.maximum(np.linalg.norm(unit, axis=-1, keepdims=True), 1e-30)
        scores.append((unit - model.mean) @ axes)
    return np.stack(scores)
