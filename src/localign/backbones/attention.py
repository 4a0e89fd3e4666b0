"""Soft-capped attention: the pre-trained attention's weights and names, its logits bounded.

Logits ``s = q.k / sqrt(head_dim)`` become ``cap * tanh(s / cap)`` before the softmax (appendix C of the
paper, "Training instability"). Three back-ends compute the same thing:

``eager``  plain tensor operations; any device, any dtype, exportable. The reference.
``flex``   FlexAttention with the cap as a score modification; on CUDA a fused kernel that never holds the
           ``tokens x tokens`` matrix. On the CPU it runs un-fused, without gradients.
``auto``   ``flex`` on CUDA, ``eager`` elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, use_fused_attn
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from localign.errors import UserError
from localign.options.names import BACKENDS, AttentionBackend


def soft_cap(logits: Tensor, cap: float | Tensor) -> Tensor:
    """Bound attention logits smoothly to (-cap, cap); any shape, same dtype."""
    return cap * torch.tanh(logits / cap)


def attention_eager(query: Tensor, key: Tensor, value: Tensor, cap: float) -> Tensor:
    """Soft-capped attention with plain operations.

    Args:
        query: ``(batch, heads, tokens, head_dim)``; ``key`` and ``value`` likewise.
        cap: Bound of the logits, > 0.

    Returns:
        ``(batch, heads, tokens, head_dim)``, dtype of ``value``.
    """
    # The cap's division is done on the queries, of which there are fewer numbers than of logits.
    share = (query * (query.shape[-1] ** -0.5 / cap)) @ key.transpose(-2, -1)
    logits = cap * torch.tanh(share)
    if logits.device.type == "cpu" and logits.dtype == value.dtype == torch.bfloat16:
        # Autocast would make a float32 copy of the logits and one of the softmax, which the product rounds again.
        with torch.autocast("cpu", enabled=False):
            return logits.softmax(dim=-1) @ value
    return logits.softmax(dim=-1).to(value.dtype) @ value


def padded_head_dim(head_dim: int) -> int:
    """The head dimension the fused kernel works at: a power of two, 16 at least (72 becomes 128)."""
    return max(16, 1 << (head_dim - 1).bit_length())


def attention_flex(query: Tensor, key: Tensor, value: Tensor, cap: float) -> Tensor:
    """Soft-capped attention through FlexAttention; shapes as in :func:`attention_eager`.

    Zero columns are appended up to :func:`padded_head_dim`: they change neither logits nor the first
    ``head_dim`` columns of the output, and the scale stays that of the true head dimension.

    Raises:
        UserError: Gradients are wanted on the CPU.
    """
    if query.device.type == "cpu" and query.requires_grad:
        raise UserError("attention back-end flex has no gradients on the CPU; use eager or auto")
    head_dim = query.shape[-1]
    pad = padded_head_dim(head_dim) - head_dim
    if pad:
        query, key, value = (F.pad(x, (0, pad)) for x in (query, key, value))

    # Under torch.compile the outer graph takes FlexAttention in; only outside of it is it compiled alone.
    fused = query.is_cuda and not torch.compiler.is_compiling()
    # Un-fused, a second cap in one process would be traced as a symbolic float, which torch does not lower.
    bound = cap if query.is_cuda else query.new_tensor(cap)

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        return soft_cap(score, bound)

    kernel: Any = _compiled_flex() if fused else flex_attention
    out: Tensor = kernel(query, key, value, score_mod=score_mod, scale=head_dim**-0.5)
    return out[..., :head_dim] if pad else out


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


class SoftCapAttention(nn.Module):
    """timm's ``Attention`` with soft-capped logits; takes over its sub-modules, so names and weights stay.

    Args:
        attention: The attention module of a pre-trained block.
        cap: Bound of the logits, > 0.
        backend: See the module's docstring.

    Raises:
        UserError: The cap is not positive, the back-end is unknown, or attention dropout is in use.
    """

    def __init__(self, attention: Attention, cap: float, backend: AttentionBackend = "auto") -> None:
        super().__init__()
        if cap <= 0:
            raise UserError(f"the soft-cap must be above 0, not {cap}")
        if backend not in BACKENDS:
            raise UserError(f"unknown attention back-end {backend!r}; known: {', '.join(BACKENDS)}")
        if attention.attn_drop.p:
            raise UserError("soft-capped attention has no attention dropout; build the backbone without it")
        self.cap = cap
        self.backend = backend
        self.num_heads: int = attention.num_heads
        self.head_dim: int = attention.head_dim
        self.qkv = attention.qkv
        self.q_norm = attention.q_norm
        self.k_norm = attention.k_norm
        self.norm = attention.norm
        self.gate = getattr(attention, "gate", None)
        self.proj = attention.proj
        self.proj_drop = attention.proj_drop

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend over tokens ``(batch, tokens, width)``; attention masks are not part of the method."""
        if attn_mask is not None or is_causal:
            raise NotImplementedError("soft-capped attention takes no attention mask")
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = self.q_norm(query), self.k_norm(key)
        flex = self.backend == "flex" or (self.backend == "auto" and x.is_cuda)
        out = (attention_flex if flex else attention_eager)(query, key, value, self.cap)
        out = self.norm(out.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def extra_repr(self) -> str:
        return f"cap={self.cap}, backend={self.backend!r}, num_heads={self.num_heads}"


def fuse_attention(module: nn.Module, device: torch.device) -> None:
    """Let timm's attention within a module be computed as is best on a device.

    torch's fused attention for CPUs is slower than plain products and a softmax at a ViT's few tokens. Soft-capped
    attention is not concerned.
    """
    part: Any
    for part in module.modules():
        if isinstance(getattr(part, "fused_attn", None), bool):
            part.fused_attn = device.type != "cpu" and use_fused_attn()


def apply_soft_cap(vit: Any, cap: float, backend: AttentionBackend = "auto") -> None:
    """Replace, in place, the attention of every block of a timm VisionTransformer by the soft-capped one.

    Raises:
        UserError: A block's attention is of another family (EVA and BEiT mix positions into their logits).
    """
    for block in vit.blocks:
        if isinstance(block.attn, SoftCapAttention):
            block.attn.cap, block.attn.backend = cap, backend
        elif type(block.attn) is Attention:
            block.attn = SoftCapAttention(block.attn, cap, backend)
        else:
            kind = f"{type(block.attn).__module__.rsplit('.', 1)[-1]}.{type(block.attn).__name__}"
            raise UserError(
                f"soft-capped attention fits VisionTransformer backbones, not {type(vit).__name__} "
                f"with {kind}; use --soft-cap none"
            )
