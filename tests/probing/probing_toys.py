"""A fake backbone, labelled images of four colours, and features that contain their labels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from localign import rng
from localign.backbones.preprocessing import UNSTATED
from localign.engine.distributed import DistributedContext
from localign.probing import (
    Geometry,
    HeadSpec,
    LabelledSource,
    MemoryFeatures,
    PackedLabels,
    PatchLabels,
    ProbeConfig,
)

GEOMETRY = Geometry(width=16, num_heads=2, num_patches=4, num_prefix_tokens=1)
CLASSES = 5
ALONE = DistributedContext(0, 1, 0, torch.device("cpu"))
CONFIG = ProbeConfig(steps=120, batch=16, lr=1e-2, final_lr=1e-3, warmup_steps=10)
ALL = tuple(HeadSpec(head, task) for head in ("linear", "mlp", "transformer") for task in ("local", "global"))


class FakeBackbone(nn.Module):
    """Its tokens are projected mean patch colours. In training mode the tokens are NaN."""

    name = "fake"
    image_size, patch_size, grid, depth = (8, 8), (4, 4), (2, 2), 1
    num_patches, num_prefix_tokens, width, num_heads = 4, 1, 16, 2
    final_norm, soft_cap, mean, std = "norm", None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    preprocessing = UNSTATED

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed))
        self.weight = nn.Parameter(weight)
        self.forwards = 0

    @property
    def vit(self) -> nn.Module:
        return self

    def normalise(self, images: Tensor) -> Tensor:
        return images.float() / 127.5 - 1

    def tokens(self, images: Tensor, layer: int = -1, norm: bool = True) -> Tensor:
        assert (layer, norm) == (-1, True)
        self.forwards += len(images)
        patches = images.unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2)).flatten(2).transpose(1, 2)
        tokens = torch.cat([patches.mean(1, keepdim=True), patches], dim=1) @ self.weight
        return tokens * math.nan if self.training else tokens


def fake_backbone(seed: int = 0) -> Any:
    """A :class:`FakeBackbone`, typed so that it can stand for a Backbone."""
    return FakeBackbone(seed)


class Colours(LabelledSource):
    """Images of 2 x 2 patches, each black (unlabeled), red, green or blue."""

    kind = "colours"
    classes: tuple[str, ...] = ("unlabeled", "red", "green", "blue")

    def __init__(self, length: int, split: str, codes: int = 4) -> None:
        self.length, self.split, self.codes = length, split, codes

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return f"{self.split}-{index}"

    def fingerprint(self) -> str:
        return f"{self.split}{self.length}"

    def load_labelled(self, index: int) -> tuple[Image.Image, NDArray[np.int64]]:
        codes = rng.generator(0, self.split, index).integers(0, self.codes, (2, 2))
        labels = codes.repeat(4, 0).repeat(4, 1)
        palette = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=np.uint8)
        return Image.fromarray(palette[labels]), labels


def toy(count: int, seed: int) -> tuple[Tensor, PatchLabels]:
    """Features that contain the class of their patch; the class token contains the classes of the image."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, CLASSES, (count, 4), generator=generator)
    patch = nn.functional.one_hot(codes, CLASSES).bool()
    image = patch.any(1)
    tokens = torch.zeros(count, 5, 16)
    tokens[:, 1:, :CLASSES] = 4 * patch.float()
    tokens[:, 0, :CLASSES] = 4 * image.float()
    tokens += 0.1 * torch.randn(tokens.shape, generator=generator)
    return tokens, PatchLabels(patch, image, codes, CLASSES)


def in_memory(tokens: Tensor, labels: PatchLabels) -> MemoryFeatures:
    """Tokens and targets as features in memory."""
    return MemoryFeatures(tokens, PackedLabels.pack(labels))
