"""The stream of samples, and the loaders that serve it.

What a run sees at a global position is a pure function of (seed, epoch, position): not of the number of ranks
or loader workers, nor of the step at which it was continued. So the step is all the loader state there is.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from localign import rng
from localign.data.decoding import UnreadableImage
from localign.data.sources import ImageSource, load_undecoded
from localign.data.stream import SampleStream, sample_stream
from localign.errors import RunFailure, UserError
from localign.signals import ignore_signals

REPLACEMENT_ATTEMPTS = 100
"""Draws in place of an unreadable image before its position counts as lost."""

T = TypeVar("T")
PositionTransform = Callable[[Any, int, int], Tensor]  # (image, seed, position) -> uint8 (3, H, W)


class Batch(NamedTuple):
    """Samples in the order of their positions."""

    images: Tensor
    """uint8 ``(batch, 3, H, W)``, 0..255."""
    positions: Tensor
    """int64 ``(batch,)``, global positions in the stream."""
    indices: Tensor
    """int64 ``(batch,)``, the images' indices in the source, replacements included."""
    bad: tuple[tuple[str, str], ...]
    """(name, reason) of the unreadable images met on the way."""


class BadImages:
    """The unreadable images a run has met, each counted once; at most ``max_share`` of ``total`` may be."""

    def __init__(self, total: int, max_share: float = 0.01) -> None:
        if not 0.0 <= max_share <= 1.0:
            raise UserError(f"the share of unreadable images lies in 0..1; {max_share} does not")
        self.total, self.max_share = total, max_share
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    @property
    def share(self) -> float:
        """Different unreadable images over all images of the source."""
        return len(self.reasons) / self.total if self.total else 0.0

    def add(self, bad: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        """Note unreadable images.

        Returns:
            Those not seen before, for the log.

        Raises:
            UserError: There are now more than ``max_share`` of the source.
        """
        new = tuple((name, reason) for name, reason in dict(bad).items() if name not in self.reasons)
        self.reasons.update(new)
        if self.share > self.max_share:
            first = "; ".join(f"{name} ({reason})" for name, reason in list(self.reasons.items())[:3])
            raise UserError(
                f"{len(self)} of {self.total} images are unreadable ({self.share:.2%}, "
                f"at most {self.max_share:.2%} allowed): {first}{'; ...' if len(self) > 3 else ''}"
            )
        return new


def replacement(seed: int, position: int, attempt: int, length: int) -> int:
    """What is drawn of ``length`` samples in place of an unreadable one; ``attempt`` counts from 1."""
    return int(rng.generator(seed, "replacement", position, attempt).integers(length))


class _Fetched(NamedTuple):
    images: Tensor
    positions: Tensor
    indices: Tensor
    bad: list[tuple[str, str]]
    lost: list[int]


class _StreamReader(Dataset[_Fetched]):
    """Decodes whole micro-batches in a worker; its items are lists of (position, index)."""

    def __init__(self, source: ImageSource, transform: PositionTransform, seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __getitem__(self, samples: list[tuple[int, int]]) -> _Fetched:
        bad: dict[str, str] = {}
        lost: list[int] = []
        images, indices = [], []
        for position, index in samples:
            image, index = self._read(position, index, bad)
            if image is None:
                lost.append(position)
                continue
            images.append(image)
            indices.append(index)
        positions = torch.tensor([position for position, _ in samples], dtype=torch.int64)
        read = torch.tensor(indices, dtype=torch.int64)
        return _Fetched(_stack(images), positions, read, list(bad.items()), lost)

    def _read(self, position: int, index: int, bad: dict[str, str]) -> tuple[Tensor | None, int]:
        for attempt in range(REPLACEMENT_ATTEMPTS + 1):
            if attempt:
                index = replacement(self.seed, position, attempt, len(self.source))
            try:
                return self.transform(self._load(index), self.seed, position), index
            except UnreadableImage as error:
                bad[error.name] = error.reason
        return None, index

    def _load(self, index: int) -> Any:
        if getattr(self.transform, "takes_undecoded", False):
            return load_undecoded(self.source, index)
        return self.source.load(index)


class _OrderedReader(Dataset[_Fetched]):
    """Decodes lists of indices in a worker, leaving out what is unreadable."""

    def __init__(self, source: ImageSource, transform: Callable[[Any], Tensor]) -> None:
        self.source, self.transform = source, transform

    def __getitem__(self, samples: list[int]) -> _Fetched:
        bad: dict[str, str] = {}
        images = {index: image for index in samples if (image := self._read(index, bad)) is not None}
        read = torch.tensor(list(images), dtype=torch.int64)
        return _Fetched(_stack(list(images.values())), read, read.clone(), list(bad.items()), [])

    def _read(self, index: int, bad: dict[str, str]) -> Tensor | None:
        try:
            return self.transform(self.source.load(index))
        except UnreadableImage as error:
            bad[error.name] = error.reason
        return None


class TrainLoader:
    """This rank's micro-batches of a range of steps, in order.

    Step s holds the global positions s * global_batch .. (s + 1) * global_batch - 1. Rank r takes the r-th of
    ``world_size`` equal consecutive parts and serves it in micro-batches of ``micro_batch``.

    An unreadable image is replaced by one drawn from (seed, position, attempt): part of the stream too.

    Args:
        source: The images.
        transform: (image, seed, position) -> uint8 ``(3, H, W)``.
        seed: The run's seed.
        global_batch: Samples per step over all ranks.
        micro_batch: Samples per yielded batch.
        rank: This process among ``world_size``.
        world_size: Processes.
        workers: Loader processes of this rank; 0 loads in the caller.
        start_step, end_step: The first step to serve, and one past the last.
        shuffle: A new order for each epoch.
        pin_memory: Page-locked batches, for copies to a CUDA device that overlap computation.
        max_bad_share: Share of unreadable images beyond which the run stops.
        multiprocessing_context: ``fork``, ``spawn``, ``forkserver``; None: fork on Linux, spawn elsewhere.

    Attributes:
        bad: The unreadable images met so far by this rank; its state goes into the checkpoint.

    Raises:
        UserError: The sizes contradict one another; on iteration, too many images are unreadable.
        RunFailure: On iteration, a loader worker died.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: PositionTransform,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        start_step: int = 0,
        end_step: int,
        shuffle: bool = True,
        pin_memory: bool = False,
        max_bad_share: float = 0.01,
        multiprocessing_context: str | None = None,
    ) -> None:
        check_batches(global_batch, micro_batch, rank, world_size)
        if not 0 <= start_step <= end_step:
            raise UserError(f"steps must run upwards from 0, not from {start_step} to {end_step}")
        self.source = source
        self.stream: SampleStream = sample_stream(source, seed, shuffle)
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.world_size = rank, world_size
        self.start_step, self.end_step = start_step, end_step
        self.bad = BadImages(len(source), max_bad_share)
        self.bad.add(getattr(source, "unreadable", ()))
        reader = _StreamReader(source, transform, seed)
        self._loader = data_loader(reader, self._samples, workers, pin_memory, multiprocessing_context)

    @property
    def micro_batches_per_step(self) -> int:
        """Batches this rank serves per step."""
        return self.global_batch // self.world_size // self.micro_batch

    def __len__(self) -> int:
        return (self.end_step - self.start_step) * self.micro_batches_per_step

    def __iter__(self) -> Iterator[Batch]:
        for fetched in served(self._loader):
            self.bad.add(tuple(fetched.bad))
            if fetched.lost:
                raise UserError(
                    f"no readable image for position {fetched.lost[0]} in {REPLACEMENT_ATTEMPTS} draws; "
                    f"{len(self.bad)} of {len(self.source)} images are known to be unreadable"
                )
            yield _batch(fetched)

    def _samples(self) -> Iterator[list[tuple[int, int]]]:
        per_rank = self.global_batch // self.world_size
        for step in range(self.start_step, self.end_step):
            first = step * self.global_batch + self.rank * per_rank
            for begin in range(first, first + per_rank, self.micro_batch):
                indices = self.stream.indices(begin, begin + self.micro_batch)
                yield [(begin + i, int(index)) for i, index in enumerate(indices)]


class EvalLoader:
    """Every image of a source once, in order, sharded over ranks.

    Rank r takes the r-th of ``world_size`` consecutive parts, equal but for one image; the last batch may be
    smaller. Unreadable images are left out, so ``positions`` (equal to ``indices``) may have gaps.

    Args:
        source: The images.
        transform: image -> uint8 ``(3, H, W)``.
        batch: Samples per yielded batch, at most.
        limit: Only the first so many images; None for all.
        rank, world_size, workers, pin_memory, max_bad_share: As for ``TrainLoader``.

    Attributes:
        begin, end: This rank's first index, and one past its last.
        bad: The unreadable images of the last pass.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Callable[[Any], Tensor],
        *,
        batch: int,
        limit: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
        max_bad_share: float = 0.01,
    ) -> None:
        check_batches(batch * world_size, batch, rank, world_size)
        total = len(source) if limit is None else min(limit, len(source))
        self.source, self.batch = source, batch
        self.begin, self.end = rank * total // world_size, (rank + 1) * total // world_size
        self.bad = BadImages(len(source), max_bad_share)
        reader = _OrderedReader(source, transform)
        self._loader = data_loader(reader, self._samples, workers, pin_memory, None)

    def __len__(self) -> int:  # if no batch is wholly unreadable
        return -(-(self.end - self.begin) // self.batch)

    def __iter__(self) -> Iterator[Batch]:
        self.bad.reasons.clear()
        for fetched in served(self._loader):
            self.bad.add(tuple(fetched.bad))
            if len(fetched.indices):
                yield _batch(fetched)

    def _samples(self) -> Iterator[list[int]]:
        for begin in range(self.begin, self.end, self.batch):
            yield list(range(begin, min(begin + self.batch, self.end)))


def check_batches(global_batch: int, micro_batch: int, rank: int, world_size: int) -> None:
    """Raises UserError where a batch does not divide into ranks and micro-batches."""
    if not 0 <= rank < world_size:
        raise UserError(f"rank {rank} does not exist among {world_size} processes")
    if global_batch < 1 or micro_batch < 1:
        raise UserError(f"batches must hold images: batch {global_batch}, micro-batch {micro_batch}")
    if global_batch % (world_size * micro_batch):
        raise UserError(
            f"a batch of {global_batch} does not divide into {world_size} processes "
            f"times micro-batches of {micro_batch}"
        )


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


def _stack(images: list[Tensor]) -> Tensor:
    return torch.stack(images) if images else torch.empty(0, dtype=torch.uint8)


def _batch(fetched: _Fetched) -> Batch:  # pinning makes lists of tuples
    return Batch(*fetched[:3], bad=tuple((name, reason) for name, reason in fetched.bad))
