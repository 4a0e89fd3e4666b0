"""Sharded training (FSDP2): a rank holds its share of every parameter, gradient and optimizer moment."""

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
        module: What is trained of it is the master copy, so float32. The same weights on every rank, or on the
            meta device, to be filled by :func:`broadcast_from_rank0`.
        units: Submodules that are gathered for their computation, and let go after it, one at a time; inner ones
            before outer ones. What is in none of them is gathered for the whole step.
        unsharded: Frozen submodules that every rank keeps whole; they are left where they are.
        mesh: Of :meth:`~localign.engine.distributed.DistributedContext.mesh`.
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
    task: Task,
    modules: Iterable[nn.Module],
    mesh: DeviceMesh,
    in_bf16: bool,
    config: TrainConfig,
    context: DistributedContext,
) -> None:
    """Shard a task's module, and its average, as the task says.

    Args:
        task: Names the units and what stays whole.
        modules: Its module, and copies of it; what is on the meta device becomes the main rank's.
        mesh: As of :func:`shard`.
        in_bf16: Whether units compute in bfloat16.
        config: Says in what precision gradients are summed, and how long what is gathered is kept.
        context: All ranks of the mesh.
    """
    for module in modules:
        empty = {name for names in context.all_gather_object(_on_meta(module)) for name in names}
        whole = {name: t.detach() for (name, *_), t in _tensors(module) if name in empty}
        shard(
            module,
            task.shard_units(module),
            task.unsharded(module),
            mesh=mesh,
            compute_dtype=torch.bfloat16 if in_bf16 else None,
            reduce_dtype=torch.bfloat16 if config.reduce_dtype == "bf16" else torch.float32,
            reshard_after_forward=config.reshard_after_forward,
        )
        broadcast_from_rank0(module, whole, context)


def _on_meta(module: nn.Module) -> list[str]:
    return [name for (name, *_), tensor in _tensors(module) if tensor.is_meta]


@torch.no_grad()
def broadcast_from_rank0(module: nn.Module, whole: Mapping[str, Tensor], context: DistributedContext) -> None:
    """Give ranks what they hold on the meta device: each takes its share of what the main rank has, in place.

    One tensor at a time is whole on the device. So one rank alone reads weights, and has them in main memory.

    Args:
        module: Sharded, the same on every rank but for the values.
        whole: By first name, what :func:`shard` was given: values on the main rank, perhaps none on others. All
            ranks name the same.
        context: All ranks of the module's mesh.
    """
    for names, tensor in _tensors(module):
        if names[0] not in whole:
            continue
        source = whole[names[0]]
        if context.is_main:
            full = source.to(context.device).contiguous()
        else:
            full = torch.empty(source.shape, dtype=source.dtype, device=context.device)
        if full.numel():
            dist.broadcast(full.reshape(-1).view(torch.uint8), src=0)  # not every backend knows every dtype
        if not tensor.is_meta:
            continue
        filled = torch.empty_like(tensor, device=context.device)
        if isinstance(filled, DTensor):
            mine = distribute_tensor(full, filled.device_mesh, filled.placements, src_data_rank=None)
            filled.to_local().copy_(mine.to_local())
        else:
            filled.copy_(full)
        if isinstance(tensor, nn.Parameter):
            filled = nn.Parameter(filled, tensor.requires_grad)
        _set(module, names, filled)


def _tensors(module: nn.Module) -> list[tuple[list[str], Tensor]]:
    """Parameters and buffers, those that are not saved too, each with all its names."""
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
    """Let go of what a forward pass without a backward pass has left gathered."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def meta_copy(module: nn.Module) -> nn.Module:
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


def gather_full(hollow: nn.Module | None, module: nn.Module) -> nn.Module | None:
    """Gather a sharded module's weights in the hollow copy, on the CPU: one tensor at a time, on the main rank.

    Args:
        hollow: Of :func:`meta_copy`; None on the other ranks, which take part in the gathering all the same.
        module: Sharded.

    Returns:
        ``hollow``, whole.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(module, options=options)
    if hollow is None:
        return None
    tied = [names for names, _ in _tensors(hollow)]
    hollow.load_state_dict(state, strict=True, assign=True)
    for first, *others in tied:
        if others:
            _set(hollow, others, hollow.get_parameter(first))
    return hollow
