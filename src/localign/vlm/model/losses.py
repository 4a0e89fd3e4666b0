"""The next-token loss, without ever holding the logits of a whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from localign.errors import UserError
from localign.options.names import CrossEntropy
from localign.vlm.data.prompts import IGNORE_INDEX

CHUNK_LOGITS = 1 << 26
"""Logits that are held at once: 256 MiB in float32."""


def next_token_targets(labels: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Labels moved by one, so that each position has what it should predict.

    Args:
        labels: int64 ``(rows, tokens)``, aligned with the input; IGNORE_INDEX where nothing is learned.
        cu_seqlens: int ``(sequences + 1,)``, the borders of the sequences in a packed row, if it is one. The
            last token of a sequence predicts nothing, whatever comes after it.

    Returns:
        Like ``labels``.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    if cu_seqlens is not None:
        targets.index_fill_(1, cu_seqlens[1:].to(targets.device, torch.int64) - 1, IGNORE_INDEX)
    return targets


def summed_cross_entropy(
    hidden: Tensor, targets: Tensor, project: Callable[[Tensor], Tensor], *, chunk: int
) -> Tensor:
    """Cross-entropy summed over tokens; the backward pass computes each chunk's logits anew.

    torch's own ``linear_cross_entropy`` is not used: it gives the sum in the inputs' dtype, which in bfloat16
    has three digits, and passes over autocast.

    Args:
        hidden: ``(tokens, width)``.
        targets: int64 ``(tokens,)``, each a vocabulary entry.
        project: From ``(tokens, width)`` to logits.
        chunk: Tokens whose logits are held at once.

    Returns:
        float32 scalar, with a gradient path to everything even where there is no token.
    """
    pieces = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    losses = [
        checkpoint(_summed, h, t, project, use_reentrant=False, preserve_rng_state=False) for h, t in pieces
    ]
    return torch.stack(losses).sum()


def _summed(hidden: Tensor, targets: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
    return F.cross_entropy(project(hidden).float(), targets, reduction="sum")


class LMHead:
    """From a language model's last hidden states to its logits, as its own ``forward`` computes them.

    Some models scale or bound their logits; they say so in their configs, under four names.

    Args:
        head: The output layer.
        config: The language model's config.
    """

    def __init__(self, head: nn.Module, config: Any) -> None:
        self.head = head
        factors = (getattr(config, name, None) or 1.0 for name in ("logit_scale", "lm_head_multiplier"))
        self.scale = 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        for factor in factors:
            self.scale *= factor
        self.bound = getattr(config, "final_logit_softcapping", None)
        self.chunk = max(1, CHUNK_LOGITS // config.vocab_size)

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.head(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.bound is None else self.bound * torch.tanh(logits / self.bound)


def check_liger(device: torch.device) -> None:
    """Whether :func:`fused_cross_entropy` can run on a device, found out without running it.

    Raises:
        UserError: It is no CUDA device, or liger-kernel is not installed.
    """
    if device.type != "cuda":
        raise UserError(f"--cross-entropy liger needs a CUDA device, not {device.type}")
    _liger()


def _liger() -> Callable[..., Tensor]:
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:
        raise UserError(
            "--cross-entropy liger needs the package liger-kernel: pip install 'localign[liger]'"
        ) from None
    return liger_fused_linear_cross_entropy


def fused_cross_entropy(hidden: Tensor, targets: Tensor, head: LMHead) -> Tensor:
    """What :func:`summed_cross_entropy` gives, by liger-kernel, whose forward pass computes the gradients too.

    The output layer's gradient is therefore held from here on, in float32 while it is summed.

    Args:
        hidden: ``(tokens, width)``.
        targets: int64 ``(tokens,)``, each a vocabulary entry.
        head: To logits; its output layer is not called, only its weight and bias are used.

    Returns:
        float32 scalar, with a gradient path to everything even where there is no token.

    Raises:
        UserError: The output layer is not torch's linear one (low-rank updates make it another), or
            liger-kernel is not installed.
    """
    layer = head.head
    if type(layer) is not nn.Linear:  # a subclass may compute something else from its weight
        kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
        raise UserError(f"--cross-entropy liger takes torch's linear layer to the vocabulary, not {kind}")
    if not len(targets):  # liger cannot
        return summed_cross_entropy(hidden, targets, head, chunk=head.chunk)
    weight: Tensor = layer.weight
    bias: Tensor | None = layer.bias
    if head.scale != 1.0:
        hidden, bias = hidden * head.scale, None if bias is None else bias * head.scale
    if torch.is_autocast_enabled(hidden.device.type):
        # As for a linear layer. Inside, autocast would cast the weight for every chunk, and leave a bias float32.
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if torch.is_grad_enabled() and weight.requires_grad and not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()  # else liger leaves out the weight's gradient too
    return _liger()(
        hidden, weight, targets, bias, reduction="sum", softcap=head.bound, accum_dtype=torch.float32
    )


def next_token_loss(
    hidden: Tensor,
    labels: Tensor,
    head: LMHead,
    cu_seqlens: Tensor | None = None,
    cross_entropy: CrossEntropy = "chunked",
) -> tuple[Tensor, Tensor]:
    """The loss of the labelled tokens; no other position is projected to the vocabulary.

    Args:
        hidden: ``(rows, tokens, width)``, the language model's last hidden states.
        labels: int64 ``(rows, tokens)``, see :func:`next_token_targets`.
        head: To logits.
        cu_seqlens: Borders of a packed row's sequences.
        cross_entropy: ``chunked``: :func:`summed_cross_entropy`; ``liger``: :func:`fused_cross_entropy`.

    Returns:
        The summed cross-entropy, a float32 scalar, and the number of tokens it is over, an int64 scalar.
    """
    targets = next_token_targets(labels, cu_seqlens)
    learned = targets != IGNORE_INDEX
    hidden, targets = hidden[learned], targets[learned]
    if cross_entropy == "liger":
        loss = fused_cross_entropy(hidden, targets, head)
    else:
        loss = summed_cross_entropy(hidden, targets, head, chunk=head.chunk)
    return loss, learned.sum()
