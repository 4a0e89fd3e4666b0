"""Optimizers, learning rate schedule, gradient clipping and averaged weights."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel

from localign.engine.optim.muon import Muon, MuonAdamW
from localign.options.train import TrainConfig

_UNDECAYED = (
    "pos_embed",
    "cls_token",
    "reg_token",
    "dist_token",
    "mask_token",
    "relative_position_bias_table",
)


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: not to vectors (norms, biases, LayerScale), position embeddings or tokens."""
    return parameter.ndim > 1 and not name.endswith(_UNDECAYED)


def decayed_names(module: nn.Module) -> frozenset[str]:
    """Names of the trainable parameters that weight decay applies to."""
    return frozenset(n for n, p in module.named_parameters() if p.requires_grad and decays(n, p))


def hidden_matrices(module: nn.Module) -> frozenset[str]:
    """Names of the matrices that Muon trains: the trainable weights of linear layers inside blocks.

    Blocks are the numbered items of a ModuleList or Sequential. Embeddings, output layers, convolutions and vectors are
    left to AdamW.
    """
    return frozenset(
        f"{name}.weight"
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and layer.weight.requires_grad and _in_block(name)
    )


def _in_block(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


_STATE: dict[type[torch.optim.Optimizer], frozenset[str]] = {
    torch.optim.AdamW: frozenset({"step", "exp_avg", "exp_avg_sq"}),
    Muon: frozenset({"momentum_buffer"}),
}


def state_names(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, frozenset[str]]:
    """Names of the state tensors that an optimizer of :func:`build_optimizer` has for each parameter after a step."""
    parts = optimizer.parts if isinstance(optimizer, MuonAdamW) else (optimizer,)
    return {p: _STATE[type(part)] for part in parts for group in part.param_groups for p in group["params"]}


def build_optimizer(
    module: nn.Module,
    config: TrainConfig,
    decayed: Container[str] | None = None,
    rates: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; with ``config.optimizer`` "muon", Muon over :func:`hidden_matrices`.

    Parameters are grouped by weight decay and learning rate factor. See :func:`set_rates`.

    Args:
        module: On its device, and already sharded if it will be.
        config: Learning rate, betas, eps and weight decay.
        decayed: :func:`decayed_names` of the module; must be taken before sharding.
        rates: Submodule name -> factor of the run's learning rate. The first submodule that holds a parameter counts.
    """
    if decayed is None:
        decayed = decayed_names(module)
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    matrices = hidden_matrices(module) if config.optimizer == "muon" else frozenset()
    groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        factor = next((f for submodule, f in (rates or {}).items() if name.startswith(f"{submodule}.")), 1.0)
        decay = config.weight_decay if config.published_optimizer or name in decayed else 0.0
        groups.setdefault((name in matrices, factor, decay), []).append(parameter)
    fused = all(p.device.type in ("cuda", "cpu", "mps") and p.is_floating_point() for _, p in named)
    lr = config.lr if config.lr is not None else 3e-4
    for_muon: list[dict[str, Any]] = []
    for_adamw: list[dict[str, Any]] = []
    for (is_matrix, factor, decay), parameters in groups.items():
        group = {"params": parameters, "weight_decay": decay, "lr_factor": factor}
        (for_muon if is_matrix else for_adamw).append(group)
    adamw = torch.optim.AdamW(for_adamw, lr=lr, betas=config.betas, eps=config.eps, fused=fused)
    if not matrices:
        return adamw
    return MuonAdamW(Muon(for_muon, lr), adamw)


def set_rates(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step, times the factor of each parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """The learning rate of one optimizer step: linear warm-up to the peak, then a cosine.

    Args:
        step: From 0.
        steps: Steps of the whole run.
        config: Peak, warm-up steps, and the rates at the start and the end as shares of the peak.
    """
    peak = config.lr if config.lr is not None else 3e-4
    if step < config.warmup_steps:
        return peak * (config.warmup_init_ratio + (1 - config.warmup_init_ratio) * step / config.warmup_steps)
    start = 0 if config.published_optimizer else config.warmup_steps
    progress = (step - start) / max(1, steps - start)
    cosine = cosine_decay(min(1.0, progress))
    return peak * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def cosine_decay(progress: float) -> float:
    """Half a cosine: 1 at progress 0, 0 at progress 1."""
    return (1 + math.cos(math.pi * progress)) / 2


def scale_and_clip(module: nn.Module, scale: Tensor, max_norm: float | None) -> Tensor:
    """Multiply all gradients by ``scale``, then clip their norm to ``max_norm``.

    Args:
        module: Has gradients. If it is sharded, this is a call of all ranks.
        scale: Scalar, the same on every rank.
        max_norm: Largest norm over all parameters; None for no clipping.

    Returns:
        The norm after scaling and before clipping: a scalar.
    """
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    norm = norm * scale
    if max_norm is not None:
        scale = scale * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(local_tensors(gradients), scale)
    return norm


class Average(AveragedModel):
    """An exponential moving average of a module's parameters.

    It counts its steps on the host: torch's own reads the count from the device, twice in every step.

    Args:
        module: Copied. The copy may be sharded later, together with the module.
        decay: Share of the average that an update keeps.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__(module, use_buffers=False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the average towards the model's parameters; the first call copies them. Buffers are copied."""
        # One foreach operation cannot mix sharded and unsharded tensors, and a module may have both.
        copies, current = (local_tensors(p.detach() for p in m.parameters()) for m in (self.module, model))
        if self.updates == 0:
            torch._foreach_copy_(copies, current)
        else:
            torch._foreach_lerp_(copies, current, 1 - self.decay)
        for copy, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            copy.detach().copy_(buffer.detach())
        self.updates += 1


def local_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Views of this rank's parts of sharded tensors; other tensors as they are."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
