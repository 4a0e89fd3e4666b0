"""Recall and its companions as sums that add up: over batches, and over ranks.

Both accumulators hold integer tensors on the device of the predictions. ``update`` adds to them without a
Python loop over classes and without waiting for the device, and returns what each image contributed to
recall, from which intervals over images are made; ``compute`` is where the divisions are. ``state()`` returns
the tensors, so a distributed caller sums them in place before it computes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

SIZE_BINS = 10
"""Object sizes: bin b holds shares in (b/10, (b+1)/10] of an image's patches."""


class _Sums:
    """Named integer tensors that only ever grow by addition."""

    _sums: dict[str, Tensor]

    def state(self) -> dict[str, Tensor]:
        """The live tensors, int64; summing each over ranks in place merges the ranks."""
        return self._sums

    def merge(self, other: _Sums) -> None:
        """Add another accumulator's sums to these."""
        for name, value in self._sums.items():
            value += other._sums[name].to(value.device)


class MultiLabelCounts(_Sums):
    """Counts for multi-label predictions: right and wrong ones per class, and hits per object size.

    Args:
        classes: C.
        device: where predictions will come from.
    """

    def __init__(self, classes: int, device: torch.device | str = "cpu") -> None:
        def zeros(n: int) -> Tensor:
            return torch.zeros(n, dtype=torch.int64, device=device)

        self._sums = {name: zeros(classes) for name in ("tp", "fp", "fn", "tn")}
        self._sums |= {"size_tp": zeros(SIZE_BINS), "size_positives": zeros(SIZE_BINS)}

    def update(
        self, logits: Tensor, targets: Tensor, patch_targets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Add a batch of whole images.

        Args:
            logits: ``(B, n, C)`` for patches or ``(B, C)`` for images; a class is predicted above probability
                0.5, that is above logit 0.
            targets: bool, the same shape.
            patch_targets: bool ``(B, n, C)``, the patches each class covers, from which an object's size is
                known. Patch-level predictions use their own targets; image-level ones are not told apart by
                size where it is missing.

        Returns:
            int64 ``(B, C)`` each: per image and class the right positive predictions, and the positives.
        """
        if logits.dim() == 2:
            logits, targets = logits[:, None], targets[:, None]
        elif patch_targets is None:
            patch_targets = targets
        targets = targets.bool()
        predicted = logits > 0
        hits = (predicted & targets).sum(dim=1)  # (B, C), like all sums over an image below
        positives = targets.sum(dim=1)
        tp, fp, fn = hits.sum(0), predicted.sum(dim=(0, 1)), positives.sum(0)
        fp, fn = fp - tp, fn - tp
        sums = self._sums
        sums["tp"] += tp
        sums["fp"] += fp
        sums["fn"] += fn
        sums["tn"] += logits.shape[0] * logits.shape[1] - tp - fp - fn
        if patch_targets is not None:
            self._update_sizes(hits, positives, patch_targets)
        return hits, positives

    def _update_sizes(self, hits: Tensor, positives: Tensor, patch_targets: Tensor) -> None:
        patches = patch_targets.shape[1]
        covered = patch_targets.bool().sum(dim=1)  # (B, C)
        # In integers: a share of exactly 2/10 falls into bin 1, whatever float division makes of it.
        bins = torch.div(covered * SIZE_BINS - 1, patches, rounding_mode="floor").clamp_(min=0).view(-1)
        known = covered > 0  # an image may hold "unlabeled" without any patch that counts as such
        self._sums["size_tp"].index_add_(0, bins, (hits * known).view(-1))
        self._sums["size_positives"].index_add_(0, bins, (positives * known).view(-1))

    def compute(self) -> dict[str, Any]:
        """The figures, JSON-able; a mean over classes is over those with at least one positive, as published.

        Returns:
            ``macro_recall`` (mean of tp / (tp + fn)), ``macro_precision`` (tp / (tp + fp), 0 where a class is
            never predicted), ``macro_f1``, ``macro_accuracy``, ``accuracy`` (share of all binary decisions
            that are right); lists per class ``class_recall``, ``class_precision``, ``class_f1`` (None for a
            class without positives) and ``class_positives``; per object size ``size_recall`` (over all pairs
            of image and class in the bin together; None for an empty bin) and ``size_positives``.
        """
        sums = {name: value.double().cpu() for name, value in self._sums.items()}
        tp, fp, fn, tn = (sums[name] for name in ("tp", "fp", "fn", "tn"))
        positives = tp + fn
        occurs = positives > 0
        nan = torch.full_like(tp, math.nan)
        recall = tp / positives
        precision = torch.where(occurs, tp / (tp + fp).clamp(min=1), nan)
        f1 = torch.where(occurs, 2 * tp / (2 * tp + fp + fn), nan)
        decisions = (tp + fp + fn + tn).clamp(min=1)
        return {
            "macro_recall": _mean(recall),
            "macro_precision": _mean(precision),
            "macro_f1": _mean(f1),
            "macro_accuracy": _mean(torch.where(occurs, (tp + tn) / decisions, nan)),
            "accuracy": _number((tp + tn).sum() / decisions.sum()),
            "class_recall": _numbers(recall),
            "class_precision": _numbers(precision),
            "class_f1": _numbers(f1),
            "class_positives": [int(v) for v in positives],
            "size_recall": _numbers(sums["size_tp"] / sums["size_positives"]),
            "size_positives": [int(v) for v in sums["size_positives"]],
        }


class MajorityCounts(_Sums):
    """Counts for one label per patch: right predictions, positives and predictions per class."""

    def __init__(self, classes: int, device: torch.device | str = "cpu") -> None:
        names = ("tp", "positives", "predicted")
        self._sums = {name: torch.zeros(classes, dtype=torch.int64, device=device) for name in names}

    def update(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Add a batch of whole images; the largest logit is the prediction.

        Args:
            logits: ``(B, n, C)``.
            targets: int64 ``(B, n)``.

        Returns:
            As for :meth:`MultiLabelCounts.update`.
        """
        predicted = logits.argmax(dim=-1)
        cells = torch.zeros(3, len(targets), logits.shape[-1], dtype=torch.int64, device=logits.device)
        hits, positives, chosen = cells
        hits.scatter_add_(1, targets, (predicted == targets).long())
        positives.scatter_add_(1, targets, torch.ones_like(targets))
        chosen.scatter_add_(1, predicted, torch.ones_like(predicted))
        for name, value in zip(("tp", "positives", "predicted"), cells.sum(dim=1), strict=True):
            self._sums[name] += value
        return hits, positives

    def compute(self) -> dict[str, Any]:
        """The figures, JSON-able; means over classes are over those that occur.

        Returns:
            ``macro_recall``, ``macro_precision``, ``accuracy`` (share of patches), ``class_recall`` (None for
            a class that does not occur) and ``class_positives``.
        """
        tp, positives, predicted = (self._sums[n].double().cpu() for n in ("tp", "positives", "predicted"))
        nan = torch.full_like(tp, math.nan)
        recall = tp / positives
        return {
            "macro_recall": _mean(recall),
            "macro_precision": _mean(torch.where(positives > 0, tp / predicted.clamp(min=1), nan)),
            "accuracy": _number(tp.sum() / positives.sum()),
            "class_recall": _numbers(recall),
            "class_positives": [int(v) for v in positives],
        }


def _number(value: Tensor) -> float | None:
    number = float(value)
    return None if math.isnan(number) else number


def _numbers(values: Tensor) -> list[float | None]:
    return [_number(v) for v in values]


def _mean(values: Tensor) -> float | None:
    """The mean of the entries that are not NaN; None where there is none."""
    return _number(values.nanmean())
