"""Counts the places where the host waits for a GPU, on a machine without one.

Tensors "on the device" are tensors on the CPU that were made with the device ``cpu:0``, moved there, or computed from
such tensors. They hold real values, so whole runs work. Whatever would make the host wait for a GPU is counted: reading
a value, a copy to or from the host that is not asynchronous, and operations whose output's size depends on values.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cpu", 0)
"""Stands for a GPU. Tensors of the host are on ``cpu``, without a number."""
_READS = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "bincount",
}
_METHODS = ("tolist", "numpy", "new_tensor")
"""Methods that never reach the dispatcher, or reach it without their device."""


class SyncCounter(TorchDispatchMode):
    """Counts waits by the line of our code that makes them, in :attr:`waits`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: Counter[str] = Counter()
        self.counting = True
        self._held: dict[
            int, Any
        ] = {}  # storages on the device, held so that none gets the address of another

    def on_device(self, tensor: Any) -> bool:
        """Whether a tensor is on the device."""
        return isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata in self._held

    def put(self, tensor: Tensor) -> None:
        """Put a tensor on the device."""
        storage = tensor.untyped_storage()
        self._held[storage._cdata] = storage

    def count(self, what: str) -> None:
        """Count a wait."""
        if not self.counting:
            return
        ours = [
            f
            for f in traceback.extract_stack()
            if "/localign/" in f.filename or "/transformers/" in f.filename
        ]
        where = f"{ours[-1].filename.rpartition('/')[2]}:{ours[-1].lineno}" if ours else "?"
        self.waits[f"{what} at {where}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        device = kwargs.get("device")
        inside = any(map(self.on_device, tensors))
        if inside and (name in _READS or (name == "repeat_interleave" and kwargs.get("output_size") is None)):
            self.count(name)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [
                t
                for t in tree_leaves(args[1])
                if isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8)
            ]
            if any(map(self.on_device, masks)):
                self.count(f"{name} by a mask")
        to_device = device == DEVICE if device is not None else inside
        waits = device is not None and not kwargs.get("non_blocking")
        if name == "_to_copy" and waits and self.on_device(args[0]) != to_device:
            self.count("copy to the device" if to_device else "copy to the host")
        if name == "copy_":
            to_device = self.on_device(args[0])
            waits = self.on_device(args[1]) != to_device and args[1].ndim + args[0].ndim > 0
            if waits and not (args[2] if len(args) > 2 else kwargs.get("non_blocking")):
                self.count("copy")
        result = func(*args, **kwargs)
        if to_device:
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self.put(tensor)
        return result


@contextmanager
def counted_syncs(monkeypatch: pytest.MonkeyPatch) -> Iterator[SyncCounter]:
    """A counter of all waits inside the block."""
    counter = SyncCounter()

    def counting(method: str) -> Any:
        given = getattr(Tensor, method)

        def wrapped(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if counter.on_device(self):
                counter.count(method)
            result = given(self, *args, **kwargs)
            if method == "new_tensor" and counter.on_device(self):
                counter.put(result)
            return result

        return wrapped

    for method in _METHODS:
        monkeypatch.setattr(Tensor, method, counting(method))
    made = torch.tensor

    def tensor(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        result = made(*args, **kwargs)
        if device == DEVICE:
            counter.count("torch.tensor")
            counter.put(result)
        return result

    monkeypatch.setattr(torch, "tensor", tensor)
    with counter:
        yield counter
