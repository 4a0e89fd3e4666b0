"""The order of samples: which image comes at which global position, as a pure function of the seed."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from localign import rng
from localign.errors import UserError


class SampleStream:
    """Maps a global position to (epoch, index). Each of ``length`` images comes once per epoch.

    Args:
        seed: The run's seed.
        length: Number of images.
        shuffle: Draw a new order in each epoch; False keeps the images' own order.

    Raises:
        UserError: There are no images.
    """

    def __init__(self, seed: int, length: int, shuffle: bool = True) -> None:
        if length < 1:
            raise UserError("the source holds no images: there are no samples to stream")
        self.seed, self.length, self.shuffle = seed, length, shuffle
        self._epoch = -1
        self._order: NDArray[np.integer] = np.empty(0, np.int64)

    def __call__(self, position: int) -> tuple[int, int]:
        """The (epoch, index) of one position."""
        epoch, within = divmod(position, self.length)
        return epoch, int(self.epoch_order(epoch)[within]) if self.shuffle else within

    def indices(self, begin: int, end: int) -> NDArray[np.int64]:
        """The indices at positions begin..end-1, int64 ``(end - begin,)``."""
        if not self.shuffle:
            return np.arange(begin, end, dtype=np.int64) % self.length
        parts = []
        while begin < end:
            epoch, within = divmod(begin, self.length)
            parts.append(self.epoch_order(epoch)[within : within + end - begin])
            begin += len(parts[-1])
        return np.concatenate(parts, dtype=np.int64) if parts else np.empty(0, np.int64)

    def epoch_order(self, epoch: int) -> NDArray[np.integer]:
        """The order of one epoch, integers ``(length,)``. The order of the last epoch used is cached."""
        if epoch != self._epoch:
            self._order = self._shuffled(epoch).astype(np.int32 if self.length <= 2**31 else np.int64)
            self._epoch = epoch
        return self._order

    def _shuffled(self, epoch: int) -> NDArray[np.integer]:
        return rng.generator(self.seed, "epoch order", epoch).permutation(self.length)


class BlockStream(SampleStream):
    """A stream that reads images block by block, for sources that read a whole row group or remote shard at once.

    Each epoch visits the blocks in a new order and shuffles the images within ``window`` blocks at a time.

    Args:
        seed: The run's seed.
        blocks: int64 ``(blocks,)``, the number of consecutive images in each block.
        window: Number of blocks that a reader keeps in its cache.
        shuffle: Draw a new order in each epoch; False keeps the images' own order.
    """

    def __init__(self, seed: int, blocks: NDArray[np.int64], window: int, shuffle: bool = True) -> None:
        super().__init__(seed, int(blocks.sum()), shuffle)
        self.blocks, self.window = blocks, window

    def _shuffled(self, epoch: int) -> NDArray[np.integer]:
        draw = rng.generator(self.seed, "block order", epoch)
        order = draw.permutation(len(self.blocks))
        begins = np.cumsum(self.blocks) - self.blocks
        windows = []
        for first in range(0, len(order), self.window):
            window = order[first : first + self.window]
            images = [np.arange(begins[b], begins[b] + self.blocks[b]) for b in window]
            windows.append(draw.permutation(np.concatenate(images)))
        return np.concatenate(windows)


class Streamed(Protocol):
    """Anything that defines the order of its samples, such as an ``ImageSource``."""

    def stream(self, seed: int, shuffle: bool = True) -> SampleStream:
        """The order of the samples."""


def sample_stream(source: Streamed, seed: int, shuffle: bool = True) -> SampleStream:
    """The order of a source's images.

    Args:
        source: An ``ImageSource``.
        seed: The run's seed.
        shuffle: Draw a new order in each epoch; False keeps the source's order.
    """
    return source.stream(seed, shuffle)
