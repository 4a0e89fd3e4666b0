"""The samples that a run sees with a given number of ranks and workers."""

from __future__ import annotations

from collections.abc import Callable

from localign.data.loader import TrainLoader
from localign.data.sources import ImageSource
from localign.data.transforms import TrainTransform

BATCH = 12


def samples(
    opened: Callable[[], ImageSource], start: int, end: int, world: int, workers: int
) -> dict[int, tuple[int, bytes]]:
    """Global position -> (image index, pixels after augmentation). Each rank opens the source itself."""
    found: dict[int, tuple[int, bytes]] = {}
    for rank in range(world):
        loader = TrainLoader(
            opened(),
            TrainTransform(8),
            seed=5,
            global_batch=BATCH,
            micro_batch=2,
            rank=rank,
            world_size=world,
            workers=workers,
            start_step=start,
            end_step=end,
        )
        for batch in loader:
            for image, position, index in zip(*batch[:3], strict=True):
                found[int(position)] = int(index), bytes(image.numpy())
    return found
