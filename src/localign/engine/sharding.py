"""Sharded training (FSDP2): each rank holds a part of every parameter, gradient and optimizer moment."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from localign.engine.distributed import DistributedContext
from localign.engine.task import Task
from localign.options.train import TrainConfig


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
        module: Has the same weights on every rank, or is on the meta device, to be filled by
            :func:`broadcast_from_rank0`. Trainable parameters are float32.
        units: Submodules that are gathered one at a time for their computation, inner ones before outer ones. All
            other parameters are gathered for the whole step.
        unsharded: Frozen submodules of which every rank keeps a full copy; they stay on their device.
        mesh: From :meth:`~localign.engine.distributed.DistributedContext.mesh`.
        compute_dtype: Dtype of the units' computation; None for the dtype of the parameters.
        reduce_dtype: Dtype in which gradients are summed over ranks.
        reshard_after_forward: Whether units are resharded between forward and backward pass.

    Raises:
        ValueError: An unsharded submodule is trainable. Its gradients would not be summed over ranks.
    """
    ignored = {p for submodule in unsharded for p in submodule.parameters()}
    if any(p.requires_grad for p in ignored):
        raise ValueError("a trainable submodule cannot be left unsharded")
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce_dtype)
    for unit in units:
        fully_shard(
            unit,
            mesh=mesh,
            mp_policy=policy,
            ignored_params=ignored,
            reshard_after_forward=reshard_after_forward,
        )
    fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=ignored)


def shard_task(
    task: Task,
    modules: Iterable[nn.Module],
    mesh: DeviceMesh,
    in_bf16: bool,
    config: TrainConfig,
    context: DistributedContext,
) -> None:
    """Shard a task's module and its moving average in place.

    Args:
        task: Names the units and the unsharded submodules.
        modules: The task's module and its average. Tensors on the meta device are filled from the main rank.
        mesh: As for :func:`shard`.
        in_bf16: Whether units compute in bfloat16.
        config: Sets the precision of gradient sums, and whether units are resharded after the forward pass.
        context: All ranks of the mesh.
    """
    for module in modules:
        missing = {name for names in context.all_gather_object(_on_meta(module)) for name in names}
        full = {name: t.detach() for (name, *_), t in _tensors(module) if name in missing}
        shard(
            module,
            task.shard_units(module),
            task.unsharded(module),
            mesh=mesh,
            compute_dtype=torch.bfloat16 if in_bf16 else None,
            reduce_dtype=torch.bfloat16 if config.reduce_dtype == "bf16" else torch.float32,
            reshard_after_forward=config.reshard_after_forward,
        )
        broadcast_from_rank0(module, full, context)


def _on_meta(module: nn.Module) -> list[str]:
    return [name for (name, *_), tensor in _tensors(module) if tensor.is_meta]


@torch.no_grad()
def broadcast_from_rank0(module: nn.Module, full: Mapping[str, Tensor], context: DistributedContext) -> None:
    """Fill the tensors that are on the meta device with the main rank's values, in place.

    Only one full tensor at a time is on the device, and only the main rank needs the weights in main memory.

    Args:
        module: Sharded; the same on every rank except for the values.
        full: First name -> full tensor, as before sharding. The same names on every rank; only the main rank needs
            values.
        context: All ranks of the module's mesh.
    """
    for names, tensor in _tensors(module):
        if names[0] not in full:
            continue
        source = full[names[0]]
        if context.is_main:
            value = source.to(context.device).contiguous()
        else:
            value = torch.empty(source.shape, dtype=source.dtype, device=context.device)
        if value.numel():
            dist.broadcast(value.reshape(-1).view(torch.uint8), src=0)  # not every backend knows every dtype
        if not tensor.is_meta:
            continue
        filled = torch.empty_like(tensor, device=context.device)
        if isinstance(filled, DTensor):
            local = distribute_tensor(value, filled.device_mesh, filled.placements, src_data_rank=None)
            filled.to_local().copy_(local.to_local())
        else:
            filled.copy_(value)
        if isinstance(tensor, nn.Parameter):
            filled = nn.Parameter(filled, tensor.requires_grad)
        _set(module, names, filled)


def _tensors(module: nn.Module) -> list[tuple[list[str], Tensor]]:
    """All parameters and buffers, also those that are not in the state dict, each with all its names."""
    found: dict[int, tuple[list[str], Tensor]] = {}
    for named in (module.named_parameters, module.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            found.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(found.values())


def _set(module: nn.Module, names: Iterable[str], tensor: Tensor) -> None:
    for name in names:
        parent, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, tensor)


def reshard(module: nn.Module) -> None:
    """Reshard after a forward pass without a backward pass, which leaves parameters gathered."""
    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            submodule.reshard()


def meta_copy(module: nn.Module) -> nn.Module:
    """A copy of the module with its state dict's tensors on the meta device, for :func:`gather_full` to fill.

    Args:
        module: Not sharded; a sharded module cannot be copied.
    """
    memo: dict[int, Tensor] = {}
    for tensor in module.state_dict(keep_vars=True).values():
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(module, memo)  # deepcopy puts in what the memo holds instead of copying the tensor


def gather_full(skeleton: nn.Module | None, module: nn.Module) -> nn.Module | None:
    """Gather a sharded module's weights on the main rank's CPU, one tensor at a time. A call of all ranks.

    Args:
        skeleton: From :func:`meta_copy`, filled in place; None on ranks other than the main one.
        module: Sharded.

    Returns:
        ``skeleton`` with all weights; None on ranks other than the main one.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(module, options=options)
    if skeleton is None:
        return None
    tied = [names for names, _ in _tensors(skeleton)]
    skeleton.load_state_dict(state, strict=True, assign=True)
    for first, *others in tied:
        if others:
            _set(skeleton, others, skeleton.get_parameter(first))
    return skeleton
