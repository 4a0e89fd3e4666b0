"""Several sources in one stream, each as often as its weight says."""

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
from localign.data.sources.base import ImageSource, load_pixels, load_undecoded
from localign.data.stream import SampleStream, sample_stream
from localign.errors import UserError


class MixtureSource:
    """The images of several sources, one source after the other, and a stream that mixes them by weight.

    An epoch is as many samples as all sources hold images. A source with a larger weight than its share of images
    is gone through more than once in it, one with a smaller weight less than once, and the next epoch goes on where
    this one ended: each source is shuffled and used up before it begins anew.

    Args:
        sources: The sources.
        weights: How often each comes, relative to one another; None: as many images as it has.
        titles: What each is called in front of its images' names.

    Attributes:
        unreadable: (name, reason) of what the sources know to be unreadable.

    Raises:
        UserError: There are no two sources, or weights that are not above 0.
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
            raise UserError(f"a mixture takes two sources or more, not {len(self.sources)}")
        if not len(self.sources) == len(self.weights) == len(self.titles):
            raise UserError("a mixture takes a weight and a title for each source")
        if any(not 0 < w < float("inf") for w in self.weights):
            raise UserError(f"the weights of a mixture are above 0; they are {self.weights}")
        self._ends = np.cumsum(self.sizes)
        self.unreadable = tuple(
            (f"{title}: {name}", reason)
            for title, source in zip(self.titles, sources, strict=True)
            for name, reason in getattr(source, "unreadable", ())
        )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, index: int) -> str:
        """The source's title and its name of the image."""
        number, within = self.place(index)
        return f"{self.titles[number]}: {self.sources[number].name(within)}"

    def load(self, index: int) -> Image.Image:
        """The image in RGB. Raises UnreadableImage."""
        number, within = self.place(index)
        with _titled(self.titles[number]):
            return self.sources[number].load(within)

    def pixels(self, index: int) -> Tensor:
        """The image as uint8 ``(3, H, W)``. Raises UnreadableImage."""
        number, within = self.place(index)
        with _titled(self.titles[number]):
            return load_pixels(self.sources[number], within)

    def undecoded(self, index: int) -> Image.Image | UndecodedJpeg:
        """The image, a JPEG before it is decoded. Raises UnreadableImage."""
        number, within = self.place(index)
        with _titled(self.titles[number]):
            image = load_undecoded(self.sources[number], within)
        if isinstance(image, UndecodedJpeg):
            image.name = self.name(index)  # what fails later is said with the source's title, too
        return image

    def place(self, index: int) -> tuple[int, int]:
        """(source, index in it) of an index of the mixture."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - int(self._ends[number]) + self.sizes[number]

    def fingerprint(self) -> str:
        """Of the sources and weights."""
        content = [[s.fingerprint(), w] for s, w in zip(self.sources, self.shares, strict=True)]
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()

    @property
    def shares(self) -> list[float]:
        """The weights, of a sum of 1."""
        return [w / sum(self.weights) for w in self.weights]

    @property
    def notice(self) -> str | None:
        """What the sources have to say before a run."""
        said = [
            f"{t}: {n}"
            for t, s in zip(self.titles, self.sources, strict=True)
            if (n := getattr(s, "notice", None))
        ]
        return "; ".join(said) or None

    def stream(self, seed: int, shuffle: bool = True) -> MixtureStream:
        """The stream of samples."""
        return MixtureStream(self, seed, shuffle)


class MixtureStream(SampleStream):
    """The stream of a mixture: in each epoch every source has its share of the places, drawn anew."""

    def __init__(self, mixture: MixtureSource, seed: int, shuffle: bool = True) -> None:
        super().__init__(seed, len(mixture))
        self._mixed = shuffle
        self._bases = [0, *np.cumsum(mixture.sizes).tolist()]
        self.counts = apportioned(self.length, mixture.shares)
        self._parts = [
            sample_stream(source, rng.key(seed, "mixture", number) >> 1, shuffle)
            for number, source in enumerate(mixture.sources)
        ]

    def _shuffled(self, epoch: int) -> NDArray[np.integer]:
        whose = np.repeat(np.arange(len(self.counts)), self.counts)
        if self._mixed:
            whose = rng.generator(self.seed, "epoch order", epoch).permutation(whose)
        else:  # at even distances
            whose = whose[
                np.argsort(
                    np.concatenate([(np.arange(n) + 0.5) / max(n, 1) for n in self.counts]), kind="stable"
                )
            ]
        order = np.empty(self.length, dtype=np.int64)
        for number, (count, base, part) in enumerate(
            zip(self.counts, self._bases[:-1], self._parts, strict=True)
        ):
            order[whose == number] = base + part.indices(epoch * count, (epoch + 1) * count)
        return order


def apportioned(total: int, shares: Sequence[float]) -> list[int]:
    """``total`` in whole numbers by shares of a sum of 1: those with the largest remainders are rounded up."""
    exact = np.array(shares) * total
    counts = np.floor(exact).astype(int)
    for number in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[number] += 1
    return counts.tolist()


@contextmanager
def _titled(title: str) -> Iterator[None]:
    """An unreadable image's name with its source's title in front."""
    try:
        yield
    except UnreadableImage as error:
        raise UnreadableImage(f"{title}: {error.name}", error.reason) from None
