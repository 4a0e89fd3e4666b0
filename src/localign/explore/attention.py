"""The attention of a backbone's last block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from timm.layers.attention import Attention
from torch import Tensor

from localign.backbones import Backbone
from localign.backbones.attention import SoftCapAttention, soft_cap
from localign.backbones.monitor import attention_logits


def shows_attention(backbone: Backbone) -> bool:
    """Whether the last block has timm's plain attention, soft-capped or not; EVA and BEiT add positions to it."""
    return type(backbone.vit.blocks[-1].attn) in (Attention, SoftCapAttention)


@contextmanager
def last_attention(backbone: Backbone) -> Iterator[list[Tensor]]:
    """Collect the last block's attention of every forward pass inside the block.

    Yields:
        A list that gets one float32 ``(batch, tokens, tokens)`` per forward pass: the mean over heads, whose rows sum
        to 1. It stays empty for a backbone without plain attention.
    """
    found: list[Tensor] = []

    def record(attn: Any, inputs: tuple[Tensor, ...]) -> None:
        logits = attention_logits(attn, inputs[0])
        if isinstance(attn, SoftCapAttention):
            logits = soft_cap(logits, attn.cap)
        found.append(logits.softmax(dim=-1).mean(dim=1))

    if not shows_attention(backbone):
        yield found
        return
    handle = backbone.vit.blocks[-1].attn.register_forward_pre_hook(record)
    try:
        yield found
    finally:
        handle.remove()
