"""Sharded training (FSDP2): a rank holds its share of every parameter, gradient and optimizer moment."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from localign.engine.config import TrainConfig
from localign.engine.task import Task


def shard(
    module: nn.Module,
    units: Sequence[nn.Module],
    unsharded: Iterable[nn.Module],
    *,
    mesh: DeviceMesh,
    compute_dtype: torch.dtype | None,
    reduce_dtype: torch.dtype,
    reshard_after_forward: bool = True,
) -> None:
    """Shard a module in place; its parameters become DTensors under the same names, on the mesh's device.

    Args:
        module: The same weights on every rank; what is trained of it is the master copy, so float32.
        units: Submodules that are gathered for their computation, and let go after it, one at a time; inner ones
            before outer ones. What is in none of them is gathered for the whole step.
        unsharded: Frozen submodules that every rank keeps whole; they are left where they are.
        mesh: Of :meth:`~localign.engine.distributed.World.mesh`.
        compute_dtype: What units compute in; None for the parameters' own.
        reduce_dtype: What gradients are summed over ranks in.
        reshard_after_forward: Whether units are let go between forward and backward pass.

    Raises:
        ValueError: An unsharded part is not frozen: its gradients would stay on their rank.
    """
    ignored = {p for part in unsharded for p in part.parameters()}
    if any(p.requires_grad for p in ignored):
        raise ValueError("a part that is trained must be sharded")
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce_dtype)
    for part in units:
        fully_shard(
            part,
            mesh=mesh,
            mp_policy=policy,
            ignored_params=ignored,
            reshard_after_forward=reshard_after_forward,
        )
    fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=ignored)


def shard_task(
    task: Task, modules: Iterable[nn.Module], mesh: DeviceMesh, in_bf16: bool, config: TrainConfig
) -> None:
    """Shard a task's module, and its average, as the task says.

    Args:
        task: Names the units and what stays whole.
        modules: Its module, and copies of it.
        mesh: As of :func:`shard`.
        in_bf16: Whether units compute in bfloat16.
        config: Says in what precision gradients are summed, and how long what is gathered is kept.
    """
    for module in modules:
        shard(
            module,
            task.shard_units(module),
            task.unsharded(module),
            mesh=mesh,
            compute_dtype=torch.bfloat16 if in_bf16 else None,
            reduce_dtype=torch.bfloat16 if config.reduce_dtype == "bf16" else torch.float32,
            reshard_after_forward=config.reshard_after_forward,
        )


def reshard(module: nn.Module) -> None:
    """Let go of what a forward pass without a backward pass has left gathered."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def hollow_copy(module: nn.Module) -> nn.Module:
    """A copy whose parameters and saved buffers take no memory (meta device), to be filled once at the end.

    Args:
        module: Not sharded yet: a sharded one can no longer be copied.
    """
    hollow: dict[int, Tensor] = {}
    for tensor in module.state_dict(keep_vars=True).values():
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        hollow[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(module, hollow)  # what the memo knows is not copied but replaced


def fill_whole(hollow: nn.Module | None, module: nn.Module) -> nn.Module | None:
    """Gather a sharded module's weights in the hollow copy, on the CPU: one tensor at a time, on the main rank.

    Args:
        hollow: Of :func:`hollow_copy`; None on the other ranks, which take part in the gathering all the same.
        module: Sharded.

    Returns:
        ``hollow``, whole.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(module, options=options)
    if hollow is None:
        return None
    tied: dict[int, list[str]] = {}
    for name, parameter in hollow.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    hollow.load_state_dict(state, strict=True, assign=True)
    for first, *others in tied.values():
        for name in others:
            parent, _, attribute = name.rpartition(".")
            setattr(hollow.get_submodule(parent), attribute, hollow.get_parameter(first))
    return hollow
