"""Scenes drawn once and kept in memory, for runs that see each scene many times."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from localign.data.scenes import SceneConfig, SceneSource, draw_batch, pair_presence


class CachedScenes(SceneSource):
    """A :class:`SceneSource` that draws all its scenes when it is built (9 KB each at 48 pixels, with labels).

    Args:
        config: How scenes look.
        split: One of :data:`localign.data.scenes.SPLITS`.
        length: Number of scenes.
        seed: Seed of the scenes.

    Attributes:
        images: uint8 ``(length, H, W, 3)``.
        labels: uint8 ``(length, H, W)``, pixel codes.
    """

    def __init__(
        self, config: SceneConfig | None = None, split: str = "train", length: int = 20_000, seed: int = 0
    ) -> None:
        super().__init__(config, split, length, seed)
        self.images, self.labels = draw_batch(self.config, seed, range(length), split)

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[self._checked(index)])

    def load_labelled(self, index: int) -> tuple[Image.Image, NDArray[np.uint8]]:
        return self.load(index), self.labels[self._checked(index)]

    def pair_presence(self) -> NDArray[np.bool_]:
        """The shape-colour pairs that each scene shows: bool ``(length, pairs)``."""
        return pair_presence(self.config, self.labels)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the arrays out: spawned loader workers draw the scenes again."""
        return {"config": self.config, "split": self.split, "length": self.length, "seed": self.seed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]
