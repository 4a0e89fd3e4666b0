"""The main process watches its loader workers, so that nothing waits for ever.

torch fetches a batch with system calls that neither a timeout nor a signal ends, for example while a stopped worker
holds the pipe. Here another thread fetches, and this one watches: the workers' exit codes, when each of them began and
ended its last batch, the time, and requests to stop.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from localign.engine.log import say
from localign.errors import RunFailure
from localign.signals import stop_requested

T = TypeVar("T")

POLL = 0.5
"""Seconds between two looks at the workers."""
DEAD_AFTER = 8.0
"""Seconds after which a dead worker's batch is given up; torch itself notices after 5."""
LOST_AFTER = 60.0
"""Seconds without a batch, while no worker works, after which the batch is lost."""
STOP_AFTER = 20.0
"""Seconds without a batch after which a request to stop ends the wait; schedulers kill after 30 or more."""
STOPPED_AFTER = 30.0
"""Seconds without a batch after which a stopped worker is reported."""
_KILLED, _NO_MEMORY_THERE = getattr(signal, "SIGKILL", 9), getattr(signal, "SIGBUS", 7)
_SHARED_MEMORY = Path("/dev/shm")
_STATES = {
    "T": "is stopped by a signal (`kill -CONT {pid}` continues it)",
    "t": "is stopped by a debugger",
    "D": "waits for a disk or a network file system",
}  # fmt: skip
"""States of processes in Linux's /proc."""


class WatchedReader(Dataset[T]):
    """A reader as workers run it: it notes when a batch begins and ends, and moves tensors to shared memory.

    torch would move them in a second thread of the worker, where a failure loses the batch without an error.

    Args:
        reader: Maps a list of samples to a batch.
        workers: Loader processes.
        context: Start method of the processes, or None for the default.
        timeout: Seconds without a batch after which the main process gives up.
    """

    def __init__(self, reader: Dataset[T], workers: int, context: str | None, timeout: float) -> None:
        self.reader, self.timeout = reader, timeout
        # Begin and end of each worker's last batch, seconds of the machine's monotonic clock; 0: none yet.
        self.times = multiprocessing.get_context(context).RawArray(ctypes.c_double, 2 * workers)

    def __getitem__(self, samples: Any) -> T:
        info = get_worker_info()
        if info is None:
            return self.reader[samples]
        self.times[2 * info.id] = time.monotonic()
        batch = self.reader[samples]
        _share(batch, info.num_workers)
        self.times[2 * info.id + 1] = time.monotonic()
        return batch


def _share(batch: Any, workers: int) -> None:
    """Move the tensors of a batch to shared memory. Raises RunFailure if it is full."""
    tensors = [tensor for tensor in _tensors(batch) if not tensor.is_shared()]
    needed = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    if sys.platform == "linux" and _SHARED_MEMORY.is_dir():
        # Writing to a full tmpfs kills the worker with SIGBUS.
        if needed > shutil.disk_usage(_SHARED_MEMORY).free:
            raise RunFailure(_no_shared_memory(needed, workers))
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except RuntimeError as error:
        raise RunFailure(
            f"{_no_shared_memory(needed, workers)}: {str(error).partition(chr(10))[0]}"
        ) from None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _no_shared_memory(needed: float, workers: int) -> str:
    each, most = needed / 2**20, 2 * workers * needed / 2**20
    return (
        f"the shared memory is full: a batch needs {each:,.1f} MiB, {workers} loader workers with two batches each "
        f"{most:,.0f} MiB, and {shared_memory()}; give the container more (docker run --shm-size), "
        "or take fewer --workers or a smaller --micro-batch"
    )


def shared_memory() -> str:
    """Size and free space of the shared memory, in words."""
    try:
        usage = shutil.disk_usage(_SHARED_MEMORY)
    except OSError:
        return "this machine does not tell its size"
    return f"{_SHARED_MEMORY} has {usage.total / 2**20:,.0f} MiB, {usage.free / 2**20:,.1f} MiB of them free"


