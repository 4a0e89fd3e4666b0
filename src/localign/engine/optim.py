"""Optimizer and schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from localign.engine.config import TrainConfig

_UNDECAYED = (
    "pos_embed",
    "cls_token",
    "reg_token",
    "dist_token",
    "mask_token",
    "relative_position_bias_table",
)
_WARMUP_FROM = 0.1


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: not to vectors (norms, biases, LayerScale), positions or tokens."""
    return parameter.ndim > 1 and not name.endswith(_UNDECAYED)


def build_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over what is trainable; groups are chosen by name and shape, so before any sharding.

    Args:
        module: Unwrapped, on its device.
        config: Learning rate, betas, eps and weight decay.
    """
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": config.weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cuda", "cpu", "mps") and p.is_floating_point() for _, p in named)
    lr = config.lr if config.lr is not None else 3e-4
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas, eps=config.eps, fused=fused)


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """The rate of one optimizer step: linear warm-up from a tenth of the peak, then a cosine.

    Args:
        step: 0-based.
        steps: Steps of the whole run.
        config: Peak, share at the end, warm-up steps.
    """
    peak = config.lr if config.lr is not None else 3e-4
    if step < config.warmup_steps:
        return peak * (_WARMUP_FROM + (1 - _WARMUP_FROM) * step / config.warmup_steps)
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return peak * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)
