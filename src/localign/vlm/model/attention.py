"""Attention of a language model to several sequences that lie in one row.

It is one of transformers' attention implementations, so every model that goes through that interface has it.
Without sequence borders it is transformers' SDPA, masks included. With them, each sequence attends to itself
alone: by torch's varlen kernel where that runs, else by one SDPA call per sequence. No mask of the row's length
squared is made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_masks_for_generate, sdpa_mask

from localign.errors import UserError


def _find_varlen() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    # Before it had windows it could do less, under other names.
    return varlen_attn if "window_size" in inspect.signature(varlen_attn).parameters else None


VARLEN = _find_varlen()
"""torch's attention to sequences in a row, where this torch has it."""
PACKED_SDPA = "packed_sdpa"
"""Name of the implementation."""
LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of layers, as configs name them, in which borders between sequences are known to hold."""
MAX_HEAD_WIDTH = 256
"""Of the varlen kernel."""


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    turns: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One layer's attention.

    Args:
        module: The layer.
        query: ``(rows, heads, tokens, head width)``.
        key, value: The same, perhaps with fewer heads.
        attention_mask: transformers' SDPA mask; not used in a packed row.
        dropout: Probability.
        scaling: Factor of the logits; default one over the root of the head width.
        sliding_window: Keys that a query sees, itself included; default all before it.
        cu_seq_lens_q: int32 ``(sequences + 1,)``, the borders in a packed row, which is then the only row.
        max_length_q: The longest sequence.
        turns: int64 ``(tokens,)``, see :func:`turns_mask`; of a packed row.

    Returns:
        ``(rows, tokens, heads, head width)``, and None for the weights.

    Raises:
        ValueError: The layer bounds its logits or has sinks, which SDPA cannot do.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise ValueError(f"{type(module).__name__} needs attn_implementation='eager'")
    if turns is None and max_length_q is not None and has_varlen_kernel(query, value, dropout):
        return _by_kernel(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    return _by_sequence(
        module, query, key, value, cu_seq_lens_q, dropout, scaling, sliding_window, turns
    ), None


def has_varlen_kernel(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether torch's varlen attention takes these tensors; it has no dropout, and 16 bits alone."""
    return (
        VARLEN is not None
        and query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1] <= MAX_HEAD_WIDTH
        and dropout == 0.0
    )


def _by_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    queries, keys, values = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    borders = cu_seqlens.to(query.device, torch.int32)
    before = -1 if sliding_window is None else sliding_window - 1
    assert VARLEN is not None
    output = VARLEN(
        queries,
        keys,
        values,
        borders,
        borders,
        longest,
        longest,
        scale=scaling,
        window_size=(before, 0),
        enable_gqa=queries.shape[1] != keys.shape[1],
    )
    return output.unsqueeze(0)


def _by_sequence(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
    turns: Tensor | None,
) -> Tensor:
    outputs = []
    for start, stop in pairwise(cu_seqlens.tolist()):
        mask = None
        if turns is not None:
            mask = turns_mask(turns[None, start:stop])
        elif sliding_window is not None and stop - start > sliding_window:
            mask = _window_mask(stop - start, sliding_window, query.device)
        q, k, v = (x[:, :, start:stop] for x in (query, key, value))
        output, _ = sdpa_attention_forward(
            module, q, k, v, mask, dropout=dropout, scaling=scaling, is_causal=True
        )
        outputs.append(output)
    return torch.cat(outputs, dim=1)


def _window_mask(length: int, sliding_window: int, device: torch.device) -> Tensor:
    index = torch.arange(length, device=device)
    distance = index[:, None] - index[None, :]
    return ((distance >= 0) & (distance < sliding_window))[None, None]


def turns_mask(turns: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Who sees whom where no turn sees another one.

    Args:
        turns: int64 ``(rows, tokens)``: 0 for what all later tokens see, else the turn a token belongs to.
        attention_mask: ``(rows, tokens)``, 0 where padded.

    Returns:
        bool ``(rows, 1, tokens, tokens)``, queries by keys: True where seen. Each token sees itself, padding too.
    """
    queries, keys = turns[:, None, :, None], turns[:, None, None, :]
    seen = ((keys == 0) | (keys == queries)).tril()
    if attention_mask is not None:
        itself = torch.eye(turns.shape[1], dtype=torch.bool, device=turns.device)
        seen &= attention_mask[:, None, None, :].bool() | itself
    return seen


def check_independent_turns(model: PreTrainedModel) -> None:
    """Raises UserError where a language model cannot keep the turns of a sequence apart."""
    config = model.config.get_text_config()
    if config._attn_implementation not in (PACKED_SDPA, "sdpa", "eager"):
        raise UserError(
            f"independent turns need --llm-attention sdpa or eager, not {config._attn_implementation}"
        )
    everywhere = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    windowed = getattr(config, "sliding_window", None) is not None or not everywhere
    if not model._supports_attention_backend or model._is_stateful or windowed:
        raise UserError(f"{type(model).__name__} cannot keep turns apart; train it with --turns conversation")


def padded_turns(
    model: PreTrainedModel, turns: Tensor, attention_mask: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The mask of padded rows of independent turns, in the form that the language model's attention takes."""
    seen = turns_mask(turns, attention_mask)
    if model.config.get_text_config()._attn_implementation != "eager":
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def use_packed_attention(model: PreTrainedModel) -> None:
    """Let a language model whose attention is SDPA keep sequences apart without a mask; others stay."""
    if model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
        model.set_attn_implementation(PACKED_SDPA)


def packed_arguments(
    model: PreTrainedModel,
    inputs_embeds: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    turns: Tensor | None = None,
) -> dict[str, Any]:
    """What a language model is to be called with beside a packed row's embeddings and positions.

    :data:`PACKED_SDPA` and FlashAttention are told the borders. Other implementations get the masks that
    transformers makes of positions that start again (FlexAttention: block masks).

    Args:
        model: The language model.
        inputs_embeds: ``(1, tokens, width)``.
        position_ids: int64 ``(1, tokens)``, starting again with every sequence.
        cu_seqlens: int32 ``(sequences + 1,)``.
        longest: Tokens of the longest sequence.
        turns: int64 ``(1, tokens)`` where turns are independent, see :func:`turns_mask`.

    Raises:
        UserError: The model would not keep the sequences, or their turns, apart.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or LAYERS)
    if not model._supports_attention_backend or model._is_stateful or kinds - LAYERS:
        raise UserError(
            f"{type(model).__name__} cannot keep packed sequences apart; train it with padded batches"
        )
    implementation = config._attn_implementation
    borders = {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    if implementation == PACKED_SDPA:
        # transformers passes four-dimensional masks on untouched. This one has no elements: it costs nothing,
        # and a layer that used it in spite of the borders would fail.
        apart = {} if turns is None else {"turns": turns[0]}
        return {"attention_mask": inputs_embeds.new_empty((1, 1, 0, 0), dtype=torch.bool), **borders, **apart}
    if turns is not None:
        raise UserError(f"packed rows of independent turns need --llm-attention sdpa, not {implementation}")
    if "flash" in implementation:
        return {"attention_mask": None, **borders}
    masks = create_masks_for_generate(config, inputs_embeds, None, None, position_ids=position_ids)
    return {"attention_mask": masks}


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)
