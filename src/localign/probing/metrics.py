"""Recall, precision and accuracy from counts that add up over batches and over ranks.

Both accumulators hold integer tensors on the device of the predictions. ``update`` adds a batch, without a Python loop
over classes and without waiting for the device, and returns each image's counts, which the bootstrap over images needs.
``state()`` returns the tensors; with several ranks the caller sums them over ranks in place. ``compute`` divides.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from localign.results import Metrics

SIZE_BINS = 10
"""Number of bins of object size. Bin b has objects that cover a share in (b/10, (b+1)/10] of the image's patches."""


class _Sums:
    """Named integer tensors that batches are added to."""

    _sums: dict[str, Tensor]

    def state(self) -> dict[str, Tensor]:
        """The int64 tensors themselves; a caller may sum each over ranks in place."""
        return self._sums


class MultiLabelCounts(_Sums):
    """Counts for multi-label predictions: true and false positives and negatives by class, and hits by object size.

    Args:
        classes: Number of classes, C.
        device: Device of the predictions.
    """

    def __init__(self, classes: int, device: torch.device | str = "cpu") -> None:
        def zeros(n: int) -> Tensor:
            return torch.zeros(n, dtype=torch.int64, device=device)

        self._sums = {name: zeros(classes) for name in ("tp", "fp", "fn", "tn")}
        self._sums |= {"size_tp": zeros(SIZE_BINS), "size_positives": zeros(SIZE_BINS)}

    def update(
        self,
        logits: Tensor,
        targets: Tensor,
        patch_targets: Tensor | None = None,
        counted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Add a batch of images.

        Args:
            logits: ``(B, n, C)`` for patches or ``(B, C)`` for images. A class is predicted if its logit is above 0,
                that is if its probability is above 0.5.
            targets: bool, the same shape.
            patch_targets: bool ``(B, n, C)``, the patches of each class, which give the object sizes. For patches the
                default is ``targets``; for images nothing is counted by size without it.
            counted: bool ``(B, n)``, the patches that count; all by default. An image counts if one of its patches
                does.

        Returns:
            The true positives and the positives by image and class, each int64 ``(B, C)``.
        """
        decisions = counted
        if logits.dim() == 2:
            logits, targets = logits[:, None], targets[:, None]
            decisions = None if counted is None else counted.any(dim=1, keepdim=True)
        elif patch_targets is None:
            patch_targets = targets
        targets = targets.bool()
        predicted = logits > 0
        if decisions is not None:
            predicted, targets = predicted & decisions[..., None], targets & decisions[..., None]
        hits = (predicted & targets).sum(dim=1)  # (B, C)
        positives = targets.sum(dim=1)
        tp, fp, fn = hits.sum(0), predicted.sum(dim=(0, 1)), positives.sum(0)
        fp, fn = fp - tp, fn - tp
        sums = self._sums
        sums["tp"] += tp
        sums["fp"] += fp
        sums["fn"] += fn
        total = logits.shape[0] * logits.shape[1] if decisions is None else decisions.sum()
        sums["tn"] += total - tp - fp - fn
        if patch_targets is not None:
            patches = patch_targets.shape[1] if counted is None else counted.sum(1, keepdim=True).clamp(min=1)
            self._update_sizes(hits, positives, patch_targets, patches)
        return hits, positives

    def _update_sizes(
        self, hits: Tensor, positives: Tensor, patch_targets: Tensor, patches: int | Tensor
    ) -> None:
        covered = patch_targets.bool().sum(dim=1)  # (B, C)
        # Integer division puts a share of exactly 2/10 into bin 1; float division might not.
        bins = torch.div(covered * SIZE_BINS - 1, patches, rounding_mode="floor").clamp_(min=0).view(-1)
        known = (
            covered > 0
        )  # an image may have the class "unlabeled" while none of its patches counts as unlabeled
        self._sums["size_tp"].index_add_(0, bins, (hits * known).view(-1))
        self._sums["size_positives"].index_add_(0, bins, (positives * known).view(-1))

    def compute(self) -> Metrics:
        """The metrics. Means over classes are over the classes with at least one positive, as published.

        Returns:
            ``macro_recall`` (mean of tp / (tp + fn)), ``macro_precision`` (mean of tp / (tp + fp), 0 for a class that
            is never predicted), ``macro_f1``, ``macro_accuracy``, ``accuracy`` (share of correct binary decisions);
            by class ``class_recall``, ``class_precision``, ``class_f1`` (None for a class without positives) and
            ``class_positives``; by object size ``size_recall`` (over all pairs of image and class in the bin; None
            for an empty bin) and ``size_positives``.
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
    """Counts for one label per patch: true positives, positives and predictions by class."""

    def __init__(self, classes: int, device: torch.device | str = "cpu") -> None:
        names = ("tp", "positives", "predicted")
        self._sums = {name: torch.zeros(classes, dtype=torch.int64, device=device) for name in names}

    def update(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Add a batch of images. The class with the largest logit is predicted.

        Args:
            logits: ``(B, n, C)``.
            targets: int64 ``(B, n)``; -1 for a patch that does not count.

        Returns:
            The true positives and the positives by image and class, each int64 ``(B, C)``.
        """
        predicted = logits.argmax(dim=-1)
        cells = torch.zeros(3, len(targets), logits.shape[-1], dtype=torch.int64, device=logits.device)
        hits, positives, chosen = cells
        counted, places = (targets >= 0).long(), targets.clamp(min=0)
        hits.scatter_add_(1, places, (predicted == targets).long())
        positives.scatter_add_(1, places, counted)
        chosen.scatter_add_(1, predicted, counted)
        for name, value in zip(("tp", "positives", "predicted"), cells.sum(dim=1), strict=True):
            self._sums[name] += value
        return hits, positives

    def compute(self) -> Metrics:
        """The metrics. Means over classes are over the classes that occur.

        Returns:
            ``macro_recall``, ``macro_precision``, ``accuracy`` (share of correct patches), ``class_recall`` (None for
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
    """The mean of the entries that are not NaN; None if all are NaN."""
    return _number(values.nanmean())
