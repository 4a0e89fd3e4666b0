"""Trainable heads on frozen tokens: what they are, what they read, and the two interventions.

Every head maps tokens ``(B, P + n, d)``, prefix tokens first, to logits. What it reads depends on the task:

- ``local`` and ``majority``: one prediction per patch, ``(B, n, C)``;
- ``global``: one per image, ``(B, C)``. Linear and MLP read the first prefix token (CLS), or the mean token
  of a backbone without prefix; the transformer averages its outputs at the prefix tokens, or at all tokens.
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
    """What heads need to know of a backbone."""

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
    """Attention heads, also of the transformer head."""
    num_patches: int
    """Patch tokens (n)."""
    num_prefix_tokens: int
    """Class and register tokens (P), which come first; the class token before the registers."""

    @staticmethod
    def of(backbone: HasGeometry) -> Geometry:
        """The geometry of a backbone."""
        return Geometry(backbone.width, backbone.num_heads, backbone.num_patches, backbone.num_prefix_tokens)


def summary_token(tokens: Tensor, num_prefix_tokens: int) -> Tensor:
    """``(B, d)``: the class token, or the mean token of a backbone without prefix."""
    return tokens[:, 0] if num_prefix_tokens else tokens.mean(dim=1)


class TokenHead(nn.Module):
    """The same function on every token it reads: a linear layer, or an MLP.

    Args:
        function: ``(..., d)`` to ``(..., C)``.
        geometry: The backbone's.
        task: One of TASKS.
    """

    def __init__(self, function: nn.Module, geometry: Geometry, task: str) -> None:
        super().__init__()
        self.function = function
        self.num_prefix_tokens = geometry.num_prefix_tokens
        self.per_image = task == "global"

    def forward(self, tokens: Tensor) -> Tensor:
        if self.per_image:
            return self.function(summary_token(tokens, self.num_prefix_tokens))
        return self.function(tokens[:, self.num_prefix_tokens :])


class TransformerHead(nn.Module):
    """A small transformer over all tokens.

    Learned position embedding, LayerNorm, two blocks of the backbone's width and heads (MLP ratio 4, no qkv
    bias, LayerScale 0.01), LayerNorm, linear layer.

    With an intervention the predictions come from learned latent tokens instead, one per patch, which are
    appended to what the head may see: ``cls-only`` shows it the class token (or the mean token) alone,
    ``anonymous`` all tokens without a position embedding.

    Args:
        geometry: The backbone's.
        classes: C.
        task: One of TASKS; interventions know only those with a prediction per patch.
        intervention: One of INTERVENTIONS.
    """

    def __init__(self, geometry: Geometry, classes: int, task: str, intervention: str = "none") -> None:
        super().__init__()
        width, self.num_patches = geometry.width, geometry.num_patches
        self.num_prefix_tokens = geometry.num_prefix_tokens
        self.per_image = task == "global"
        self.intervention = intervention
        total = self.num_patches + (self.num_prefix_tokens if intervention == "none" else 0)
        # Added to the tokens, or appended to them as the latent tokens of an intervention.
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
            # The mean of the logits: the last layer is affine.
            outputs = outputs.mean(dim=1)
        return self.linear(outputs)

    def _input(self, tokens: Tensor) -> Tensor:
        if self.intervention == "none":
            return tokens + self.positions
        if self.intervention == "cls-only":
            tokens = summary_token(tokens, self.num_prefix_tokens)[:, None]
        return torch.cat([tokens, self.positions.expand(len(tokens), -1, -1).to(tokens.dtype)], dim=1)

    def _read(self, length: int) -> slice:
        """The positions whose outputs are predictions."""
        if self.per_image:
            return slice(0, self.num_prefix_tokens or length)
        return slice(length - self.num_patches, length)


def block_at(block: Any, tokens: Tensor, read: slice) -> Tensor:
    """A block's outputs at some positions alone: equal to ``block(tokens)[:, read]``, without the others' cost.

    Every position is still attended to. A head whose last block is read at the class token alone saves five
    sixths of that block.

    Args:
        block: timm's block as :class:`TransformerHead` builds it: no qkv bias, no dropout.
        tokens: ``(B, T, d)``.
        read: Positions, of length R.

    Returns:
        ``(B, R, d)``.
    """
    attention, normed, kept = block.attn, block.norm1(tokens), tokens[:, read]
    width, heads = tokens.shape[-1], attention.num_heads
    query = F.linear(normed[:, read], attention.qkv.weight[:width])
    key, value = F.linear(normed, attention.qkv.weight[width:]).chunk(2, dim=-1)
    query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    kept = kept + block.ls1(attention.proj(mixed))
    return kept + block.ls2(block.mlp(block.norm2(kept)))


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
    """A freshly initialised head; the draws come from torch's global CPU generator.

    Args:
        name: A key of HEADS.
        backbone_geometry: The shape of the tokens it will read.
        classes: C.
        task: One of TASKS.
        intervention: One of INTERVENTIONS.

    Returns:
        A module from tokens ``(B, P + n, d)`` to logits, ``(B, n, C)`` or for the global task ``(B, C)``.

    Raises:
        UserError: an unknown name, or an intervention where it has no meaning.
    """
    HeadSpec(name, task, intervention).check()
    return HEADS[name](backbone_geometry, classes, task, intervention)
