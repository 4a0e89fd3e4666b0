"""Loader processes: start, stop, and failure."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from localign.errors import RunFailure, UserError
from localign.signals import ignore_signals

T = TypeVar("T")


class _Sampler:  # what the loader asks for next; every pass begins anew
    def __init__(self, samples: Callable[[], Iterator[list[Any]]]) -> None:
        self._samples = samples

    def __iter__(self) -> Iterator[list[Any]]:
        return self._samples()


def data_loader(
    reader: Dataset[T],
    samples: Callable[[], Iterator[list[Any]]],
    workers: int,
    pin_memory: bool,
    context: str | None,
) -> DataLoader[T]:
    """A loader of what a reader makes of each list of samples, in order; go through it with :func:`served`.

    Args:
        reader: Its items are whole batches, by lists of samples.
        samples: Begins a new pass; each item goes to the reader.
        workers: Processes that read; 0 reads in the caller.
        pin_memory: Page-locked tensors.
        context: ``fork``, ``spawn``, ``forkserver``; None: fork on Linux, spawn elsewhere.

    Raises:
        UserError: There cannot be so many workers.
    """
    if workers < 0:
        raise UserError(f"there cannot be {workers} loader workers")
    if workers and context is None:
        context = "fork" if sys.platform == "linux" else "spawn"
    return DataLoader(
        reader,
        batch_size=None,  # an item of the reader is a batch already
        sampler=_Sampler(samples),
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        multiprocessing_context=context if workers else None,
        generator=torch.Generator(),  # else every pass would draw from the global one
    )


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers; no traceback from each
    ignore_signals()


def served(loader: DataLoader[T]) -> Iterator[T]:
    """One pass over a loader, whose workers end with it. Raises RunFailure where a worker died or gave up."""
    # torch would raise for a dead worker from a signal handler, wherever the main process happens to be, half
    # way through a checkpoint included. Without it the loader finds out here, within five seconds.
    handler = signal.getsignal(signal.SIGCHLD) if sys.platform != "win32" else None
    served = iter(loader)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    try:
        yield from served
    except RunFailure as error:  # a live worker's, with its traceback around it
        raise RunFailure(str(error).strip().rpartition(f"{RunFailure.__module__}.RunFailure: ")[2]) from None
    except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
        first = str(error).partition("\n")[0]
        own = isinstance(error, RuntimeError) and not first.startswith("DataLoader worker")
        if (
            not loader.num_workers or own or first.startswith("Caught ")
        ):  # "Caught ...": raised in a live worker
            raise
        raise RunFailure(f"a loader worker died, perhaps for lack of (shared) memory: {first}") from error
    finally:  # at once: an error's traceback would keep the workers until Python collects its garbage
        getattr(served, "_shutdown_workers", lambda: None)()
