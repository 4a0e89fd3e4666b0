"""Checkpoints of sharded runs: written by all ranks while training continues, read by any number of ranks.

torch.distributed.checkpoint plans which rank writes and reads which part of a tensor. Its default storage pickles the
metadata, and a checkpoint may come from an untrusted source. The two storage classes here read and write only
safetensors, one file per rank, and the JSON file of every checkpoint. The safetensors header says where each part
belongs in its tensor, under the key of torch's HuggingFaceStorageReader, which can read these files too.
"""

# Not torch's HuggingFaceStorage classes: they do not notice missing parts, and need twice a rank's share in memory.

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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future as TorchFuture

from localign.engine.checkpoints.checksums import FileInfo, file_info, files_info
from localign.engine.checkpoints.replicated import (
    Checkpoints,
    load_optimizer_tensors,
    optimizer_tensors,
    reading,
)
from localign.engine.checkpoints.state import STATE_FILE, state_text
from localign.engine.distributed import DistributedContext
from localign.errors import RunFailure, UserError
from localign.files import fsync_path, put_in_place
from localign.files.disk import reason
from localign.results import BestCheckpoint

OFFSETS_KEY = "DCP_SHARDING_INFO"
MODEL, OPTIMIZER, EMA = "model.", "optimizer.", "ema."
"""Prefixes of tensor names, before the module's tensor name or ``<state name>.<parameter name>``."""
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


class ShardedCheckpoints(Checkpoints):
    """The checkpoints of a sharded run. All ranks must call :meth:`save` and :meth:`restore`.

    :meth:`save` copies this rank's tensors and returns. A thread writes them, one checkpoint at a time. The folder gets
    its final name after all ranks have written their files, so a killed run leaves no partial checkpoint.

    Args:
        folder, keep, included: As for :class:`Checkpoints`.
        context: All ranks of the run. They share the folder.
    """

    def __init__(
        self, folder: Path, keep: int, included: Callable[[str], bool], context: DistributedContext
    ) -> None:
        super().__init__(folder, keep, included)
        self.context = context
        self._group = context.cpu_group()  # the writing thread communicates while training does
        self._writing: tuple[int, Future[Any]] | None = None

    def save(
        self,
        step: int,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any],
        ema: nn.Module | None = None,
    ) -> Path:
        """Start to write a checkpoint, after the previous one is complete.

        Args:
            step, module, optimizer, ema: As for :meth:`Checkpoints.save`.
            state: As for :meth:`Checkpoints.save`; only the main rank's is saved.
        """
        self.wait()
        path = self.path(step)
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.context.all_gather_object(path.with_name(f".{path.name}.{os.getpid()}.tmp"))[0]
        # Dump the state now: the loop may change its objects before the thread is done.
        publish = partial(self._publish, temporary, step, json.dumps(state), state.get("best"))
        writer = _Writer(temporary, self.context.rank, publish)
        moments = {OPTIMIZER + name: tensor for name, tensor in optimizer_tensors(module, optimizer).items()}
        tensors = {**self._module_tensors(module, ema), **moments}
        future = async_save(tensors, storage_writer=writer, process_group=self._group)
        assert isinstance(future, Future)
        self._writing = step, future
        return path

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete.

        Raises:
            RunFailure: The checkpoint could not be written.
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
        """As :meth:`Checkpoints.restore`. Each rank reads its own part, whichever ranks wrote it."""
        path = self.path(step)
        reader = _Reader(path)
        with reading(path):
            found = reader.read_metadata().state_dict_metadata
        tensors = self._module_tensors(module, ema)
        moments = {name: part for name, part in found.items() if name.startswith(OPTIMIZER)}
        _check_names(tensors, {n: p for n, p in found.items() if n not in moments}, path)
        parameters = dict(module.named_parameters())
        tensors |= {name: _empty_moment(name, part, parameters) for name, part in moments.items()}
        try:
            load(tensors, storage_reader=reader, process_group=self._group)
        except CheckpointException as error:
            raise UserError(f"checkpoint {path} is damaged: {_first_cause(error)}") from error
        loaded = {name.removeprefix(OPTIMIZER): tensors[name] for name in moments}
        load_optimizer_tensors(module, optimizer, loaded, path)

    def _module_tensors(self, module: nn.Module, ema: nn.Module | None) -> dict[str, Tensor]:
        """The parameters and buffers that checkpoints hold; tied ones once, under their first name."""
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
        best: BestCheckpoint | None,
        files: Mapping[str, FileInfo],
    ) -> None:
        # A rank without any part of a tensor writes a file too, but reports no result for it.
        unreported = (p for p in temporary.iterdir() if p.name not in files)
        text = state_text(step, json.loads(state), {**files, **files_info(unreported)})
        (temporary / STATE_FILE).write_text(text, encoding="utf-8")
        put_in_place(temporary, self.path(step))
        self._finish_saving(step, best)


