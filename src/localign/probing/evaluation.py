"""Evaluation of trained heads on held-out images, over all ranks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from localign.engine.distributed import DistributedContext
from localign.engine.progress import ProgressCallback
from localign.engine.schedule import computes_in_bf16
from localign.options.probe import ProbeConfig
from localign.probing.features import Features
from localign.probing.labels import PatchLabels
from localign.probing.metrics import MajorityCounts, MultiLabelCounts
from localign.probing.training import SeededHead, chunks
from localign.results import Metrics
from localign.statistics.bootstrap import macro_recalls, percentile_interval


@dataclass
class HeadCounts:
    """A head's metrics on a source, and the counts by image that the bootstrap needs."""

    metrics: Metrics
    hits: Tensor
    """True positives, int32 ``(images, classes)``."""
    positives: Tensor
    """int32 ``(images, classes)``."""


@dataclass
class HeadMetrics:
    """A head's metrics on a source with a bootstrap interval."""

    metrics: Metrics
    """With ``macro_recall_interval``."""
    recalls: Tensor
    """Macro recall in each bootstrap replicate, float64 ``(replicates,)``."""


@torch.no_grad()
def evaluate_heads(
    heads: Mapping[SeededHead, nn.Module],
    features: Features,
    config: ProbeConfig,
    context: DistributedContext,
    progress: ProgressCallback | None = None,
) -> dict[SeededHead, HeadCounts]:
    """Compare every head's predictions with the targets, over the images of all ranks.

    Args:
        heads: Trained heads, on the context's device.
        features: Tokens and targets of the source.
        config: Precision, and images per batch.
        context: The ranks.
        progress: Called after each batch.
    """
    device, images = context.device, len(features)
    counts: dict[SeededHead, MajorityCounts | MultiLabelCounts] = {}
    for key in heads:
        majority = key[1].task == "majority"
        counts[key] = (
            MajorityCounts(features.codes, device) if majority else MultiLabelCounts(features.classes, device)
        )
    tasks = {spec.task for _, spec in heads}
    classes = {task: features.codes if task == "majority" else features.classes for task in tasks}
    positives = {
        task: torch.zeros(images, c, dtype=torch.int32, device=device) for task, c in classes.items()
    }
    hits = {key: torch.zeros_like(positives[key[1].task]) for key in heads}
    in_bf16 = computes_in_bf16(config, device.type)
    batches = chunks(features.rank_rows(), config.extract_batch)
    done = 0
    for rows, (tokens, labels) in zip(batches, features.batches(batches), strict=True):
        tokens, images_of_batch = tokens.float(), slice(int(rows[0]), int(rows[-1]) + 1)
        for key, head in heads.items():
            task = key[1].task
            with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
                logits = head(tokens)
            batch_hits, batch_positives = _count(counts[key], task, logits, labels)
            hits[key][images_of_batch] = batch_hits.int()
            positives[task][images_of_batch] = batch_positives.int()
        done += len(rows)
        if progress is not None:
            progress("evaluation", done, len(features.rank_rows()))
    all_positives = {task: context.all_reduce(p) for task, p in positives.items()}
    results = {}
    for key, count in counts.items():
        for value in count.state().values():
            value.copy_(context.all_reduce(value))
        results[key] = HeadCounts(count.compute(), context.all_reduce(hits[key]), all_positives[key[1].task])
    return results


def _count(
    counts: MajorityCounts | MultiLabelCounts, task: str, logits: Tensor, labels: PatchLabels
) -> tuple[Tensor, Tensor]:
    """Add a batch. Returns the true positives and the positives by image and class."""
    if isinstance(counts, MajorityCounts):
        return counts.update(logits, labels.majority)
    if task == "local":
        return counts.update(logits, labels.patch, counted=labels.counted)
    return counts.update(logits, labels.image, labels.patch, labels.counted)


class BestEpochs:
    """Each head's best epoch by macro recall on one source; on a tie, the first."""

    def __init__(self, features: Features, config: ProbeConfig, context: DistributedContext) -> None:
        self.features, self.config, self.context = features, config, context
        self._best: dict[SeededHead, tuple[HeadCounts, dict[str, Tensor]]] = {}

    def __call__(self, epoch: int, heads: Mapping[SeededHead, nn.Module]) -> None:
        """Evaluate the heads after an epoch, and store those that are better than before."""
        for key, counts in evaluate_heads(heads, self.features, self.config, self.context).items():
            best = self._best.get(key)
            if best is None or _recall(counts) > _recall(best[0]):
                counts.metrics["best_epoch"] = epoch
                self._best[key] = counts, copy.deepcopy(heads[key].state_dict())

    def restore(self, heads: Mapping[SeededHead, nn.Module]) -> dict[SeededHead, HeadCounts]:
        """Load each head's weights of its best epoch. Returns the counts of these epochs."""
        for key, head in heads.items():
            head.load_state_dict(self._best[key][1])
        return {key: counts for key, (counts, _) in self._best.items()}


def _recall(counts: HeadCounts) -> float:
    recall = counts.metrics["macro_recall"]
    return -1.0 if recall is None else recall


def with_intervals(counts: Mapping[SeededHead, HeadCounts]) -> dict[SeededHead, HeadMetrics]:
    """Add bootstrap intervals over images; every head is evaluated on the same draws."""
    recalls = macro_recalls([(c.hits, c.positives) for c in counts.values()])
    return {
        key: HeadMetrics({**c.metrics, "macro_recall_interval": percentile_interval(replicates)}, replicates)
        for (key, c), replicates in zip(counts.items(), recalls, strict=True)
    }
