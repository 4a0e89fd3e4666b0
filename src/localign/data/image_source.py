"""The interface of image sources: random access to named images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from localign.data.stream import BlockStream, SampleStream

if TYPE_CHECKING:
    from torch import Tensor

    from localign.data.decoding import UndecodedJpeg


class ImageSource(ABC):
    """Random access to named images. Instances are picklable, because they are sent to loader workers."""

    kind: str
    unreadable: tuple[tuple[str, str], ...] = ()
    """(name, reason) of the images that are known to be unreadable when the source is opened."""
    blocks: NDArray[np.int64] | None = None
    """int64 ``(blocks,)``, the number of consecutive images in each block that is read as a whole; else None."""
    window: int = 1
    """Number of blocks within which images are shuffled."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of images, readable or not."""

    @abstractmethod
    def name(self, index: int) -> str:
        """A stable name for logs, such as ``n01440764/x.jpg``."""

    def place(self, index: int) -> tuple[str, str]:
        """Where an image is: its shard, "" for images outside shards, and its name in the shard or the source."""
        return "", self.name(index)

    @abstractmethod
    def load(self, index: int) -> Image.Image:
        """The image in RGB. Raises UnreadableImage."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A short hash of the content; a run refuses to resume on a source with another fingerprint."""

    def data_files(self) -> Iterator[tuple[str, str]]:
        """(name, path) of the local files that hold the images."""
        return iter(())

    @property
    def notice(self) -> str | None:
        """A line that a run prints before it starts, or None."""
        return None

    def pixels(self, index: int) -> Tensor:
        """The image as uint8 ``(3, H, W)``, upright, channels last in memory. Raises UnreadableImage."""
        import torch

        return torch.from_numpy(np.array(self.load(index))).permute(2, 0, 1)

    def undecoded(self, index: int) -> Image.Image | UndecodedJpeg:
        """A JPEG before it is decoded, if the source reads files; else the image in RGB.

        Raises:
            UnreadableImage: The file cannot be opened. Decoding a JPEG later may raise it too.
        """
        return self.load(index)

    def stream(self, seed: int, shuffle: bool = True) -> SampleStream:
        """The order of the images: shuffled by blocks if the source has blocks, else shuffled as a whole.

        Args:
            seed: The run's seed.
            shuffle: Draw a new order in each epoch; False keeps the source's order.
        """
        if self.blocks is not None:
            return BlockStream(seed, self.blocks, self.window, shuffle)
        return SampleStream(seed, len(self), shuffle)
