"""The next-token loss, computed without holding the logits of a whole batch."""

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
"""Most logits held at once: 256 MiB in float32."""


def next_token_targets(labels: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Labels shifted by one, so that each position holds the token it should predict.

    Args:
        labels: int64 ``(rows, tokens)``, aligned with the input; IGNORE_INDEX for tokens that are not learned.
        cu_seqlens: int ``(sequences + 1,)``, the sequence borders of a packed row; None for padded rows. The last
            token of each sequence predicts nothing.

    Returns:
        int64 ``(rows, tokens)``.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    if cu_seqlens is not None:
        targets.index_fill_(1, cu_seqlens[1:].to(targets.device, torch.int64) - 1, IGNORE_INDEX)
    return targets


def summed_cross_entropy(
    hidden: Tensor, targets: Tensor, project: Callable[[Tensor], Tensor], *, chunk: int
) -> Tensor:
    """Cross-entropy summed over tokens; the backward pass recomputes each chunk's logits.

    It does not use torch's ``linear_cross_entropy``, which returns the sum in the inputs' dtype (three digits in
    bfloat16) and ignores autocast.

    Args:
        hidden: ``(tokens, width)``.
        targets: int64 ``(tokens,)``, vocabulary ids.
        project: Maps ``(tokens, width)`` to logits ``(tokens, vocabulary)``.
        chunk: Tokens whose logits are held at once.

    Returns:
        float32 scalar, connected to the graph even for zero tokens.
    """
    pieces = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    losses = [
        checkpoint(_chunk_loss, h, t, project, use_reentrant=False, preserve_rng_state=False)
        for h, t in pieces
    ]
    return torch.stack(losses).sum()


def _chunk_loss(hidden: Tensor, targets: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
    return F.cross_entropy(project(hidden).float(), targets, reduction="sum")


class LMHead:
    """Maps a language model's last hidden states to logits, like the model's own ``forward``.

    Some models scale or soft-cap their logits; their configs have four names for it.

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
        self.soft_cap: float | None = getattr(config, "final_logit_softcapping", None)
        self.chunk = max(1, CHUNK_LOGITS // config.vocab_size)

    def __call__(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)


def check_liger(device: torch.device) -> None:
    """Check, without running it, that :func:`fused_cross_entropy` can run on a device.

    Raises:
        UserError: The device is no CUDA device, or liger-kernel is not installed.
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
    function: Callable[..., Tensor] = liger_fused_linear_cross_entropy
    return function


def fused_cross_entropy(hidden: Tensor, targets: Tensor, head: LMHead) -> Tensor:
    """:func:`summed_cross_entropy` by liger-kernel, whose forward pass computes the gradients too.

    The gradient of the output layer is therefore held from the forward pass on, in float32 while it is summed.

    Args:
        hidden: ``(tokens, width)``.
        targets: int64 ``(tokens,)``, vocabulary ids.
        head: Maps to logits; only the weight and bias of its output layer are used.

    Returns:
        float32 scalar, connected to the graph even for zero tokens.

    Raises:
        UserError: The output layer is no plain ``torch.nn.Linear`` (low-rank updates replace it), or liger-kernel
            is not installed.
    """
    layer = head.head
    if type(layer) is not nn.Linear:  # a subclass may use its weight differently
        kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
        raise UserError(f"--cross-entropy liger needs a torch.nn.Linear output layer, not {kind}")
    if not len(targets):  # liger fails on zero tokens
        return summed_cross_entropy(hidden, targets, head, chunk=head.chunk)
    weight: Tensor = layer.weight
    bias: Tensor | None = layer.bias
    if head.scale != 1.0:
        hidden, bias = hidden * head.scale, None if bias is None else bias * head.scale
    if torch.is_autocast_enabled(hidden.device.type):
        # Cast as autocast would: inside liger it would cast the weight for every chunk and leave the bias float32.
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if torch.is_grad_enabled() and weight.requires_grad and not hidden.requires_grad:
        hidden = hidden.detach().requires_grad_()  # else liger skips the weight's gradient too
    return _liger()(
        hidden, weight, targets, bias, reduction="sum", softcap=head.soft_cap, accum_dtype=torch.float32
    )


def next_token_loss(
    hidden: Tensor,
    labels: Tensor,
    head: LMHead,
    cu_seqlens: Tensor | None = None,
    cross_entropy: CrossEntropy = "chunked",
    predicted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss over the labelled tokens; only positions that predict one are projected to the vocabulary.

    Args:
        hidden: ``(rows, tokens, width)``, the language model's last hidden states.
        labels: int64 ``(rows, tokens)``, see :func:`next_token_targets`.
        head: Maps hidden states to logits.
        cu_seqlens: int ``(sequences + 1,)``, the sequence borders of a packed row.
        cross_entropy: ``chunked`` for :func:`summed_cross_entropy`, ``liger`` for :func:`fused_cross_entropy`.
        predicted: int64, the positions in the flattened rows that predict a labelled token, if they are known. Finding
            them makes the host wait for the device.

    Returns:
        The summed cross-entropy (float32 scalar) and the number of predicted tokens (int64 scalar).
    """
    if predicted is None:
        targets = next_token_targets(labels, cu_seqlens)
        learned = targets != IGNORE_INDEX
        hidden, targets, count = hidden[learned], targets[learned], learned.sum()
    else:
        hidden = hidden.flatten(0, 1).index_select(0, predicted)
        targets = labels.flatten().index_select(0, predicted + 1)
        count = predicted.new_full((), len(predicted))
    if cross_entropy == "liger":
        loss = fused_cross_entropy(hidden, targets, head)
    else:
        loss = summed_cross_entropy(hidden, targets, head, chunk=head.chunk)
    return loss, count
