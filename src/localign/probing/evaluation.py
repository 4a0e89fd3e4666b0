"""What trained heads say about held-out images, counted on the device and over all ranks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from localign.engine.distributed import DistributedContext
from localign.options.probe import ProbeConfig
from localign.probing.features import Features
from localign.probing.labels import PatchLabels
from localign.probing.metrics import MajorityCounts, MultiLabelCounts
from localign.probing.training import Member, Progress, chunks, uses_bfloat16
from localign.statistics.bootstrap import interval, macro_recalls


@dataclass
class HeadCounts:
    """What a head's predictions on a source came to."""

    figures: dict[str, Any]
    """Of the metrics' ``compute``."""
    hits: Tensor
    """int32 ``(images, classes)``: right positive predictions."""
    positives: Tensor
    """int32 ``(images, classes)``."""


@dataclass
class HeadMetrics:
    """A head's figures on a source, and how they scatter."""

    figures: dict[str, Any]
    """Metrics, with ``macro_recall_interval``."""
    recalls: Tensor
    """Macro recall in each bootstrap replicate, float64 ``(replicates,)``."""


@torch.no_grad()
def judge_heads(
    heads: Mapping[Member, nn.Module],
    features: Features,
    config: ProbeConfig,
    context: DistributedContext,
    progress: Progress | None = None,
) -> dict[Member, HeadCounts]:
    """Every head's predictions against the targets, over all ranks' images."""
    device, images = context.device, len(features)
    counts: dict[Member, MajorityCounts | MultiLabelCounts] = {}
    for member in heads:
        majority = member[1].task == "majority"
        counts[member] = (
            MajorityCounts(features.codes, device) if majority else MultiLabelCounts(features.classes, device)
        )
    tasks = {spec.task for _, spec in heads}
    classes = {task: features.codes if task == "majority" else features.classes for task in tasks}
    positives = {
        task: torch.zeros(images, c, dtype=torch.int32, device=device) for task, c in classes.items()
    }
    hits = {m: torch.zeros_like(positives[m[1].task]) for m in heads}
    rows = chunks(features.own(), config.extract_batch)
    done = 0
    for wanted, (tokens, labels) in zip(rows, features.batches(rows), strict=True):
        tokens, at = tokens.float(), slice(int(wanted[0]), int(wanted[-1]) + 1)
        for member, head in heads.items():
            task = member[1].task
            with torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(config.precision, device)):
                logits = head(tokens)
            found = _count(counts[member], task, logits, labels)
            hits[member][at], positives[task][at] = (t.int() for t in found)
        done += len(wanted)
        if progress is not None:
            progress("evaluation", done, len(features.own()))
    summed = {task: context.all_reduce(p) for task, p in positives.items()}
    judgements = {}
    for member, count in counts.items():
        for value in count.state().values():
            value.copy_(context.all_reduce(value))
        judgements[member] = HeadCounts(
            count.compute(), context.all_reduce(hits[member]), summed[member[1].task]
        )
    return judgements


def _count(
    counts: MajorityCounts | MultiLabelCounts, task: str, logits: Tensor, labels: PatchLabels
) -> tuple[Tensor, Tensor]:
    """Add a batch; per image and class the hits and the positives."""
    if isinstance(counts, MajorityCounts):
        return counts.update(logits, labels.majority)
    if task == "local":
        return counts.update(logits, labels.patch)
    return counts.update(logits, labels.image, labels.patch)


class BestEpochs:
    """Each head's best epoch by macro recall on one source; of equal ones, the first."""

    def __init__(self, features: Features, config: ProbeConfig, context: DistributedContext) -> None:
        self.features, self.config, self.context = features, config, context
        self.kept: dict[Member, tuple[HeadCounts, dict[str, Tensor]]] = {}

    def __call__(self, epoch: int, heads: Mapping[Member, nn.Module]) -> None:
        for member, judgement in judge_heads(heads, self.features, self.config, self.context).items():
            before = self.kept.get(member)
            if before is None or _recall(judgement) > _recall(before[0]):
                judgement.figures["best_epoch"] = epoch
                self.kept[member] = judgement, copy.deepcopy(heads[member].state_dict())

    def restored(self, heads: Mapping[Member, nn.Module]) -> dict[Member, HeadCounts]:
        """The judgements of the best epochs, whose weights the heads get back."""
        for member, head in heads.items():
            head.load_state_dict(self.kept[member][1])
        return {member: judgement for member, (judgement, _) in self.kept.items()}


def _recall(judgement: HeadCounts) -> float:
    recall = judgement.figures["macro_recall"]
    return -1.0 if recall is None else recall


def with_intervals(judgements: Mapping[Member, HeadCounts]) -> dict[Member, HeadMetrics]:
    """Add the bootstrap over images, drawn alike for all heads."""
    recalls = macro_recalls([(j.hits, j.positives) for j in judgements.values()])
    return {
        member: HeadMetrics({**judgement.figures, "macro_recall_interval": interval(replicates)}, replicates)
        for (member, judgement), replicates in zip(judgements.items(), recalls, strict=True)
    }
