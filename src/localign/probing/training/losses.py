"""The losses of heads, and their means over batches that several ranks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from localign.engine.schedule import computes_in_bf16
from localign.options.probe import HeadSpec, ProbeConfig
from localign.probing.features import Rows
from localign.probing.labels import PatchLabels

SeededHead = tuple[int, HeadSpec]
"""Identifies one head of a run by its seed and its spec."""


def head_loss(spec: HeadSpec, logits: Tensor, labels: PatchLabels) -> Tensor:
    """The mean loss, float32: cross-entropy for the task ``majority``, else binary cross-entropy over classes.

    The mean is over the patches, or for the task ``global`` the images, that count; 0 if none does.
    """
    logits, counted = logits.float(), labels.counted
    targets = {"local": labels.patch, "global": labels.image, "majority": labels.majority}[spec.task]
    if counted is not None:
        kept = counted.any(dim=1) if spec.task == "global" else counted
        if not bool(kept.any()):
            return logits.sum() * 0.0
        logits, targets = logits[kept], targets[kept]
    if spec.task == "majority":
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    return F.binary_cross_entropy_with_logits(logits, targets.float())


def counted_units(labels: PatchLabels) -> tuple[int, int]:
    """The patches and the images of a batch that count."""
    if labels.counted is None:
        return labels.majority.numel(), len(labels)
    return int(labels.counted.sum()), int(labels.counted.any(dim=1).sum())


def task_shares(labels: PatchLabels, whole: Sequence[int]) -> dict[str, float]:
    """For each task, a batch's part of the patches or images that the caller averages over."""
    patches, images = (own / max(1, all_) for own, all_ in zip(counted_units(labels), whole, strict=True))
    return {"local": patches, "majority": patches, "global": images}


def mean_losses(
    heads: Mapping[SeededHead, nn.Module],
    tokens: Tensor,
    labels: PatchLabels,
    config: ProbeConfig,
    shares: Mapping[str, float],
    *,
    learn: bool = False,
) -> Tensor:
    """Mean losses of the heads on a batch, multiplied by the share of their task.

    Args:
        heads: On the tokens' device.
        tokens, labels: One batch.
        config: Precision.
        shares: For each task, see :func:`task_shares`.
        learn: Add gradients to the parameters. The backward pass of each head directly follows its forward pass, so
            that only one head's activations exist at a time.

    Returns:
        float32 ``(heads,)``, zeros for an empty batch.
    """
    losses = torch.zeros(len(heads), device=tokens.device)
    if not len(tokens):
        return losses
    tokens = tokens.float()
    in_bf16 = computes_in_bf16(config, tokens.device.type)
    for i, ((_, spec), head) in enumerate(heads.items()):
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=in_bf16):
            loss = shares[spec.task] * head_loss(spec, head(tokens), labels)
        if learn:
            torch.autograd.backward(loss)
        losses[i] = loss.detach()
    return losses


def chunks(rows: Rows, size: int) -> list[Rows]:
    """Consecutive pieces of at most ``size`` rows."""
    return [rows[begin : begin + size] for begin in range(0, len(rows), size)]
