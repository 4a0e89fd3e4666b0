"""Options of `localign data ...`."""

import os
from dataclasses import dataclass

from localign.errors import UserError
from localign.options.data import row_group_bytes


@dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """Options of commands that read images."""

    source: str = ""
    """Images to read: any value of --data of a training command, except mixtures and scenes."""
    field: str | None = None
    """Fields of tar samples, or columns of parquet files, that hold the image: the first that is there, as in
    jpg,png. Default the usual one, and never a label map; '*': every image file in the shards is a sample."""
    allow_outside: bool = False
    """Accept lists of files whose paths, absolute or with .., lead out of the list's folder."""
    max_row_group_gib: float | None = None
    """GiB that a row group of a parquet file may take in memory, in each worker; default 2."""
    workers: int | None = None
    """Worker processes; 0 works in the main process. Default one per processor."""

    def __post_init__(self) -> None:
        if not self.source:
            raise UserError("no images given; name a folder, a list, tar shards or parquet files")
        if self.source.partition(":")[0] == "scenes":
            raise UserError("scenes are drawn on demand: there are no files to read")
        if self.workers is not None and self.workers < 0:
            raise UserError(f"--workers must not be negative, not {self.workers}")
        row_group_bytes(self.max_row_group_gib)

    @property
    def processes(self) -> int:
        """Number of worker processes; 0 works in this process."""
        return (os.cpu_count() or 1) if self.workers is None else self.workers


@dataclass(frozen=True, kw_only=True)
class _PackConfig(ReadConfig):
    out: str = ""
    """Output folder; it must not exist, unless the same command wrote it."""
    exclude: str | None = None
    """List of images to leave out, as written by `localign data verify`."""
    resize: int | None = None
    """Shrink images to a short side of this many pixels, as JPEG; smaller images are copied unchanged. By default all
    images are copied unchanged, without decoding."""
    quality: int | None = None
    """JPEG quality with --resize, 1..100; default 92."""
    shard_images: int = 10_000
    """Images per shard."""
    seed: int = 0
    """Seed of the images' order, and of the choice of validation images of in21k-p."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.out:
            raise UserError("no output folder given; name it as the second argument")
        if self.resize is not None and self.resize < 1:
            raise UserError(f"--resize must be above 0, not {self.resize}")
        if self.quality is not None and self.resize is None:
            raise UserError("--quality has no effect without --resize: images are copied unchanged")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise UserError(f"--quality must lie in 1..100, not {self.quality}")
        if self.shard_images < 1:
            raise UserError(f"--shard-images must be above 0, not {self.shard_images}")


@dataclass(frozen=True, kw_only=True)
class ShardConfig(_PackConfig):
    """Pack images into tar shards in the webdataset layout, in shuffled order, with checksums and an index.

    Repeat an interrupted command to resume it.
    """

    shuffle: bool = True
    """Pack in shuffled order, which remote shards need."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed and not self.shuffle:
            raise UserError("--seed has no effect without --shuffle")


@dataclass(frozen=True, kw_only=True)
class In21kConfig(_PackConfig):
    """Make the processed ImageNet-21k: drop small classes, and split off validation images of each class.

    The source is a folder with one folder or one tar file per class. Writes tar shards to OUT/train and OUT/val, as
    `localign data shard` does.
    """

    min_images: int = 500
    """Classes with fewer images are left out. (The authors' script keeps classes with 501 or more.)"""
    val_images: int = 50
    """Validation images per class."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.val_images < self.min_images:
            raise UserError(
                f"--val-images must be above 0 and below --min-images {self.min_images}, not {self.val_images}"
            )


@dataclass(frozen=True, kw_only=True)
class DataVerifyConfig(ReadConfig):
    """Decode every image, compare shards with their checksums, and write the list of bad images.

    The exit code is 1 if an image or a shard is bad.
    """

    out: str = "bad.jsonl"
    """List of bad images for --exclude of training commands: one object with path and reason per line."""


@dataclass(frozen=True, kw_only=True)
class StatsConfig(ReadConfig):
    """Show the numbers and sizes of images and classes."""

    images: int | None = 2000
    """Number of evenly spaced images to open; null for all."""
    out: str | None = None
    """Also write the numbers to this JSON file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images is not None and self.images < 1:
            raise UserError(f"--images must be above 0, not {self.images}")
