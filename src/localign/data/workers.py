"""Starting and stopping loader processes, and handling their failures."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from localign.data.watching import Fetcher, WatchedReader, start_failure
from localign.engine.distributed import TIMEOUT
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
    timeout: float = TIMEOUT,
) -> DataLoader[T]:
    """A loader of ``reader[list of samples]`` for each list of samples, in order; iterate with :func:`served`.

    Args:
        reader: Maps a list of samples to a batch.
        samples: Starts a new pass over lists of samples.
        workers: Loader processes; 0 reads in this process.
        pin_memory: Return page-locked tensors.
        context: ``fork``, ``spawn`` or ``forkserver``; default fork on Linux, spawn elsewhere.
        timeout: Seconds without a batch from the workers after which a pass fails.

    Raises:
        UserError: ``workers`` is negative.
    """
    if workers < 0:
        raise UserError(f"the number of loader workers must be at least 0, not {workers}")
    if workers and context is None:
        context = "fork" if sys.platform == "linux" else "spawn"
    return DataLoader(
        WatchedReader(reader, workers, context, timeout) if workers else reader,
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


def _is_of_torch(handler: object) -> bool:
    """Whether a handler of SIGCHLD is torch's, set by this or an earlier loader.

    It raises for a worker that ended anywhere in the main process: while a checkpoint is written, and when a hung
    worker is killed. Without it, a wait for a batch notices within seconds.
    """
    return str(getattr(handler, "__module__", "")).startswith("torch.utils.data")


def served(loader: DataLoader[T]) -> Iterator[T]:
    """One pass over a loader; its workers end with the pass.

    Raises:
        RunFailure: A worker dies, hangs, loses a batch or raises RunFailure, or workers cannot be started.
        UserError: A worker raises UserError.
    """
    if not loader.num_workers:
        yield from loader
        return
    handler = signal.getsignal(signal.SIGCHLD) if sys.platform != "win32" else None
    try:
        iterator = iter(loader)
    except OSError as error:
        raise start_failure(error) from None
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if _is_of_torch(handler) else handler)
    assert isinstance(loader.dataset, WatchedReader)
    fetcher = Fetcher(iterator, loader.dataset)
    try:
        yield from fetcher
    except (RunFailure, UserError) as error:  # raised in a live worker, their text includes a traceback
        kind = type(error)
        line = str(error).strip().rpartition(f"{kind.__module__}.{kind.__name__}: ")[2]
        raise kind(line) from None
    except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
        first = str(error).partition("\n")[0]
        if "ancdata" in first:
            raise RunFailure(
                "the loader has too many open files; raise the limit (ulimit -n 65536)"
            ) from error
        other = isinstance(error, RuntimeError) and not first.startswith("DataLoader worker")
        in_live_worker = first.startswith("Caught ")
        if other or in_live_worker:
            raise
        raise RunFailure(fetcher.death()) from error
    finally:  # now, because an error's traceback keeps the iterator and its workers alive
        fetcher.close()
