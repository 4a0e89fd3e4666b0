"""The size of attention logits: the early sign of the instability in appendix C of the paper."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

from localign.backbones.attention import SoftCapAttention
from localign.backbones.backbone import Backbone

NEAR_CAP = 0.9
"""A logit is near the cap if its capped value exceeds this share of the cap."""
REFERENCE_CAP = 30.0
"""The cap that the statistics assume for models without a cap."""


@torch.no_grad()
def attention_logit_stats(backbone: Backbone, images: Tensor) -> dict[str, float]:
    """Statistics of the largest attention logits over all blocks, heads and token pairs, before capping.

    Runs a separate forward pass, so that training needs no hooks. A few images are enough.

    Args:
        backbone: A backbone with timm's plain attention, capped or not. Other families give an empty result.
        images: Normalised, ``(batch, 3, height, width)``.

    Returns:
        ``attention_logit_max``, the largest absolute logit, and ``attention_near_cap``, the share of logits whose
        capped value exceeds 0.9 of the cap (of 30 for a model without a cap).
    """
    cap = backbone.soft_cap or REFERENCE_CAP
    threshold = cap * float(torch.atanh(torch.tensor(NEAR_CAP)))
    maxima: list[Tensor] = []
    shares: list[Tensor] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        logits = attention_logits(module, inputs[0]).abs()
        maxima.append(logits.max())
        shares.append((logits > threshold).float().mean())

    with _attention_hooks(backbone, record):
        backbone.tokens(images)
    if not maxima:
        return {}
    return {
        "attention_logit_max": float(torch.stack(maxima).max()),
        "attention_near_cap": float(torch.stack(shares).mean()),
    }


def attention_logits(attn: Any, x: Tensor) -> Tensor:
    """Logits ``(batch, heads, tokens, tokens)`` of timm's plain attention, before capping, float32.

    Args:
        attn: timm's ``Attention``, or the soft-capped one.
        x: Its input, ``(batch, tokens, width)``.
    """
    batch, tokens, _ = x.shape
    qkv = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    query, key = attn.q_norm(qkv[0]), attn.k_norm(qkv[1])
    logits: Tensor = (query.float() * attn.head_dim**-0.5) @ key.float().transpose(-2, -1)
    return logits


@contextmanager
def _attention_hooks(
    backbone: Backbone, hook: Callable[[nn.Module, tuple[Tensor, ...]], None]
) -> Iterator[None]:
    """Call ``hook`` before every attention layer inside the block."""
    known = (SoftCapAttention, Attention)
    handles = [
        b.attn.register_forward_pre_hook(hook) for b in backbone.vit.blocks if isinstance(b.attn, known)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
