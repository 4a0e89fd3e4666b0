"""The loaders that serve the stream of samples.

The sample at a global position is a pure function of (seed, epoch, position). It does not depend on the number of
ranks or loader workers, nor on where a run was resumed, so the step is the loader's only state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from localign import rng
from localign.backbones.native import padded_patches
from localign.data.decoding import UnreadableImage
from localign.data.sources import ImageSource
from localign.data.stream import SampleStream, sample_stream
from localign.data.transforms import NativeView, TrainTransform
from localign.data.untrusted.faults import machine_faults
from localign.data.workers import data_loader, served
from localign.engine.distributed import TIMEOUT
from localign.errors import UserError

REPLACEMENT_ATTEMPTS = 100
"""Replacements drawn for an unreadable sample before the run gives up."""


class Batch(NamedTuple):
    """Samples in the order of their positions."""

    images: Tensor
    """uint8 ``(batch, 3, H, W)``, 0..255."""
    positions: Tensor
    """int64 ``(batch,)``, global positions in the stream."""
    indices: Tensor
    """int64 ``(batch,)``, the images' indices in the source, replacements included."""
    bad: tuple[tuple[str, str], ...]
    """(name, reason) of unreadable images that were replaced."""
    grids: Sequence[Sequence[int]] = ()
    """Rows and columns of patches of each image, if images have several sizes. ``images`` are then uint8 patches
    ``(batch, longest, 3 * patch height * patch width)``; the padding is 0."""
    views: Tensor | None = None
    """What a task draws for each image besides its pixels, drawn by the loader's process; None if it draws itself."""


DrawViews = Callable[[Batch], Tensor]
"""Draws a tensor whose first dimension is the batch's, as a function of the batch. Workers get a copy of it, so it must
not hold a model."""


def collated(
    samples: list[Tensor], positions: Tensor, indices: Tensor, patch: tuple[int, int] | None
) -> Batch:
    """Images of one size as a stack; with ``patch``, images of several sizes as padded patches."""
    if patch is None:
        return Batch(torch.stack(samples), positions, indices, ())
    patches, grids = padded_patches(samples, patch)
    return Batch(patches, positions, indices, (), grids)


