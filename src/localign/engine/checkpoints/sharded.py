"""Checkpoints of sharded runs: written by all ranks beside the training, read by any number of ranks.

torch.distributed.checkpoint plans who writes and reads which part. Its own files are pickles, though (the
metadata in any case), and a checkpoint may come from somewhere else; so the two storage classes here write and
read nothing but safetensors, one file per rank, whose headers name the place of each part in its tensor, and the
JSON file that every checkpoint has. The header's key is the one of torch's HuggingFaceStorageReader, which reads
these files too.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import metadata as described
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from localign.engine.checkpoints.checksums import FileFacts, facts_of, file_facts
from localign.engine.checkpoints.replicated import (
    STATE_FILE,
    Checkpoints,
    load_optimizer_tensors,
    optimizer_tensors,
    reading,
    state_text,
)
from localign.engine.disk import reason
from localign.engine.distributed import DistributedContext
from localign.errors import RunFailure, UserError
from localign.files import fsync_path, put_in_place

OFFSETS_KEY = "DCP_SHARDING_INFO"
MODEL, OPTIMIZER, EMA = "model.", "optimizer.", "ema."
"""Prefixes of tensor names. What follows is the module's name of a tensor, or ``<kind>.<parameter name>``."""
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


class ShardedCheckpoints(Checkpoints):
    """The checkpoints of a sharded run; saving and restoring are calls of all ranks.

    :meth:`save` copies this rank's tensors and returns; a thread writes them, one checkpoint at a time. A
    checkpoint comes to its place when all ranks have written their parts, so a killed run leaves none by halves.

    Args:
        folder, keep, included: As of :class:`Checkpoints`.
        context: All ranks of the run; they see the same folder.
    """

    def __init__(
        self, folder: Path, keep: int, included: Callable[[str], bool], context: DistributedContext
    ) -> None:
        super().__init__(folder, keep, included)
        self.context = context
        self._group = context.cpu_group()  # of its own: training goes on while the thread exchanges plans
        self._writing: tuple[int, Future[Any]] | None = None

    def save(
        self,
        step: int,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any],
        ema: nn.Module | None = None,
    ) -> Path:
        """Begin to write a checkpoint, when the one before is there.

        Args:
            step, module, optimizer, ema: As of :meth:`Checkpoints.save`.
            state: Likewise; the main rank's counts.
        """
        self.wait()
        path = self.path(step)
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.context.all_gather_object(path.with_name(f".{path.name}.{os.getpid()}.tmp"))[0]
        # As text at once: what the state refers to may have changed when the thread comes to it.
        publish = partial(self._publish, temporary, step, json.dumps(state), state.get("best"))
        writer = _Writer(temporary, self.context.rank, publish)
        moments = {OPTIMIZER + name: tensor for name, tensor in optimizer_tensors(module, optimizer).items()}
        tensors = {**self._module_tensors(module, ema), **moments}
        future = dcp.async_save(tensors, storage_writer=writer, process_group=self._group)
        assert isinstance(future, Future)
        self._writing = step, future
        return path

    def wait(self) -> None:
        """Until the checkpoint that is being written is in its place.

        Raises:
            RunFailure: It could not be written.
        """
        if self._writing is None:
            return
        (step, future), self._writing = self._writing, None
        try:
            future.result()
        except (CheckpointException, Exception) as error:
            cause = _first_cause(error)
            raise RunFailure(f"cannot write the checkpoint of step {step}: {cause}") from error

    def restore(
        self, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None = None
    ) -> None:
        """As of :meth:`Checkpoints.restore`; each rank reads its own share, whoever has written it."""
        path = self.path(step)
        reader = _Reader(path)
        with reading(path):
            found = reader.read_metadata().state_dict_metadata
        tensors = self._module_tensors(module, ema)
        moments = {name: part for name, part in found.items() if name.startswith(OPTIMIZER)}
        _check_names(tensors, {n: p for n, p in found.items() if n not in moments}, path)
        parameters = dict(module.named_parameters())
        tensors |= {name: _room_for(name, part, parameters) for name, part in moments.items()}
        try:
            dcp.load(tensors, storage_reader=reader, process_group=self._group)
        except CheckpointException as error:
            raise UserError(f"checkpoint {path} is damaged: {_first_cause(error)}") from error
        loaded = {name.removeprefix(OPTIMIZER): tensors[name] for name in moments}
        load_optimizer_tensors(module, optimizer, loaded, path)

    def _module_tensors(self, module: nn.Module, ema: nn.Module | None) -> dict[str, Tensor]:
        """What is saved and restored in place: parameters and buffers, tied ones once, under their first name."""
        tensors: dict[str, Tensor] = {}
        for prefix, owner in ((MODEL, module), (EMA, ema)):
            seen: set[int] = set()
            for name, tensor in owner.state_dict(keep_vars=True).items() if owner is not None else ():
                if self.included(name) and id(tensor) not in seen:
                    tensors[prefix + name] = tensor.detach()
                    seen.add(id(tensor))
        return tensors

    def _publish(
        self,
        temporary: Path,
        step: int,
        state: str,
        best: Mapping[str, Any] | None,
        files: Mapping[str, FileFacts],
    ) -> None:
        # A rank that holds no part of any tensor has a file too, but no result to tell of it.
        untold = (p for p in temporary.iterdir() if p.name not in files)
        text = state_text(step, json.loads(state), {**files, **facts_of(untold)})
        (temporary / STATE_FILE).write_text(text, encoding="utf-8")
        put_in_place(temporary, self.path(step))
        self._tidy(step, best)


