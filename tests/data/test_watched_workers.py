"""Loader workers that are stopped, killed, hung or out of memory end a pass with one line that says why."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.data._utils import signal_handling

from localign.data import watching
from localign.data.parallel import in_processes
from localign.data.watching import WatchedReader
from localign.data.workers import data_loader, served
from localign.errors import RunFailure, UserError
from localign.signals import stop_requests

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


class Reader(Dataset[Any]):
    """Numbers; number 6 lets something happen in the worker."""

    def __init__(self, at_six: Callable[[], Any] = lambda: None) -> None:
        self.at_six = at_six

    def __getitem__(self, samples: list[int]) -> Any:
        if 6 in samples:
            self.at_six()
        return torch.tensor(samples), {"pair": (torch.tensor(samples) * 2,)}


def numbers() -> Iterator[list[int]]:
    for first in range(0, 20, 2):
        yield [first, first + 1]


def run(at_six: Callable[[], Any], timeout: float = 60.0, workers: int = 2) -> list[Any]:
    loader = data_loader(Reader(at_six), numbers, workers, False, None, timeout)
    return [batch[0].tolist() for batch in served(loader)]


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep() -> None:
    time.sleep(1000)


def die(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Times of fractions of a second; afterwards no worker is left."""
    for name, seconds in {"POLL": 0.05, "DEAD_AFTER": 0.3, "STOP_AFTER": 0.2}.items():
        monkeypatch.setattr(watching, name, seconds)
    before = children()
    yield
    assert children() <= before


def test_batches_come_in_order_whatever_the_number_of_workers() -> None:
    expected = [[n, n + 1] for n in range(0, 20, 2)]
    for workers in (0, 1, 3):
        assert run(lambda: None, workers=workers) == expected


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (stop, "is stopped by a signal"),
        (sleep, "has been at one batch for"),
        (die(signal.SIGKILL), "killed by SIGKILL, most likely for lack of memory; take fewer --workers"),
        (die(signal.SIGBUS), "SIGBUS, most likely for lack of shared memory (/dev/shm has"),
        (die(signal.SIGSEGV), "killed by SIGSEGV"),
        (lambda: os._exit(3), "exit code 3"),
    ],
)
def test_a_worker_that_ends_or_hangs_is_a_failure_that_says_why(case: Callable[[], Any], said: str) -> None:
    begin = time.monotonic()
    with pytest.raises(RunFailure) as caught:
        run(case, timeout=0.5)
    line = str(caught.value)
    assert "\n" not in line
    assert said in line
    assert time.monotonic() - begin < 15


@pytest.mark.parametrize("case", [stop, sleep])
def test_the_handler_of_another_loader_does_not_interfere(
    case: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    before = signal.getsignal(signal.SIGCHLD)
    assert len(list(DataLoader(TensorDataset(torch.arange(2)), num_workers=1))) == 2
    assert signal.getsignal(signal.SIGCHLD) is not before  # torch has set its own
    with pytest.raises(RunFailure, match="no batch came"):
        run(case, timeout=0.5)


def test_the_timeout_is_named() -> None:
    with pytest.raises(RunFailure, match=r"no batch came from the loader workers for 1 s \(--timeout\)"):
        run(stop, timeout=0.5)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("case", [stop, sleep])
def test_a_request_to_stop_ends_the_wait(case: Callable[[], Any], workers: int) -> None:
    with stop_requests():
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(RunFailure, match="SIGTERM came while no batch did"):
            run(case, workers=workers)


@pytest.mark.parametrize("case", [stop, sleep])
def test_a_signal_that_raises_ends_the_wait_at_once(case: Callable[[], Any]) -> None:
    class Ended(Exception):
        pass

    def end(number: int, frame: Any) -> None:
        raise Ended

    def signalled() -> None:
        os.kill(os.getppid(), signal.SIGUSR2)  # the main process waits by now
        case()

    before = signal.signal(signal.SIGUSR2, end)
    try:
        with pytest.raises(Ended):
            run(signalled)
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_worker_that_continues_in_time_is_no_failure() -> None:
    def nap() -> None:
        time.sleep(0.6)

    assert len(run(nap, timeout=30)) == 10


def test_full_shared_memory_is_an_error_with_the_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        total, free = 64 * 2**20, 3

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(RunFailure) as caught:
        run(lambda: None)
    line = str(caught.value)
    assert "\n" not in line
    for word in ("a batch needs 0.0 MiB", "2 loader workers", "/dev/shm has 64 MiB", "--shm-size"):
        assert word in line


def test_a_failure_of_sharing_is_an_error_not_a_lost_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tensor: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    with pytest.raises(RunFailure, match=r"shared memory is full.*No space left"):
        run(lambda: None)


def test_a_lost_batch_is_an_error(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(watching, "LOST_AFTER", 0.5)

    class Unpicklable(Reader):
        def __getitem__(self, samples: list[int]) -> Any:
            return (lambda: 1) if 6 in samples else torch.tensor(samples)

    loader = data_loader(Unpicklable(), lambda: iter([[6, 7]]), 1, False, None, 60)
    with pytest.raises(RunFailure, match="a batch of the loader workers was lost on its way; worker"):
        list(served(loader))


@pytest.mark.parametrize("kind", [UserError, RunFailure])
def test_a_workers_error_is_its_line_alone(kind: type[Exception]) -> None:
    def refuse() -> None:
        raise kind("the file x.png is bad")

    with pytest.raises(kind) as caught:
        run(refuse)
    assert str(caught.value) == "the file x.png is bad"


def test_workers_that_cannot_be_started_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(RunFailure, match="cannot start the loader workers: Resource temporarily unavailable"):
        run(lambda: None)


def test_the_data_tools_are_watched_too() -> None:
    def hang(number: int) -> int:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(RunFailure, match="a loader worker died"):
        list(in_processes(hang, range(8), 8, 2, "numbers"))


def test_a_pass_that_is_left_early_ends_its_workers() -> None:
    passing: Any = served(data_loader(Reader(), numbers, 2, False, None))
    next(passing)
    passing.close()


def test_the_thread_of_a_pass_has_ended_with_it() -> None:
    """Python kills threads that are left at the end of the process, which aborts it if they are inside C++."""
    for left_early in (False, True):
        others = set(threading.enumerate())  # of passes that failed in other tests
        passing: Any = served(data_loader(Reader(), numbers, 2, False, None))
        next(passing)
        own = [t for t in threading.enumerate() if t not in others and t.name == "loader"]
        assert len(own) == 1
        if left_early:
            passing.close()
        else:
            assert list(passing)
        assert not own[0].is_alive()


def test_a_stopped_worker_does_not_hold_up_the_end_of_a_pass() -> None:
    passing: Any = served(data_loader(Reader(), numbers, 2, False, None))
    next(passing)
    for pid in children():
        os.kill(pid, signal.SIGSTOP)
    begin = time.monotonic()
    passing.close()
    assert time.monotonic() - begin < 12


def test_shared_tensors_are_found_in_all_containers() -> None:
    batch = {"a": [torch.ones(2), (torch.ones(3),)], "b": "text"}
    assert sorted(tensor.numel() for tensor in watching._tensors(batch)) == [2, 3]
    reader = WatchedReader(Reader(), 1, None, 1.0)
    assert not reader[[1, 2]][0].is_shared()  # in the main process nothing moves
