"""Photographs for the benchmarks, synthetic or copied from a folder; as a folder, tar shards and a parquet file."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from localign import rng
from localign.data.decoding import UnreadableImage, decode_image
from localign.data.sources import FolderSource
from localign.datatools.shard import write_shards
from localign.errors import UserError
from localign.options.datatools import ShardConfig

WIDTH, HEIGHT, QUALITY = 2000, 1500, 90
_FIELDS = 4
_SHARD_IMAGES = 64


def draw(folder: Path, count: int, seed: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    """Write synthetic photographs as JPEG files of about 2.6 bits per pixel, like real photographs at this quality.

    As in photographs, the amplitude of their spectrum falls with a power of the frequency, faster for colour than for
    brightness.

    Args:
        folder: The output folder.
        count: Number of files.
        seed: Seed of the content.
        size: Width and height, pixels.
    """
    width, height = size
    fields = [_field(seed, number, height, width) for number in range(min(count, _FIELDS))]
    for number in range(count):
        draws = rng.generator(seed, "photograph", number)
        shift = int(draws.integers(height)), int(draws.integers(width))
        # Fields are periodic, so that a shift leaves no seam.
        values = np.roll(fields[number % _FIELDS], shift, (0, 1)) * draws.uniform(0.7, 1.1)
        levels = (values + draws.uniform(90, 150)).clip(0, 255).astype(np.uint8)
        Image.fromarray(levels).save(folder / f"{number:05}.jpg", quality=QUALITY)


def _field(seed: int, number: int, height: int, width: int) -> NDArray[np.float32]:
    """Random texture, float32 ``(height, width, 3)``, with mean 0 and a standard deviation of about 50 levels."""
    draws = rng.generator(seed, "photographs' texture", number)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    parts = []
    for power in (1.25, 1.6, 1.6):
        phases = np.exp(2j * np.pi * draws.random(frequency.shape))
        part = np.fft.irfft2(phases / frequency**power, (height, width))
        parts.append((part / part.std()).astype(np.float32))
    brightness, red, blue = parts
    texture: NDArray[np.float32] = 50 * np.stack(
        [brightness + 0.3 * red, brightness, brightness + 0.3 * blue], axis=-1
    )
    return texture


def copy_from(folder: Path, source: str, count: int) -> None:
    """Copy ``count`` evenly spaced images of the folder ``source`` into ``folder``.

    Raises:
        UserError: The source is not a folder of images, or one of these images is unreadable.
    """
    images = FolderSource(source)
    count = min(count, len(images))
    for number in range(count):
        index = number * len(images) // count
        try:
            data = images.encoded(index)
            decode_image(data, images.name(index))
        except UnreadableImage as error:
            raise UserError(f"{source} holds an unreadable image, {error}") from None
        (folder / f"{number:05}{images.path(index).suffix}").write_bytes(data)


def pack_forms(folder: Path, out: Path) -> dict[str, str]:
    """Pack the images of a folder into tar shards and a parquet file.

    Args:
        folder: A folder of images without sub-folders.
        out: The output folder.

    Returns:
        Name of the form -> value of ``--data``. Without parquet if pyarrow is not installed.
    """
    forms = {"folder": str(folder), "tar": str(out / "tar")}
    shards = ShardConfig(
        source=str(folder), out=forms["tar"], workers=0, shard_images=_SHARD_IMAGES, shuffle=False
    )
    write_shards(shards)
    if importlib.util.find_spec("pyarrow") is not None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        images = [{"bytes": file.read_bytes(), "path": file.name} for file in sorted(folder.iterdir())]
        forms["parquet"] = str(out / "images.parquet")
        pq.write_table(pa.table({"image": images}), forms["parquet"], row_group_size=_SHARD_IMAGES)
    return forms