class _Writer(dcp.StorageWriter):
    """Writes this rank's parts into a file; on the main rank, publishes the folder when all have written."""

    def __init__(self, folder: Path, rank: int, publish: Callable[[Mapping[str, FileFacts]], None]) -> None:
        self.folder, self.rank, self.publish = folder, rank, publish

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        tensors: dict[str, Tensor] = {}
        offsets: dict[str, dict[str, list[int]]] = {}
        written = []
        for item in plan.items:
            tensor, data = planner.resolve_data(item), item.tensor_data
            assert isinstance(tensor, Tensor), f"{item.index.fqn} is no tensor"
            assert data is not None
            assert item.index.fqn not in tensors, f"a rank holds two parts of {item.index.fqn}"
            tensors[item.index.fqn] = tensor.detach().cpu().contiguous()
            offsets[item.index.fqn] = {"saved_offsets": list(data.chunk.offsets)}
            written.append((item.index, tensor.nbytes))
        self.folder.mkdir(exist_ok=True)  # without parents: a run folder that is gone is not to come back
        file = self.folder / f"shard-{self.rank:05d}.safetensors"
        save_file(tensors, file, metadata={OFFSETS_KEY: json.dumps(offsets), "format": "pt"})
        fsync_path(file)
        told = file.name, file_facts(file)  # each rank reads its own
        return _done([WriteResult(index, size, told) for index, size in written])

    def finish(self, metadata: dcp.Metadata, results: list[list[WriteResult]]) -> None:
        self.publish(dict(result.storage_data for part in results for result in part))

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class _Reader(dcp.StorageReader):
    """Reads the parts that a rank needs from the files of those that wrote them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[described.MetadataIndex, Path] = {}

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        """The tensors there are, from the headers of all files.

        Raises:
            ValueError: A part of a tensor is in none of them, or does not say where it belongs.
        """
        chunks: dict[str, list[described.ChunkStorageMetadata]] = {}
        dtypes: dict[str, torch.dtype] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as content:
                offsets = json.loads((content.metadata() or {}).get(OFFSETS_KEY, "{}"))
                for name in content.keys():  # noqa: SIM118  (no dictionary)
                    part = content.get_slice(name)
                    shape = torch.Size(part.get_shape())
                    begin = _begin(offsets, name, len(shape))
                    chunks.setdefault(name, []).append(described.ChunkStorageMetadata(begin, shape))
                    dtypes[name] = _DTYPES[part.get_dtype()]
                    self._files[described.MetadataIndex(name, begin)] = file
        return dcp.Metadata({name: _whole(name, dtypes[name], parts) for name, parts in chunks.items()})

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> TorchFuture[None]:
        by_file: dict[Path, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self._files[item.storage_index], []).append(item)
        for file, items in by_file.items():
            with safe_open(file, framework="pt") as content:
                for item in items:
                    where = zip(item.storage_offsets, item.lengths, strict=True)
                    slices = tuple(slice(begin, begin + length) for begin, length in where)
                    name = item.storage_index.fqn
                    part = content.get_slice(name)[slices] if slices else content.get_tensor(name)
                    target = planner.resolve_tensor(item)
                    target.detach().copy_(part)
                    planner.commit_tensor(item, target)
        return _done(None)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...

    def set_up_storage_reader(
        self, metadata: dcp.Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _begin(offsets: Any, name: str, dimensions: int) -> torch.Size:
    """Where a part begins in its tensor."""
    told = offsets.get(name) if isinstance(offsets, dict) else None
    begin = told.get("saved_offsets") if isinstance(told, dict) else None
    if not isinstance(begin, list) or len(begin) != dimensions:
        raise ValueError(f"a part of {name} does not say where it belongs")
    if not all(type(number) is int and 0 <= number < 2**62 for number in begin):
        raise ValueError(f"a part of {name} belongs nowhere: {begin}")
    return torch.Size(begin)


def _whole(
    name: str, dtype: torch.dtype, parts: list[described.ChunkStorageMetadata]
) -> described.TensorStorageMetadata:
    ends = ([b + n for b, n in zip(part.offsets, part.sizes, strict=True)] for part in parts)
    size = torch.Size(max(end) for end in zip(*ends, strict=True))
    if sum(math.prod(part.sizes) for part in parts) != math.prod(size):
        raise ValueError(f"a part of {name} is missing")
    return described.TensorStorageMetadata(described.TensorProperties(dtype=dtype), size, parts)


def _check_names(tensors: Mapping[str, Tensor], found: Mapping[str, Any], path: Path) -> None:
    wrong = [n for n in tensors if n in found and tensors[n].shape != found[n].size]
    kinds = {
        "missing": sorted(tensors.keys() - found.keys()),
        "extra": sorted(found.keys() - tensors.keys()),
        "wrong shape": [f"{n} {tuple(found[n].size)} for {tuple(tensors[n].shape)}" for n in wrong],
    }
    problems = [f"{kind} {len(names)} ({', '.join(names[:6])})" for kind, names in kinds.items() if names]
    if problems:
        raise UserError(f"{path} does not fit: {'; '.join(problems)}")


def _room_for(name: str, part: Any, parameters: Mapping[str, Tensor]) -> Tensor:
    """An empty tensor for a piece of optimizer state: sharded as its parameter if it has its shape."""
    _, _, parameter_name = name.removeprefix(OPTIMIZER).partition(".")
    parameter, dtype = parameters.get(parameter_name), part.properties.dtype
    if parameter is not None and parameter.shape == part.size:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(part.size, dtype=dtype)


def _first_cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError | SafetensorError):
        return reason(error)
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _done(value: Any) -> TorchFuture[Any]:
    future: TorchFuture[Any] = TorchFuture()
    future.set_result(value)
    return future
