"""Trainable heads on frozen tokens, and the two interventions.

Every head maps tokens ``(B, P + n, d)``, prefix tokens first, to logits:

- for the tasks ``local`` and ``majority``, one prediction per patch, ``(B, n, C)``;
- for the task ``global``, one prediction per image, ``(B, C)``. Linear and MLP heads read the first prefix token (the
  class token), or the mean token if the backbone has no prefix tokens. The transformer head averages its outputs at
  the prefix tokens, or at all tokens if there are none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from localign.options.probe import HeadSpec

MLP_HIDDEN = 1024
TRANSFORMER_BLOCKS = 2
LAYER_SCALE = 0.01


class HasGeometry(Protocol):
    """The properties of a backbone that heads depend on."""

    @property
    def width(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_patches(self) -> int: ...
    @property
    def num_prefix_tokens(self) -> int: ...


@dataclass(frozen=True)
class Geometry:
    """The shape of a backbone's token sequence."""

    width: int
    """Channels of a token (d)."""
    num_heads: int
    """Attention heads of the backbone and of the transformer head."""
    num_patches: int
    """Patch tokens (n)."""
    num_prefix_tokens: int
    """Class and register tokens (P). They come first, the class token before the registers."""

    @staticmethod
    def of(backbone: HasGeometry) -> Geometry:
        """The geometry of a backbone."""
        return Geometry(backbone.width, backbone.num_heads, backbone.num_patches, backbone.num_prefix_tokens)


def summary_token(tokens: Tensor, num_prefix_tokens: int) -> Tensor:
    """The class token, or the mean token if there are no prefix tokens: ``(B, d)``."""
    return tokens[:, 0] if num_prefix_tokens else tokens.mean(dim=1)


class TokenHead(nn.Module):
    """The same function, a linear layer or an MLP, on every token that the task reads.

    Args:
        function: Maps ``(..., d)`` to ``(..., C)``.
        geometry: Shape of the backbone's tokens.
        task: One of TASKS.
    """

    def __init__(self, function: nn.Module, geometry: Geometry, task: str) -> None:
        super().__init__()
        self.function = function
        self.num_prefix_tokens = geometry.num_prefix_tokens
        self.per_image = task == "global"

    def forward(self, tokens: Tensor) -> Tensor:
        prefix = self.num_prefix_tokens
        logits: Tensor = self.function(
            summary_token(tokens, prefix) if self.per_image else tokens[:, prefix:]
        )
        return logits


