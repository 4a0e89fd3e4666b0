"""Attention within each of several sequences that are packed into one row.

It is registered as a transformers attention implementation, so every model that uses that interface can use it.
Without sequence borders it is transformers' SDPA with its masks. With borders, each sequence attends only to
itself, through torch's varlen kernel if that supports the inputs, else through one SDPA call per sequence. It
never builds a mask of the row's length squared.
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
    return varlen_attn if "window_size" in _arguments(varlen_attn) else None


def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    """Names of a function's arguments. Those of torch's varlen attention differ between versions."""
    return frozenset(inspect.signature(function).parameters)


VARLEN = _find_varlen()
"""torch's varlen attention, or None if this torch has none with windows (torch 2.9 has none, 2.10's lacks windows)."""
VARLEN_ARGUMENTS = frozenset() if VARLEN is None else _arguments(VARLEN)
"""Names of its arguments: torch 2.11's lacks ``enable_gqa``."""
PACKED_SDPA = "packed_sdpa"
"""Name under which the implementation is registered."""
SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}
"""Layer types, by their names in configs, that respect sequence borders."""
MAX_HEAD_WIDTH = 256
"""Widest attention head that the varlen kernel supports."""


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
        key, value: Like ``query``, possibly with fewer heads.
        attention_mask: transformers' SDPA mask; ignored for a packed row.
        dropout: Dropout probability.
        scaling: Factor on the logits; default ``head width ** -0.5``.
        sliding_window: Keys per query, itself included; default all earlier tokens.
        cu_seq_lens_q: int32 ``(sequences + 1,)``, the sequence borders of a packed row, which must be the only row.
        max_length_q: Tokens of the longest sequence.
        turns: int64 ``(tokens,)``, for a packed row of independent turns; see :func:`turns_mask`.

    Returns:
        ``(rows, tokens, heads, head width)``, and None for the attention weights.

    Raises:
        ValueError: The layer uses logit soft-capping, attention sinks or a position bias, which SDPA lacks.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise ValueError(f"{type(module).__name__} needs attn_implementation='eager'")
    query, key, value = _as_autocast_would(query, key, value)
    if turns is None and max_length_q is not None and has_varlen_kernel(query, value, dropout):
        return _by_kernel(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    return _by_sequence(
        module, query, key, value, cu_seq_lens_q, dropout, scaling, sliding_window, turns
    ), None


def _as_autocast_would(query: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype in which autocast runs SDPA; as they are without autocast.

    Rotary positions leave queries and keys in float32 under autocast, which the varlen kernel does not take.
    """
    device = query.device.type
    if not torch.is_autocast_enabled(device):
        return query, *others
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) for x in (query, *others))


def has_varlen_kernel(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether torch's varlen kernel supports these inputs: CUDA, 16-bit, no dropout, heads of up to 256 channels."""
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
    left = -1 if sliding_window is None else sliding_window - 1
    assert VARLEN is not None
    grouped = queries.shape[1] != keys.shape[1]
    options: dict[str, Any] = {"enable_gqa": grouped} if "enable_gqa" in VARLEN_ARGUMENTS else {}
    if grouped and not options:
        keys, values = (x.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1) for x in (keys, values))
    if "scale" in VARLEN_ARGUMENTS:
        options["scale"] = scaling
    elif scaling is not None:  # the kernel scales by the default
        queries = queries * (scaling * queries.shape[-1] ** 0.5)
    output: Tensor = VARLEN(
        queries,
        keys,
        values,
        borders,
        borders,
        longest,
        longest,
        window_size=(left, 0),
        **options,
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
    """The causal mask of independent turns: no turn attends to another.

    Args:
        turns: int64 ``(rows, tokens)``: the turn of each token, or 0 for tokens that all turns attend to.
        attention_mask: ``(rows, tokens)``, 0 at padding.

    Returns:
        bool ``(rows, 1, tokens, tokens)``, queries by keys, True where a query attends to a key. Every token
        attends to itself, padding included.
    """
    queries, keys = turns[:, None, :, None], turns[:, None, None, :]
    visible = ((keys == 0) | (keys == queries)).tril()
    if attention_mask is not None:
        diagonal = torch.eye(turns.shape[1], dtype=torch.bool, device=turns.device)
        visible &= attention_mask[:, None, None, :].bool() | diagonal
    return visible


def check_independent_turns(model: PreTrainedModel) -> None:
    """Raise a UserError if the language model cannot hide the turns of a sequence from one another."""
    config = model.config.get_text_config()
    if config._attn_implementation not in (PACKED_SDPA, "sdpa", "eager"):
        raise UserError(
            f"independent turns need --llm-attention sdpa or eager, not {config._attn_implementation}"
        )
    all_full = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    windowed = getattr(config, "sliding_window", None) is not None or not all_full
    if not model._supports_attention_backend or model._is_stateful or windowed:
        raise UserError(f"{type(model).__name__} cannot keep turns apart; train it with --turns conversation")


def padded_turns_mask(
    model: PreTrainedModel, turns: Tensor, attention_mask: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """:func:`turns_mask` for padded rows: bool, or additive in ``dtype`` if the model's attention is eager."""
    visible = turns_mask(turns, attention_mask)
    if model.config.get_text_config()._attn_implementation != "eager":
        return visible
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)


def use_packed_attention(model: PreTrainedModel) -> None:
    """Switch a language model from SDPA to :data:`PACKED_SDPA`; leave other implementations as they are."""
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
    """Arguments that a language model needs for a packed row, beside embeddings and positions.

    :data:`PACKED_SDPA` and FlashAttention get the sequence borders. Other implementations get the masks that
    transformers derives from positions that restart (block masks for FlexAttention).

    Args:
        model: The language model.
        inputs_embeds: ``(1, tokens, width)``.
        position_ids: int64 ``(1, tokens)``, restarting at 0 with every sequence.
        cu_seqlens: int32 ``(sequences + 1,)``.
        longest: Tokens of the longest sequence.
        turns: int64 ``(1, tokens)`` if turns are independent; see :func:`turns_mask`.

    Raises:
        UserError: The model cannot keep the sequences, or their turns, apart.
    """
    config = model.config.get_text_config()
    layer_types = set(getattr(config, "layer_types", None) or SUPPORTED_LAYERS)
    if not model._supports_attention_backend or model._is_stateful or layer_types - SUPPORTED_LAYERS:
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
        # transformers passes four-dimensional masks through unchanged. An empty mask costs nothing, and a layer
        # that used it in spite of the borders would fail.
        mask = inputs_embeds.new_empty((1, 1, 0, 0), dtype=torch.bool)
        return {"attention_mask": mask, **borders, **({} if turns is None else {"turns": turns[0]})}
    if turns is not None:
        raise UserError(f"packed rows of independent turns need --llm-attention sdpa, not {implementation}")
    if "flash" in implementation:
        return {"attention_mask": None, **borders}
    masks = create_masks_for_generate(config, inputs_embeds, None, None, position_ids=position_ids)
    return {"attention_mask": masks}


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)
