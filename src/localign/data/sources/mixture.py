"""Several sources in one stream, each drawn in proportion to its weight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from localign import rng
from localign.data.decoding import UndecodedJpeg, UnreadableImage
from localign.data.image_source import ImageSource
from localign.data.stream import SampleStream
from localign.errors import UserError


class MixtureSource(ImageSource):
    """The concatenated images of several sources, and a stream that mixes the sources by weight.

    An epoch has as many samples as all sources together have images. A source whose weight exceeds its share of
    the images is passed more than once per epoch, a source with a smaller weight less than once. Each source
    continues in the next epoch where it stopped, and is reshuffled only when all its images have been used.

    Args:
        sources: The sources.
        weights: Relative weights; None weights each source by its number of images.
        titles: Prefixes of the image names, one per source; default their numbers.

    Raises:
        UserError: There are fewer than two sources, or a weight is not above 0.
    """

    kind = "mixture"

    def __init__(
        self,
        sources: Sequence[ImageSource],
        weights: Sequence[float] | None = None,
        titles: Sequence[str] = (),
    ) -> None:
        self.sources = tuple(sources)
        self.sizes = [len(source) for source in sources]
        self.weights = [float(w) for w in (self.sizes if weights is None else weights)]
        self.titles = list(titles) or [str(number) for number in range(len(sources))]
        if len(self.sources) < 2:
            raise UserError(f"a mixture needs two sources or more, not {len(self.sources)}")
        if not len(self.sources) == len(self.weights) == len(self.titles):
            raise UserError("a mixture needs a weight and a title for each source")
        if any(not 0 < w < float("inf") for w in self.weights):
            raise UserError(f"the weights of a mixture must be above 0, not {self.weights}")
        self._ends = np.cumsum(self.sizes)
        self.unreadable = tuple(
            (f"{title}: {name}", reason)
            for title, source in zip(self.titles, sources, strict=True)
            for name, reason in source.unreadable
        )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, index: int) -> str:
        """The source's title and the image's name in the source."""
        number, local = self.locate(index)
        return f"{self.titles[number]}: {self.sources[number].name(local)}"

    def load(self, index: int) -> Image.Image:
        """The image in RGB. Raises UnreadableImage."""
        number, local = self.locate(index)
        with _title_in_errors(self.titles[number]):
            return self.sources[number].load(local)

    def pixels(self, index: int) -> Tensor:
        """The image as uint8 ``(3, H, W)``. Raises UnreadableImage."""
        number, local = self.locate(index)
        with _title_in_errors(self.titles[number]):
            return self.sources[number].pixels(local)

    def undecoded(self, index: int) -> Image.Image | UndecodedJpeg:
        """See :meth:`ImageSource.undecoded`."""
        number, local = self.locate(index)
        with _title_in_errors(self.titles[number]):
            image = self.sources[number].undecoded(local)
        if isinstance(image, UndecodedJpeg):
            image.name = self.name(index)  # so that a later decoding error shows the title too
        return image

    def data_files(self) -> Iterator[tuple[str, str]]:
        for title, source in zip(self.titles, self.sources, strict=True):
            for name, path in source.data_files():
                yield f"{title}: {name}", path

    def locate(self, index: int) -> tuple[int, int]:
        """The number of the source and the index in that source, for an index of the mixture."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - int(self._ends[number]) + self.sizes[number]

    def fingerprint(self) -> str:
        """A hash of the sources' fingerprints and the weights."""
        content = [[s.fingerprint(), w] for s, w in zip(self.sources, self.shares, strict=True)]
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()

    @property
    def shares(self) -> list[float]:
        """The weights, normalised to a sum of 1."""
        return [w / sum(self.weights) for w in self.weights]

    @property
    def notice(self) -> str | None:
        """The notices of the sources, or None."""
        pairs = zip(self.titles, self.sources, strict=True)
        return "; ".join(f"{title}: {source.notice}" for title, source in pairs if source.notice) or None

    def stream(self, seed: int, shuffle: bool = True) -> MixtureStream:
        """The stream that mixes the sources by weight."""
        return MixtureStream(self, seed, shuffle)


class MixtureStream(SampleStream):
    """The stream of a mixture. Each epoch assigns every source its share of the positions at random.

    With ``shuffle=False`` the positions of each source are evenly spaced instead.
    """

    def __init__(self, mixture: MixtureSource, seed: int, shuffle: bool = True) -> None:
        super().__init__(seed, len(mixture))
        self._shuffle_sources = shuffle
        self._bases = [0, *np.cumsum(mixture.sizes).tolist()]
        self.counts = apportion(self.length, mixture.shares)
        self._streams = [
            source.stream(rng.key(seed, "mixture", number) >> 1, shuffle)
            for number, source in enumerate(mixture.sources)
        ]

    def _shuffled(self, epoch: int) -> NDArray[np.integer]:
        numbers = np.repeat(np.arange(len(self.counts)), self.counts)
        if self._shuffle_sources:
            numbers = rng.generator(self.seed, "epoch order", epoch).permutation(numbers)
        else:
            spaced = np.concatenate([(np.arange(n) + 0.5) / max(n, 1) for n in self.counts])
            numbers = numbers[np.argsort(spaced, kind="stable")]
        order = np.empty(self.length, dtype=np.int64)
        for number, (count, base, stream) in enumerate(
            zip(self.counts, self._bases[:-1], self._streams, strict=True)
        ):
            order[numbers == number] = base + stream.indices(epoch * count, (epoch + 1) * count)
        return order


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Split ``total`` into whole numbers by shares that sum to 1, rounding up the largest remainders."""
    exact = np.array(shares) * total
    counts = np.floor(exact).astype(int)
    for number in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[number] += 1
    return [int(count) for count in counts]


@contextmanager
def _title_in_errors(title: str) -> Iterator[None]:
    """Put the source's title in front of the name in UnreadableImage."""
    try:
        yield
    except UnreadableImage as error:
        raise UnreadableImage(f"{title}: {error.name}", error.reason) from None
