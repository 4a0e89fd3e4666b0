"""Which sample comes at which global position: pure functions of (seed, epoch, position)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from localign import rng
from localign.errors import UserError


class SampleStream:
    """Global position -> (epoch, index): each of ``length`` images once per epoch."""

    def __init__(self, seed: int, length: int, shuffle: bool = True) -> None:
        if length < 1:
            raise UserError("a source without images gives no stream of samples")
        self.seed, self.length, self.shuffle = seed, length, shuffle
        self._epoch = -1
        self._order: NDArray[np.integer] = np.empty(0, np.int64)

    def __call__(self, position: int) -> tuple[int, int]:
        """(epoch, index) of one position."""
        epoch, within = divmod(position, self.length)
        return epoch, int(self.epoch_order(epoch)[within]) if self.shuffle else within

    def indices(self, begin: int, end: int) -> NDArray[np.int64]:
        """The indices of positions begin..end-1, int64 ``(end - begin,)``."""
        if not self.shuffle:
            return np.arange(begin, end, dtype=np.int64) % self.length
        parts = []
        while begin < end:
            epoch, within = divmod(begin, self.length)
            parts.append(self.epoch_order(epoch)[within : within + end - begin])
            begin += len(parts[-1])
        return np.concatenate(parts, dtype=np.int64) if parts else np.empty(0, np.int64)

    def epoch_order(self, epoch: int) -> NDArray[np.integer]:
        """The indices of an epoch in their order, ``(length,)``; the last one asked for is kept."""
        if epoch != self._epoch:
            self._order = self._shuffled(epoch).astype(np.int32 if self.length <= 2**31 else np.int64)
            self._epoch = epoch
        return self._order

    def _shuffled(self, epoch: int) -> NDArray[np.integer]:
        return rng.generator(self.seed, "epoch order", epoch).permutation(self.length)


class BlockStream(SampleStream):
    """A stream over images of which it is cheap to read those that lie together: a row group's, a remote shard's.

    In each epoch the blocks come in a new order, and the images are shuffled within ``window`` blocks at a time.

    Args:
        seed: The run's seed.
        blocks: int64 ``(blocks,)``, how many consecutive images each block holds.
        window: Blocks that a reader can keep at hand.
        shuffle: False gives the images in their own order.
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
            chosen = order[first : first + self.window]
            held = [np.arange(begins[b], begins[b] + self.blocks[b]) for b in chosen]
            windows.append(draw.permutation(np.concatenate(held)))
        return np.concatenate(windows)


def sample_stream(source: Any, seed: int, shuffle: bool = True) -> SampleStream:
    """The order in which the images of a source come.

    Args:
        source: An ``ImageSource``. Of a mixture, its own; where it has ``blocks`` and ``window``, images that lie
            together come near one another, as reading them needs it; else all are shuffled.
        seed: The run's seed.
        shuffle: A new order for each epoch.
    """
    if hasattr(source, "stream"):
        return source.stream(seed, shuffle)
    if getattr(source, "blocks", None) is not None:
        return BlockStream(seed, source.blocks, source.window, shuffle)
    return SampleStream(seed, len(source), shuffle)