class _Writer(StorageWriter):
    """Writes this rank's parts to one file. The main rank publishes the folder when all ranks are done."""

    def __init__(self, folder: Path, rank: int, publish: Callable[[Mapping[str, FileInfo]], None]) -> None:
        self.folder, self.rank, self.publish = folder, rank, publish

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        tensors: dict[str, Tensor] = {}
        offsets: dict[str, dict[str, list[int]]] = {}
        sizes: dict[MetadataIndex, int] = {}
        for item in plan.items:
            tensor, data = planner.resolve_data(item), item.tensor_data
            assert isinstance(tensor, Tensor), f"{item.index.fqn} is no tensor"
            assert data is not None
            assert item.index.fqn not in tensors, f"a rank holds two parts of {item.index.fqn}"
            tensors[item.index.fqn] = tensor.detach().cpu().contiguous()
            offsets[item.index.fqn] = {"saved_offsets": list(data.chunk.offsets)}
            sizes[item.index] = tensor.nbytes
        self.folder.mkdir(exist_ok=True)  # no parents: a run folder that was deleted stays deleted
        file = self.folder / f"shard-{self.rank:05d}.safetensors"
        save_file(tensors, file, metadata={OFFSETS_KEY: json.dumps(offsets), "format": "pt"})
        fsync_path(file)
        named_info = file.name, file_info(file)  # each rank hashes its own file
        return _done([WriteResult(index, size, named_info) for index, size in sizes.items()])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.publish(dict(result.storage_data for rank_results in results for result in rank_results))

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class _Reader(StorageReader):
    """Reads the parts that this rank needs from the files of all ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[MetadataIndex, Path] = {}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read which tensors there are from the headers of all files.

        Raises:
            ValueError: A part of a tensor is in no file, or its header has no valid offsets.
        """
        chunks: dict[str, list[ChunkStorageMetadata]] = {}
        dtypes: dict[str, torch.dtype] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as content:
                offsets = json.loads((content.metadata() or {}).get(OFFSETS_KEY, "{}"))
                for name in content.keys():  # noqa: SIM118  (no dictionary)
                    part = content.get_slice(name)
                    shape = torch.Size(part.get_shape())
                    begin = _part_offset(offsets, name, len(shape))
                    chunks.setdefault(name, []).append(ChunkStorageMetadata(begin, shape))
                    dtypes[name] = _DTYPES[part.get_dtype()]
                    self._files[MetadataIndex(name, begin)] = file
        return Metadata({name: _full_tensor(name, dtypes[name], parts) for name, parts in chunks.items()})

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> TorchFuture[None]:
        by_file: dict[Path, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self._files[item.storage_index], []).append(item)
        for file, items in by_file.items():
            with safe_open(file, framework="pt") as content:
                for item in items:
                    ranges = zip(item.storage_offsets, item.lengths, strict=True)
                    slices = tuple(slice(begin, begin + length) for begin, length in ranges)
                    name = item.storage_index.fqn
                    part = content.get_slice(name)[slices] if slices else content.get_tensor(name)
                    target = planner.resolve_tensor(item)
                    target.detach().copy_(part)
                    planner.commit_tensor(item, target)
        return _done(None)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _part_offset(offsets: Any, name: str, dimensions: int) -> torch.Size:
    """Where a part begins in its tensor, from a file's header."""
    entry = offsets.get(name) if isinstance(offsets, dict) else None
    begin = entry.get("saved_offsets") if isinstance(entry, dict) else None
    if not isinstance(begin, list) or len(begin) != dimensions:
        raise ValueError(f"a part of {name} has no offset")
    if not all(type(number) is int and 0 <= number < 2**62 for number in begin):
        raise ValueError(f"a part of {name} has an invalid offset: {begin}")
    return torch.Size(begin)


def _full_tensor(name: str, dtype: torch.dtype, parts: list[ChunkStorageMetadata]) -> TensorStorageMetadata:
    ends = ([b + n for b, n in zip(part.offsets, part.sizes, strict=True)] for part in parts)
    size = torch.Size(max(end) for end in zip(*ends, strict=True))
    if sum(math.prod(part.sizes) for part in parts) != math.prod(size):
        raise ValueError(f"a part of {name} is missing")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, parts)


def _check_names(tensors: Mapping[str, Tensor], found: Mapping[str, Any], path: Path) -> None:
    misshapen = [n for n in tensors if n in found and tensors[n].shape != found[n].size]
    names_by_problem = {
        "missing": sorted(tensors.keys() - found.keys()),
        "extra": sorted(found.keys() - tensors.keys()),
        "wrong shape": [f"{n} {tuple(found[n].size)} for {tuple(tensors[n].shape)}" for n in misshapen],
    }
    problems = [
        f"{problem} {len(names)} ({', '.join(names[:6])})"
        for problem, names in names_by_problem.items()
        if names
    ]
    if problems:
        raise UserError(f"{path} does not fit: {'; '.join(problems)}")


def _empty_moment(name: str, part: Any, parameters: Mapping[str, Tensor]) -> Tensor:
    """An empty tensor for optimizer state, sharded as its parameter if it has the parameter's shape."""
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
