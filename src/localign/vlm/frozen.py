"""Frozen linear layers held in bfloat16 while a run computes in bfloat16.

Autocast rounds the weights of linear layers to bfloat16 whenever it uses them. Frozen ones are rounded once instead, so
every product is the same bit by bit, they take half the memory, and no step spends time on rounding. Other frozen
weights (embeddings, norms, convolutions) take part in float32 operations and stay in float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from localign.engine.schedule import computes_in_bf16
from localign.options.vlm.train import VLMConfig


def holds_bf16(config: VLMConfig, device: str) -> bool:
    """Whether a run holds frozen linear layers in bfloat16 on a type of device (``cpu``, ``cuda``, ...).

    Shards are float32, and so is the average of the weights, which must be like the weights.
    """
    return computes_in_bf16(config, device) and config.sharding == "none" and config.ema_decay is None


def roundable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The frozen weights and biases that only plain linear layers use, by name."""
    users = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    linear = Counter(
        id(p)
        for m in model.modules()
        if type(m) is nn.Linear
        for p in m._parameters.values()
        if p is not None
    )
    return {
        name: p
        for name, p in model.named_parameters()
        if not p.requires_grad and 0 < linear[id(p)] == users[id(p)] and p.dtype == torch.float32
    }


def hold_in_bf16(model: nn.Module) -> dict[str, Tensor]:
    """Round :func:`roundable` weights in place.

    Returns:
        The float32 weights that bfloat16 does not represent exactly, by name; needed for :func:`restore_float32`.
    """
    kept = {}
    for name, parameter in roundable(model).items():
        exact = parameter.data
        parameter.data = exact.bfloat16()
        if not torch.equal(parameter.data.float(), exact):
            kept[name] = exact
    return kept


def restore_float32(model: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Undo :func:`hold_in_bf16`, in place and on the weights' device."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and parameter.dtype == torch.bfloat16:
            exact = kept.get(name)
            parameter.data = parameter.data.float() if exact is None else exact.to(parameter.device)
