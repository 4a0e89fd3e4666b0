"""Starting and stopping loader processes, and handling their failures."""

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


class _Sampler:
    """Restarts the iterator of samples on every pass."""

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
    """A loader of ``reader[list of samples]`` for each list of samples, in order; iterate with :func:`served`.

    Args:
        reader: Maps a list of samples to a batch.
        samples: Starts a new pass over lists of samples.
        workers: Loader processes; 0 reads in this process.
        pin_memory: Return page-locked tensors.
        context: ``fork``, ``spawn`` or ``forkserver``; default fork on Linux, spawn elsewhere.

    Raises:
        UserError: ``workers`` is negative.
    """
    if workers < 0:
        raise UserError(f"the number of loader workers must be at least 0, not {workers}")
    if workers and context is None:
        context = "fork" if sys.platform == "linux" else "spawn"
    return DataLoader(
        reader,
        batch_size=None,  # the reader returns batches
        sampler=_Sampler(samples),
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        multiprocessing_context=context if workers else None,
        generator=torch.Generator(),  # otherwise every pass draws from torch's global generator
    )


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # the main process ends its workers, without a traceback from each
    ignore_signals()


def served(loader: DataLoader[T]) -> Iterator[T]:
    """One pass over a loader; its workers end with the pass. Raises RunFailure if a worker dies or gives up."""
    # torch's SIGCHLD handler raises for a dead worker anywhere in the main process, even while a checkpoint is
    # written. Without the handler, the iterator below notices within five seconds.
    handler = signal.getsignal(signal.SIGCHLD) if sys.platform != "win32" else None
    iterator = iter(loader)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    try:
        yield from iterator
    except (RunFailure, UserError) as error:  # raised in a live worker, so its text includes a traceback
        kind = RunFailure if isinstance(error, RunFailure) else UserError
        raise kind(str(error).strip().rpartition(f"{kind.__module__}.{kind.__name__}: ")[2]) from None
    except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
        first = str(error).partition("\n")[0]
        other = isinstance(error, RuntimeError) and not first.startswith("DataLoader worker")
        in_live_worker = first.startswith("Caught ")
        if not loader.num_workers or other or in_live_worker:
            raise
        raise RunFailure(f"a loader worker died, perhaps for lack of (shared) memory: {first}") from error
    finally:  # now, because an error's traceback keeps the iterator and its workers alive
        getattr(iterator, "_shutdown_workers", lambda: None)()