class Fetcher(Generic[T]):
    """Takes batches from a loader's iterator in another thread, one at a time, and only when one is wanted.

    Args:
        iterator: torch's iterator with workers.
        reader: The loader's dataset.
    """

    def __init__(self, iterator: Iterator[T], reader: WatchedReader[T]) -> None:
        self._iterator: Any = iterator
        self._reader = reader
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._pending = self._exhausted = False
        self._thread = threading.Thread(target=self._fetch, daemon=True, name="loader")
        self._thread.start()

    def _fetch(self) -> None:
        while self._wanted.get():
            try:
                self._replies.put((next(self._iterator), None))
            except BaseException as error:
                self._replies.put((None, error))

    def __iter__(self) -> Iterator[T]:
        """All batches.

        Raises:
            RunFailure: A worker died, no batch came in time, one was lost, or a request to stop came during the wait.
        """
        while True:
            self._pending = True
            self._wanted.put(True)
            batch, error = self._wait()
            self._pending = False
            if isinstance(error, StopIteration):
                self._exhausted = True
                return
            if error is not None:
                raise error
            yield batch

    def _wait(self) -> tuple[Any, BaseException | None]:
        waited, dead_for, idle_for, stopping_for, reported = 0.0, 0.0, 0.0, 0.0, False
        while True:
            begin = time.monotonic()
            try:
                return self._replies.get(timeout=POLL)
            except queue.Empty:
                # The time in which a whole job is suspended does not count.
                passed = min(time.monotonic() - begin, 2 * POLL)
            waited += passed
            dead_for += passed if self.dead() else 0.0
            idle_for = idle_for + passed if self._all_idle() else 0.0
            stopping_for += passed if stop_requested() else 0.0
            if dead_for > DEAD_AFTER:
                raise RunFailure(self.death())
            if idle_for > LOST_AFTER:
                raise RunFailure(f"a batch of the loader workers was lost on its way; {self._state()}")
            if stopping_for > STOP_AFTER:
                raise RunFailure(
                    f"{stop_requested()} came while no batch did for {waited:.0f} s; {self._state()}; "
                    "--resume continues from the last checkpoint"
                )
            if waited > self._reader.timeout:
                raise RunFailure(
                    f"no batch came from the loader workers for {waited:.0f} s (--timeout); {self._state()}"
                )
            if waited > STOPPED_AFTER and not reported and (stopped := self._stopped()):
                reported = True
                say(f"no batch for {waited:.0f} s: {stopped}; after {self._reader.timeout:g} s the run fails")

    # -- the workers -----------------------------------------------------------------------------------

    @property
    def _workers(self) -> list[Any]:
        return list(self._iterator._workers)

    def dead(self) -> list[Any]:
        """Workers that ended although the pass did not."""
        alive = self._iterator._workers_status
        return [w for w, on in zip(self._workers, alive, strict=True) if on and w.exitcode is not None]

    def death(self) -> str:
        """Why a worker died, in one line."""
        for worker in self._workers:
            worker.join(0.1)  # another thread may have asked for the exit code, and not stored it yet
        dead = [w for w in self._workers if w.exitcode]  # torch has taken some off its list already
        codes = [worker.exitcode for worker in dead]
        who = f"a loader worker died{f' (pid {dead[0].pid})' if dead else ''}"
        if -_KILLED in codes:
            return (
                f"{who}: killed by SIGKILL, most likely for lack of memory; take fewer --workers, a smaller batch, "
                "or give the job more memory"
            )
        if -_NO_MEMORY_THERE in codes:
            return (
                f"{who}: killed by SIGBUS, most likely for lack of shared memory ({shared_memory()}); give the "
                "container more (docker run --shm-size), or take fewer --workers or a smaller --micro-batch"
            )
        if codes and codes[0] < 0:
            return f"{who}: killed by {signal.Signals(-codes[0]).name}"
        return f"{who}, perhaps for lack of (shared) memory" + (f": exit code {codes[0]}" if codes else "")

    def _all_idle(self) -> bool:
        times = self._reader.times
        return all(0 < times[2 * n] <= times[2 * n + 1] for n in range(len(self._workers)))

    def _stopped(self) -> str:
        return "; ".join(words for w in self._workers if (words := self._process_state(w)))

    def _process_state(self, worker: Any) -> str:
        """What the operating system says of a worker that does not run; "" if it runs."""
        try:
            status = Path(f"/proc/{worker.pid}/stat").read_text(encoding="utf-8", errors="replace")
            letter = status.rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return ""
        words = _STATES.get(letter)
        return f"worker {worker.pid} {words.format(pid=worker.pid)}" if words else ""

    def _state(self) -> str:
        """What every worker does."""
        now, times, parts = time.monotonic(), self._reader.times, []
        for number, worker in enumerate(self._workers):
            begin, end = times[2 * number], times[2 * number + 1]
            if worker.exitcode is not None:
                does = f"worker {worker.pid} ended with exit code {worker.exitcode}"
            elif state := self._process_state(worker):
                does = state
            elif not begin:
                does = f"worker {worker.pid} has begun no batch"
            elif end >= begin:
                does = f"worker {worker.pid} ended its last batch {now - end:.0f} s ago"
            else:
                does = f"worker {worker.pid} has been at one batch for {now - begin:.0f} s"
            parts.append(does)
        return "; ".join(parts)

    def close(self) -> None:
        """End the workers, also those that do not answer."""
        self._wanted.put(False)
        if not self._pending:
            # A process that ends while the thread frees its last batch can abort: Python kills threads inside C++.
            self._thread.join(5.0)
        workers = self._workers
        if self._exhausted:
            return
        for worker in workers:
            if self._pending or self._process_state(worker):
                worker.kill()  # they ignore SIGTERM, and a stopped process gets no other signal
        # torch waits for its own thread, which may wait for a worker's half message.
        ending = threading.Thread(target=self._iterator._shutdown_workers, daemon=True)
        ending.start()
        for seconds in (5.0, 10.0):
            ending.join(seconds)
            for worker in workers:
                if worker.is_alive():
                    worker.kill()
                    worker.join(1)


def start_failure(error: OSError) -> RunFailure:
    """The line for workers that could not be started."""
    return RunFailure(
        f"cannot start the loader workers: {os.strerror(error.errno) if error.errno else error}; take fewer --workers, "
        "or raise the limits on processes, memory and open files (ulimit -u, -v, -n)"
    )
