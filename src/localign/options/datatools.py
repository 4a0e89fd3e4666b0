"""Options of `localign data ...`."""

import os
from dataclasses import dataclass

from localign.errors import UserError


@dataclass(frozen=True, kw_only=True)
class _ReadConfig:
    source: str = ""
    """What to read: all that --data of a training command takes, but mixtures and scenes."""
    workers: int | None = None
    """Processes, default as many as processors; 0 works in this one."""

    def __post_init__(self) -> None:
        if not self.source:
            raise UserError("which images? give a folder, a list, shards or parquet files")
        if self.source.partition(":")[0] == "scenes":
            raise UserError("scenes are drawn when they are needed: there are no files to go through")
        if self.workers is not None and self.workers < 0:
            raise UserError(f"there cannot be {self.workers} workers")

    @property
    def processes(self) -> int:
        """Processes to work in."""
        return (os.cpu_count() or 1) if self.workers is None else self.workers


@dataclass(frozen=True, kw_only=True)
class _PackConfig(_ReadConfig):
    out: str = ""
    """Folder to write; it must not be there yet, unless by the same command."""
    exclude: str | None = None
    """List of images to leave out, as `localign data verify` writes it."""
    resize: int | None = None
    """Bring the short side down to so many pixels and write JPEG; smaller images are copied as they are. Default:
    all are copied as they are, without being decoded."""
    quality: int | None = None
    """Of JPEG with --resize, 1..100, default 92."""
    shard_images: int = 10_000
    """Images per shard."""
    seed: int = 0
    """Of the order of the images (and, of in21k-p, of the choice of validation images)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.out:
            raise UserError("where to? give the folder to write as the second argument")
        if self.resize is not None and self.resize < 1:
            raise UserError(f"--resize must be above 0, not {self.resize}")
        if self.quality is not None and self.resize is None:
            raise UserError("--quality has no effect without --resize: images are copied as they are")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise UserError(f"--quality lies in 1..100; {self.quality} does not")
        if self.shard_images < 1:
            raise UserError(f"--shard-images must be above 0, not {self.shard_images}")


@dataclass(frozen=True, kw_only=True)
class ShardConfig(_PackConfig):
    """Pack images into tar shards of webdataset's layout, in a shuffled order, with checksums and an index.

    An interrupted command goes on where it was, by being given again.
    """

    shuffle: bool = True
    """Pack in a shuffled order, which shards that are streamed from elsewhere need."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed and not self.shuffle:
            raise UserError("--seed has no effect without --shuffle")


@dataclass(frozen=True, kw_only=True)
class In21kConfig(_PackConfig):
    """Make the processed ImageNet-21k: no small classes, and some images of each for validation.

    The source is a folder of class folders, or of one tar file per class. OUT/train and OUT/val are written as
    `localign data shard` does.
    """

    min_images: int = 500
    """Classes with fewer images are left out. (The authors' script keeps those of 501 and more.)"""
    val_images: int = 50
    """Images of each class for validation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.val_images < self.min_images:
            raise UserError(
                f"--val-images {self.val_images} lies above 0 and below --min-images {self.min_images}"
            )


@dataclass(frozen=True, kw_only=True)
class DataVerifyConfig(_ReadConfig):
    """Decode every image, and compare shards with their checksums; write the list of what is bad.

    The exit code is 1 where anything is.
    """

    out: str = "bad.jsonl"
    """The list, for --exclude of training commands: one object with path and reason per line."""


@dataclass(frozen=True, kw_only=True)
class StatsConfig(_ReadConfig):
    """Show how many images and classes there are, and how large they are."""

    images: int | None = 2000
    """Images that are opened, at even distances; null for all."""
    out: str | None = None
    """JSON file of the numbers, too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images is not None and self.images < 1:
            raise UserError(f"--images must be above 0, not {self.images}")
