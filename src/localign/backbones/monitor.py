"""How large attention logits grow: the early sign of the instability in appendix C of the paper."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn

from localign.backbones.attention import SoftCapAttention
from localign.backbones.backbone import Backbone

NEAR_CAP = 0.9
"""A logit counts as near the cap where the capped value exceeds this share of it."""
REFERENCE_CAP = 30.0
"""The cap that uncapped models are held against."""


@torch.no_grad()
def attention_logit_stats(backbone: Backbone, images: Tensor) -> dict[str, float]:
    """The tail of the attention logits over all blocks, heads and token pairs, before capping.

    Runs one forward of its own, so that training needs no hooks; give it a handful of images.

    Args:
        backbone: Attention of the plain timm kind, capped or not; other families give an empty result.
        images: Normalised, ``(batch, 3, height, width)``.

    Returns:
        ``attention_logit_max``: the largest absolute logit; ``attention_near_cap``: the share whose capped
        value exceeds 0.9 of the cap (of 30 where the model has none).
    """
    cap = backbone.soft_cap or REFERENCE_CAP
    threshold = cap * float(torch.atanh(torch.tensor(NEAR_CAP)))
    maxima: list[Tensor] = []
    shares: list[Tensor] = []

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        logits = _logits(module, inputs[0]).abs()
        maxima.append(logits.max())
        shares.append((logits > threshold).float().mean())

    with _watching(backbone, look):
        backbone.tokens(images)
    if not maxima:
        return {}
    return {
        "attention_logit_max": float(torch.stack(maxima).max()),
        "attention_near_cap": float(torch.stack(shares).mean()),
    }


def _logits(attn: Any, x: Tensor) -> Tensor:
    batch, tokens, _ = x.shape
    qkv = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    query, key = attn.q_norm(qkv[0]), attn.k_norm(qkv[1])
    return (query.float() * attn.head_dim**-0.5) @ key.float().transpose(-2, -1)


@contextmanager
def _watching(backbone: Backbone, look: Any) -> Iterator[None]:
    known = (SoftCapAttention, Attention)
    handles = [
        b.attn.register_forward_pre_hook(look) for b in backbone.vit.blocks if isinstance(b.attn, known)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
