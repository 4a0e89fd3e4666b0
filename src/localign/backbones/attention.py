"""Soft-capped attention: bounded attention logits, with the pre-trained attention's weights and parameter names.

Logits ``s = q.k / sqrt(head_dim)`` become ``cap * tanh(s / cap)`` before the softmax (appendix C of the paper,
"Training instability"). Three back-ends compute the same function:

``eager``  plain tensor operations; any device, any dtype, exportable. The reference.
``flex``   FlexAttention with the cap as a score modification. On CUDA a fused kernel that never stores the
           ``tokens x tokens`` matrix; on a CPU not fused, and without gradients.
``auto``   ``flex`` on CUDA, ``eager`` elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.layers.config import use_fused_attn
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from localign.errors import UserError
from localign.options.names import BACKENDS, AttentionBackend


def soft_cap(logits: Tensor, cap: float | Tensor) -> Tensor:
    """Bound attention logits smoothly to (-cap, cap). Shape and dtype stay the same."""
    return cap * torch.tanh(logits / cap)


def attention_eager(
    query: Tensor, key: Tensor, value: Tensor, cap: float, mask: Tensor | None = None
) -> Tensor:
    """Soft-capped attention with plain operations.

    Args:
        query, key, value: ``(batch, heads, tokens, head_dim)``.
        cap: Bound of the logits, > 0.
        mask: bool ``(batch, 1, 1, tokens)``, True for keys that may be attended to; None for all.

    Returns:
        ``(batch, heads, tokens, head_dim)``, dtype of ``value``.
    """
    # Dividing the queries by the cap is cheaper than dividing the logits, which have more elements.
    scaled = (query * (query.shape[-1] ** -0.5 / cap)) @ key.transpose(-2, -1)
    logits = cap * torch.tanh(scaled)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    if logits.device.type == "cpu" and logits.dtype == value.dtype == torch.bfloat16:
        # Autocast would copy the logits and the softmax to float32, and round the softmax back for the product.
        with torch.autocast("cpu", enabled=False):
            return logits.softmax(dim=-1) @ value
    return logits.softmax(dim=-1).to(value.dtype) @ value


def padded_head_dim(head_dim: int) -> int:
    """The head dimension of the fused kernel: the next power of two, at least 16 (72 becomes 128)."""
    return max(16, 1 << (head_dim - 1).bit_length())


def attention_flex(
    query: Tensor, key: Tensor, value: Tensor, cap: float, mask: Tensor | None = None
) -> Tensor:
    """Soft-capped attention through FlexAttention; shapes as in :func:`attention_eager`.

    Zero columns are appended up to :func:`padded_head_dim`. They change neither the logits nor the first ``head_dim``
    columns of the output. The scale is that of the true head dimension.

    Raises:
        UserError: The inputs need gradients and are on the CPU.
    """
    if query.device.type == "cpu" and query.requires_grad:
        raise UserError("attention back-end flex has no gradients on the CPU; use eager or auto")
    head_dim = query.shape[-1]
    pad = padded_head_dim(head_dim) - head_dim
    if pad:
        query, key, value = (F.pad(x, (0, pad)) for x in (query, key, value))

    # Inside torch.compile, FlexAttention becomes part of the outer graph; otherwise it is compiled alone.
    fused = query.is_cuda and not torch.compiler.is_compiling()
    # Without fusing, torch would trace a second cap in the same process as a symbolic float, which it cannot lower.
    bound = cap if query.is_cuda else query.new_tensor(cap)

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, q_idx: Tensor, k_idx: Tensor) -> Tensor:
        capped = soft_cap(score, bound)
        return capped if mask is None else torch.where(mask[batch, 0, 0, k_idx], capped, -torch.inf)

    if fused:
        for x in (query, key, value, *(() if mask is None else (mask,))):
            torch._dynamo.maybe_mark_dynamic(x, 0)
    kernel: Any = _compiled_flex() if fused else flex_attention
    out: Tensor = kernel(query, key, value, score_mod=score_mod, scale=head_dim**-0.5)
    return out[..., :head_dim] if pad else out


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention, compiled for the marked dynamic dimensions only: one kernel for all numbers of images.

    Everything else, the cap included, is a constant of the kernel. torch compiles at most eight variants of a function
    and then runs it unfused, so a kernel per number of images would not do.
    """
    return torch.compile(flex_attention, dynamic=False)


class SoftCapAttention(nn.Module):
    """timm's ``Attention`` with soft-capped logits. It has the same sub-modules, so names and weights stay the same.

    Args:
        attention: The attention module of a pre-trained block.
        cap: Bound of the logits, > 0.
        backend: ``auto``, ``eager`` or ``flex``, see the module docstring.

    Raises:
        UserError: The cap is not positive, the back-end is unknown, or the module has attention dropout.
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
        """Attention over tokens ``(batch, tokens, width)``.

        ``attn_mask`` is bool ``(batch, 1, 1, tokens)``, True for keys that may be attended to.
        """
        if is_causal:
            raise NotImplementedError("soft-capped attention is not causal")
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = self.q_norm(query), self.k_norm(key)
        flex = self.backend == "flex" or (self.backend == "auto" and x.is_cuda)
        out = (attention_flex if flex else attention_eager)(query, key, value, self.cap, attn_mask)
        out = self.norm(out.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        projected: Tensor = self.proj_drop(self.proj(out))
        return projected

    def extra_repr(self) -> str:
        return f"cap={self.cap}, backend={self.backend!r}, num_heads={self.num_heads}"


def fuse_attention(module: nn.Module, device: torch.device) -> None:
    """Use torch's fused attention in a module's timm attention layers, except on CPUs.

    On a CPU, at the few tokens of a ViT, fused attention is slower than plain matrix products and a softmax.
    Soft-capped attention does not change.
    """
    part: Any
    for part in module.modules():
        if isinstance(getattr(part, "fused_attn", None), bool):
            part.fused_attn = device.type != "cpu" and use_fused_attn()


def apply_soft_cap(vit: Any, cap: float, backend: AttentionBackend = "auto") -> None:
    """Replace, in place, the attention of every block of a timm VisionTransformer by soft-capped attention.

    Raises:
        UserError: A block has another kind of attention (EVA and BEiT add positions to their logits).
    """
    for block in vit.blocks:
        if isinstance(block.attn, SoftCapAttention):
            block.attn.cap, block.attn.backend = cap, backend
        elif type(block.attn) is Attention:
            block.attn = SoftCapAttention(block.attn, cap, backend)
        else:
            kind = f"{type(block.attn).__module__.rsplit('.', 1)[-1]}.{type(block.attn).__name__}"
            raise UserError(
                f"soft-capped attention works with VisionTransformer backbones, not with {type(vit).__name__} "
                f"and its {kind}; use --soft-cap none"
            )
