"""Options of the images that training commands see, and how they see them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from localign.options.names import Decode, TrainCrop


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Options of the training images."""

    GROUPS: ClassVar[Mapping[str, str]] = {
        "Data": "data val val_images crop hflip auto_augment mixup cutmix decode exclude max_bad_share"
    }

    data: str = "scenes"
    """Training images: a folder (with or without class folders); a list of files (.txt, .csv, .jsonl); tar shards or
    parquet files: one, a folder of them, or a pattern such as shards/{000..099}.tar; a mixture of these (.yaml); or
    scenes."""
    exclude: str | None = None
    """List of training images to leave out, as `localign data verify` writes it."""
    val: str | None = None
    """Validation images, likewise; default none (for scenes: scenes:val)."""
    val_images: int | None = 2048
    """Images per validation, at most; null for all."""
    crop: TrainCrop | None = None
    """published, rrc (random resized crop) or none; default published (for scenes: none)."""
    decode: Decode | None = None
    """scaled: decode large JPEGs at the fraction of their size that the crop needs; full: all in full, as validation
    does. Default scaled (scenes are not decoded)."""
    hflip: float | None = None
    """Probability of a horizontal flip; default 0.5 (for scenes: 0)."""
    auto_augment: str | None = None
    """RandAugment string, for example rand-m9-mstd0.5-inc1."""
    mixup: float | None = None
    """Mixup's alpha (images only)."""
    cutmix: float | None = None
    """CutMix's alpha (images only)."""
    max_bad_share: float = 0.01
    """Share of unreadable images at which the run stops."""

    @property
    def is_scenes(self) -> bool:
        """Whether the training images are the embedded world."""
        return self.data.partition(":")[0] == "scenes"


def written_decode(config: DataConfig, crop: TrainCrop | None) -> Decode | None:
    """What a config says of decoding where nothing is given.

    It is written down for random resized crops of files, which older runs decoded in full: none is continued
    otherwise.
    """
    return "scaled" if crop == "rrc" and not config.is_scenes else None