class BadImages:
    """The distinct unreadable images that a run has met.

    Args:
        total: Images in the source.
        max_share: Share of unreadable images beyond which :meth:`add` raises, 0..1.

    Raises:
        UserError: ``max_share`` is out of range.
    """

    def __init__(self, total: int, max_share: float = 0.01) -> None:
        if not 0.0 <= max_share <= 1.0:
            raise UserError(f"the share of unreadable images must lie in 0..1, not {max_share}")
        self.total, self.max_share = total, max_share
        self.reasons: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    @property
    def share(self) -> float:
        """Distinct unreadable images over all images of the source."""
        return len(self.reasons) / self.total if self.total else 0.0

    def add(self, bad: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        """Record unreadable images, as (name, reason).

        Returns:
            The images that were not recorded before, for the log.

        Raises:
            UserError: The share of unreadable images now exceeds ``max_share``.
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
    """The index, below ``length``, that replaces an unreadable sample; ``attempt`` counts from 1."""
    return int(rng.generator(seed, "replacement", position, attempt).integers(length))


class _Fetched(NamedTuple):
    batch: Any
    """None if ``lost`` is set or no sample is readable."""
    bad: list[tuple[str, str]]
    lost: int | None
    """A position for which all replacements are unreadable."""


class StreamReader(ABC, Dataset[_Fetched]):
    """Reads micro-batches in a loader worker; it is indexed by lists of (position, index).

    An unreadable sample is replaced by one drawn from (seed, position, attempt), so replacements are part of the
    stream.

    Args:
        seed: The run's seed.
        length: Samples in the data.
    """

    def __init__(self, seed: int, length: int) -> None:
        self.seed, self.length = seed, length

    @abstractmethod
    def read(self, index: int, position: int) -> Any:
        """Read one sample. Raises UnreadableImage if the sample is unusable; a lack of memory ends the run."""

    @abstractmethod
    def collate(self, samples: list[Any], positions: Tensor, indices: Tensor) -> Any:
        """Combine samples that :meth:`read` returned into a named tuple with an empty field ``bad``.

        Positions and indices are int64 ``(samples,)``.
        """

    def __getitem__(self, samples: list[tuple[int, int]]) -> _Fetched:
        bad: dict[str, str] = {}
        values, indices = [], []
        for position, index in samples:
            sample = self._read_or_replace(position, index, bad)
            if sample is None:
                return _Fetched(None, list(bad.items()), position)
            values.append(sample[0])
            indices.append(sample[1])
        positions = torch.tensor([position for position, _ in samples], dtype=torch.int64)
        with machine_faults(f"the batch at position {samples[0][0]}"):
            batch = self.collate(values, positions, torch.tensor(indices, dtype=torch.int64))
        return _Fetched(batch, list(bad.items()), None)

    def _read_or_replace(self, position: int, index: int, bad: dict[str, str]) -> tuple[Any, int] | None:
        """The sample and its index; None if all replacements are unreadable."""
        for attempt in range(REPLACEMENT_ATTEMPTS + 1):
            if attempt:
                index = replacement(self.seed, position, attempt, self.length)
            try:
                with machine_faults(f"the sample at position {position}"):
                    return self.read(index, position), index
            except UnreadableImage as error:
                bad[error.name] = error.reason
        return None


class _ImageReader(StreamReader):
    def __init__(
        self, source: ImageSource, transform: TrainTransform, seed: int, views: DrawViews | None = None
    ) -> None:
        super().__init__(seed, len(source))
        self.source, self.transform, self.views = source, transform, views

    def read(self, index: int, position: int) -> Tensor:
        load = self.source.undecoded if self.transform.takes_undecoded else self.source.load
        return self.transform(load(index), self.seed, position)

    def collate(self, samples: list[Tensor], positions: Tensor, indices: Tensor) -> Batch:
        batch = collated(samples, positions, indices, self.transform.patch)
        return batch if self.views is None else batch._replace(views=self.views(batch))


class _OrderedReader(Dataset[_Fetched]):
    """Reads batches in a loader worker without unreadable images; it is indexed by lists of indices."""

    def __init__(self, source: ImageSource, transform: Callable[[Any], Tensor]) -> None:
        self.source, self.transform = source, transform

    def __getitem__(self, samples: list[int]) -> _Fetched:
        bad: dict[str, str] = {}
        images = {index: image for index in samples if (image := self._read(index, bad)) is not None}
        if not images:
            return _Fetched(None, list(bad.items()), None)
        read = torch.tensor(list(images), dtype=torch.int64)
        with machine_faults(f"the batch at image {samples[0]}"):
            patch = self.transform.patch if isinstance(self.transform, NativeView) else None
            batch = collated(list(images.values()), read, read.clone(), patch)
        return _Fetched(batch, list(bad.items()), None)

    def _read(self, index: int, bad: dict[str, str]) -> Tensor | None:
        try:
            with machine_faults(f"image {index}"):
                return self.transform(self.source.load(index))
        except UnreadableImage as error:
            bad[error.name] = error.reason
        return None


class TrainLoader:
    """This rank's micro-batches of a range of steps, in order.

    Step s holds the global positions s * global_batch .. (s + 1) * global_batch - 1. Rank r takes the r-th of
    ``world_size`` equal consecutive parts and serves it in micro-batches of ``micro_batch``.

    An unreadable image is replaced by one drawn from (seed, position, attempt), so replacements are part of the
    stream.

    Args:
        source: The images.
        transform: (image, seed, position) -> uint8 ``(3, H, W)``.
        seed: The run's seed.
        global_batch: Samples per step over all ranks.
        micro_batch: Samples per yielded batch.
        rank: Index of this process, below ``world_size``.
        world_size: Number of processes.
        workers: Loader processes of this rank; 0 loads in this process.
        start_step, end_step: The first step to serve, and one past the last.
        shuffle: Draw a new order in each epoch.
        pin_memory: Return page-locked batches, whose copies to a CUDA device overlap computation.
        max_bad_share: Stop when more than this share of the images is unreadable.
        multiprocessing_context: ``fork``, ``spawn`` or ``forkserver``; default fork on Linux, spawn elsewhere.
        timeout: Seconds without a batch from the workers after which a pass fails.
        views: Draws each batch's ``views`` in the loader's process.

    Attributes:
        bad: The unreadable images that this rank has met.

    Raises:
        UserError: The sizes contradict one another; on iteration, too many images are unreadable.
        RunFailure: On iteration, a loader worker died.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: TrainTransform,
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
        timeout: float = TIMEOUT,
        views: DrawViews | None = None,
    ) -> None:
        check_batches(global_batch, micro_batch, rank, world_size)
        if not 0 <= start_step <= end_step:
            raise UserError(f"steps must ascend from 0 or above, not from {start_step} to {end_step}")
        self.source = source
        self.stream: SampleStream = sample_stream(source, seed, shuffle)
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.world_size = rank, world_size
        self.start_step, self.end_step = start_step, end_step
        self.bad = BadImages(len(source), max_bad_share)
        self.bad.add(source.unreadable)
        reader = _ImageReader(source, transform, seed, views)
        self._loader = data_loader(
            reader, self._samples, workers, pin_memory, multiprocessing_context, timeout
        )

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches per step of this rank."""
        return self.global_batch // self.world_size // self.micro_batch

    def __len__(self) -> int:
        return (self.end_step - self.start_step) * self.micro_batches_per_step

    def __iter__(self) -> Iterator[Batch]:
        return served_batches(self._loader, self.bad)

    def _samples(self) -> Iterator[list[tuple[int, int]]]:
        per_rank = self.global_batch // self.world_size
        for step in range(self.start_step, self.end_step):
            first = step * self.global_batch + self.rank * per_rank
            for begin in range(first, first + per_rank, self.micro_batch):
                indices = self.stream.indices(begin, begin + self.micro_batch)
                yield [(begin + i, int(index)) for i, index in enumerate(indices)]


class EvalLoader:
    """Every image of a source once, in order, sharded over ranks.

    Rank r takes the r-th of ``world_size`` consecutive parts, whose sizes differ by at most one image; the last
    batch may be smaller. Unreadable images are left out, so ``positions`` (equal to ``indices``) may have gaps.

    Args:
        source: The images.
        transform: image -> uint8 ``(3, H, W)``; a :class:`~localign.data.transforms.NativeView` gives several sizes.
        batch: Most samples per yielded batch.
        limit: Use only the first ``limit`` images; None for all.
        rank, world_size, workers, pin_memory, max_bad_share, timeout: As for ``TrainLoader``.

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
        timeout: float = TIMEOUT,
    ) -> None:
        check_batches(batch * world_size, batch, rank, world_size)
        total = len(source) if limit is None else min(limit, len(source))
        self.source, self.batch = source, batch
        self.begin, self.end = rank * total // world_size, (rank + 1) * total // world_size
        self.bad = BadImages(len(source), max_bad_share)
        reader = _OrderedReader(source, transform)
        self._loader = data_loader(reader, self._samples, workers, pin_memory, None, timeout)

    def __len__(self) -> int:  # fewer if all images of a batch are unreadable
        return -(-(self.end - self.begin) // self.batch)

    def __iter__(self) -> Iterator[Batch]:
        self.bad.reasons.clear()
        yield from served_batches(self._loader, self.bad)

    def _samples(self) -> Iterator[list[int]]:
        for begin in range(self.begin, self.end, self.batch):
            yield list(range(begin, min(begin + self.batch, self.end)))


def check_batches(global_batch: int, micro_batch: int, rank: int, world_size: int) -> None:
    """Raise UserError unless a batch divides into ranks and micro-batches."""
    if not 0 <= rank < world_size:
        raise UserError(f"rank {rank} does not exist among {world_size} processes")
    if global_batch < 1 or micro_batch < 1:
        raise UserError(f"batches must be at least 1: batch {global_batch}, micro-batch {micro_batch}")
    if global_batch % (world_size * micro_batch):
        raise UserError(
            f"a batch of {global_batch} does not divide into {world_size} processes "
            f"times micro-batches of {micro_batch}"
        )


def served_batches(loader: DataLoader[_Fetched], bad: BadImages, noun: str = "image") -> Iterator[Any]:
    """One pass over a reader's micro-batches.

    Args:
        loader: The loader of a :class:`StreamReader`.
        bad: Records the unreadable samples.
        noun: The word for a sample in errors.

    Raises:
        UserError: Too many samples are unreadable, or all replacements of a sample are.
        RunFailure: A worker died or gave up.
    """
    for batch, pairs, lost in served(loader):
        named = tuple((name, reason) for name, reason in pairs)  # pinning memory turns tuples into lists
        bad.add(named)
        if lost is not None:
            raise UserError(
                f"no usable {noun} for position {lost} in {REPLACEMENT_ATTEMPTS} draws; "
                f"{len(bad)} of {bad.total} {noun}s are known to be unusable"
            )
        if batch is not None:
            yield batch._replace(bad=named)
