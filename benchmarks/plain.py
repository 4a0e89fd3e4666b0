"""Training and testing of one probing head in a plain script, to which the suite is compared.

Each step loads images and runs them through the frozen backbone, computes patch labels in a loop over patches, runs
the head's blocks at all tokens, and uses PyTorch's AdamW. Initialisation, order of the samples and schedule are those
of the suite, so that recalls are comparable.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.labels import numpy_loop
from localign import rng
from localign.backbones import Backbone
from localign.data.stream import SampleStream
from localign.data.transforms import EvalTransform
from localign.probing import Geometry, HeadSpec, LabelledSource, PatchLabels, ProbeConfig, build_head
from localign.probing.heads import TransformerHead
from localign.probing.training import ORDER_SEED, head_loss, learning_rate


class PlainBatches:
    """Tokens and patch labels of a source's images."""

    def __init__(self, backbone: Backbone, source: LabelledSource, device: torch.device) -> None:
        self.backbone, self.source, self.device = backbone, source, device
        self.view = EvalTransform(backbone.image_size, mode="square")

    def __call__(self, rows: Any) -> tuple[Tensor, PatchLabels]:
        """The tokens and targets of the given images."""
        pairs = [self.source.load_labelled(int(row)) for row in rows]
        images = torch.stack([self.view(image) for image, _ in pairs])
        maps = torch.stack([self.view.labels(labels) for _, labels in pairs])
        attributes = self.source.attributes
        patch, _ = self.backbone.patch_size
        labels = numpy_loop(maps, patch, len(self.source.classes), attributes)
        with torch.no_grad():
            tokens = self.backbone.tokens(self.backbone.normalise(images.to(self.device)))
        return tokens, labels.to(self.device)


def plain_run(
    backbone: Backbone,
    train: LabelledSource,
    test: LabelledSource,
    spec: HeadSpec,
    config: ProbeConfig,
    device: torch.device,
) -> float:
    """Macro recall of one trained head on the test source, over the classes that occur in it."""
    backbone.eval()
    with rng.seeded_globals(config.seed, f"probe head {spec.label} {spec.task}"):
        head = build_head(spec.head, Geometry.of(backbone), len(train.classes), spec.task).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    steps, warmup = config.resolved(len(train))
    stream, batches = SampleStream(ORDER_SEED, len(train)), PlainBatches(backbone, train, device)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, warmup, config.lr, config.final_lr)
        tokens, labels = batches(stream.indices(step * config.batch, (step + 1) * config.batch))
        loss = head_loss(spec, full_logits(head, tokens), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return _macro_recall(head, spec, PlainBatches(backbone, test, device), config.batch)


def full_logits(head: nn.Module, tokens: Tensor) -> Tensor:
    """A head's logits, computed by running every block at every token."""
    logits: Tensor
    if not isinstance(head, TransformerHead):
        logits = head(tokens)
        return logits
    outputs = head.norm(head.blocks(head.norm_pre(tokens + head.positions)))
    prefix = head.num_prefix_tokens
    pooled = outputs[:, : prefix or None].mean(dim=1) if head.per_image else outputs[:, prefix:]
    logits = head.linear(pooled)
    return logits


@torch.no_grad()
def _macro_recall(head: nn.Module, spec: HeadSpec, batches: PlainBatches, batch: int) -> float:
    count = len(batches.source)
    hits = positives = torch.zeros(1)
    for begin in range(0, count, batch):
        tokens, labels = batches(np.arange(begin, min(begin + batch, count)))
        target = (labels.patch if spec.task == "local" else labels.image).flatten(0, -2)
        predicted = full_logits(head, tokens).flatten(0, -2) > 0
        hits = hits + (predicted & target).sum(0).cpu()
        positives = positives + target.sum(0).cpu()
    return float((hits / positives).nanmean())