class TransformerHead(nn.Module):
    """A small transformer over all tokens.

    It consists of a learned position embedding, LayerNorm, two blocks of the backbone's width and number of heads
    (MLP ratio 4, no qkv bias, LayerScale 0.01), LayerNorm, and a linear layer.

    With an intervention the predictions are read from learned latent tokens instead, one per patch, which are appended
    to the visible tokens: with ``cls-only`` the class token (or the mean token), with ``anonymous`` all tokens without
    a position embedding. Of a backbone with registers, ``cls-only`` shows the class token alone: the paper says [CLS],
    and registers hold information about the whole image as well.

    Args:
        geometry: Shape of the backbone's tokens.
        classes: Number of classes, C.
        task: One of TASKS; with an intervention, a task with one prediction per patch.
        intervention: One of INTERVENTIONS.
    """

    def __init__(self, geometry: Geometry, classes: int, task: str, intervention: str = "none") -> None:
        super().__init__()
        width, self.num_patches = geometry.width, geometry.num_patches
        self.num_prefix_tokens = geometry.num_prefix_tokens
        self.per_image = task == "global"
        self.intervention = intervention
        total = self.num_patches + (self.num_prefix_tokens if intervention == "none" else 0)
        # Added to the tokens; with an intervention, appended to them as latent tokens.
        self.positions = nn.Parameter(0.02 * torch.randn(total, width))
        self.norm_pre = nn.LayerNorm(width)
        self.blocks = nn.Sequential(
            *(
                Block(
                    width,
                    geometry.num_heads,
                    mlp_ratio=4.0,
                    qkv_bias=False,
                    init_values=LAYER_SCALE,
                    norm_layer=nn.LayerNorm,
                )
                for _ in range(TRANSFORMER_BLOCKS)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        *blocks, last = self.blocks
        tokens = self.norm_pre(self._input(tokens))
        for block in blocks:
            tokens = block(tokens)
        outputs = self.norm(block_at(last, tokens, self._read(tokens.shape[1])))
        if self.per_image:
            # The same as the mean of the logits, because the last layer is affine.
            outputs = outputs.mean(dim=1)
        logits: Tensor = self.linear(outputs)
        return logits

    def _input(self, tokens: Tensor) -> Tensor:
        if self.intervention == "none":
            return tokens + self.positions
        if self.intervention == "cls-only":
            tokens = summary_token(tokens, self.num_prefix_tokens)[:, None]
        return torch.cat([tokens, self.positions.expand(len(tokens), -1, -1).to(tokens.dtype)], dim=1)

    def _read(self, length: int) -> slice:
        """The positions that predictions are read from."""
        if self.per_image:
            return slice(0, self.num_prefix_tokens or length)
        return slice(length - self.num_patches, length)


def block_at(block: Any, tokens: Tensor, read: slice) -> Tensor:
    """A block's outputs at some positions: ``block(tokens)[:, read]`` without computing the other outputs.

    All positions are still attended to. If only the class token is read, the block costs one sixth.

    Args:
        block: A timm block as :class:`TransformerHead` builds it, without qkv bias and dropout.
        tokens: ``(B, T, d)``.
        read: R positions.

    Returns:
        ``(B, R, d)``.
    """
    attention, normed, inputs = block.attn, block.norm1(tokens), tokens[:, read]
    width, heads = tokens.shape[-1], attention.num_heads
    query = F.linear(normed[:, read], attention.qkv.weight[:width])
    key, value = F.linear(normed, attention.qkv.weight[width:]).chunk(2, dim=-1)
    query, key, value = (
        t.reshape(*t.shape[:2], heads, width // heads).transpose(1, 2) for t in (query, key, value)
    )
    attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    hidden: Tensor = inputs + block.ls1(attention.proj(attended))
    outputs: Tensor = hidden + block.ls2(block.mlp(block.norm2(hidden)))
    return outputs


def _linear(geometry: Geometry, classes: int, task: str, intervention: str) -> nn.Module:
    return TokenHead(nn.Linear(geometry.width, classes), geometry, task)


def _mlp(geometry: Geometry, classes: int, task: str, intervention: str) -> nn.Module:
    layers = nn.Linear(geometry.width, MLP_HIDDEN), nn.GELU(), nn.Linear(MLP_HIDDEN, classes)
    return TokenHead(nn.Sequential(*layers), geometry, task)


def _transformer(geometry: Geometry, classes: int, task: str, intervention: str) -> nn.Module:
    return TransformerHead(geometry, classes, task, intervention)


HEADS: dict[str, Callable[[Geometry, int, str, str], nn.Module]] = {
    "linear": _linear,
    "mlp": _mlp,
    "transformer": _transformer,
}
"""Name -> constructor of (geometry, classes, task, intervention)."""


def build_head(
    name: str, backbone_geometry: Geometry, classes: int, task: str, intervention: str = "none"
) -> nn.Module:
    """A freshly initialised head. Its weights are drawn from torch's global CPU generator.

    Args:
        name: A key of HEADS.
        backbone_geometry: Shape of the backbone's tokens.
        classes: Number of classes, C.
        task: One of TASKS.
        intervention: One of INTERVENTIONS.

    Returns:
        A module from tokens ``(B, P + n, d)`` to logits, ``(B, n, C)`` or for the global task ``(B, C)``.

    Raises:
        UserError: A name is unknown, or the intervention does not apply.
    """
    HeadSpec(name, task, intervention).check()
    return HEADS[name](backbone_geometry, classes, task, intervention)
