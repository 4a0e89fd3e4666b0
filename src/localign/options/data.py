"""Options of the training and validation images, shared by training commands."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from localign.errors import UserError
from localign.options.names import Decode, TrainCrop


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Options of the training images."""

    GROUPS: ClassVar[Mapping[str, str]] = {
        "Data": "data val val_images crop hflip auto_augment mixup cutmix decode field exclude max_bad_share "
        "allow_outside max_row_group_gib"
    }

    data: str = "scenes"
    """Training images: a folder; a list of files (.txt, .csv, .jsonl); a .tar or .parquet file, a folder of such
    files, or a pattern such as shards/{000..099}.tar; a mixture of these (.yaml); or scenes."""
    field: str | None = None
    """Fields of tar samples, or columns of parquet files, that hold the image: the first that is there, as in
    jpg,png. Default the usual one, and never a label map; '*': every image file in the shards is a sample."""
    allow_outside: bool = False
    """Accept lists of files whose paths, absolute or with .., lead out of the list's folder."""
    exclude: str | None = None
    """List of training images to leave out, as written by `localign data verify`."""
    val: str | None = None
    """Validation images, given like --data; default none (for scenes: scenes:val)."""
    val_images: int | None = 2048
    """Maximum number of images per validation; null for all."""
    crop: TrainCrop | None = None
    """published (keeps the aspect ratio, then zooms in up to 3.5 times and stretches, each with probability 1/2), rkrc
    (the same within narrow ranges: timm's defaults for this mode), rrc (random resized crop) or none; default published
    (for scenes: none)."""
    decode: Decode | None = None
    """scaled: decode large JPEGs at the reduced size that the crop needs; full: decode all JPEGs in full, as
    validation does. Default scaled."""
    hflip: float | None = None
    """Probability of a horizontal flip; default 0.5 (for scenes: 0)."""
    auto_augment: str | None = None
    """RandAugment string, for example rand-m9-mstd0.5-inc1."""
    mixup: float | None = None
    """Alpha of Mixup, which mixes images; default off."""
    cutmix: float | None = None
    """Alpha of CutMix, which mixes images; default off."""
    max_bad_share: float = 0.01
    """Share of unreadable images, 0..1, above which the run stops."""
    max_row_group_gib: float | None = None
    """GiB that a row group of a parquet file may take in memory, in each loader worker; default 2."""

    @property
    def is_scenes(self) -> bool:
        """Whether the training images are the built-in scenes."""
        return self.data.partition(":")[0] == "scenes"


def row_group_bytes(gib: float | None) -> int | None:
    """``max_row_group_gib`` in bytes.

    Raises:
        UserError: It is not above 0.
    """
    if gib is not None and not 0 < gib < 2**20:
        raise UserError(f"--max-row-group-gib must be above 0, not {gib}")
    return None if gib is None else int(gib * 2**30)


def written_decode(config: DataConfig, crop: TrainCrop | None) -> Decode | None:
    """The default of ``decode`` that a config records.

    It is recorded for random resized crops of files, which older runs decoded in full, so that no run resumes with
    another decode mode.
    """
    return "scaled" if crop == "rrc" and not config.is_scenes else None
