"""Options of `localign embed`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from localign.errors import UserError
from localign.options.data import row_group_bytes
from localign.options.names import ImageSize

FeatureDtype = Literal["float16", "float32"]


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Write the features of images to a parquet file, one row per image.

    Needs the extra localign[parquet]. docs/formats.md lists the columns.
    """

    images: str = ""
    """Images: any value of --data of a training command, scenes and mixtures included."""
    backbone: str = ""
    """Backbone: a run or export folder, a model folder or repository, or a name."""
    out: str = "features.parquet"
    """Parquet file to write. A file that this command wrote is replaced."""
    patches: bool = False
    """Also write the patch tokens."""
    dtype: FeatureDtype = "float16"
    """Data type of stored patch tokens; the pooled features are always float32."""
    image_size: ImageSize | None = None
    """Side of the input in pixels, or HEIGHTxWIDTH; default the backbone's own."""
    weights: str = "pretrained"
    """Weights of a backbone given by name: pretrained, none (random), or a weight file."""
    model_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Extra arguments for timm's constructor, for example depth=2."""
    field: str | None = None
    """Fields of tar samples, or columns of parquet files, that hold the image: the first that is there, as in
    jpg,png."""
    exclude: str | None = None
    """List of images to leave out, as written by `localign data verify`."""
    allow_outside: bool = False
    """Accept lists of files whose paths, absolute or with .., lead out of the list's folder."""
    max_row_group_gib: float | None = None
    """GiB that a row group of a parquet file may take in memory when it is read, in each worker; default 2."""
    batch_size: int = 32
    """Images per forward pass."""
    workers: int = 0
    """Loader processes; 0 loads in the main process."""
    device: str = "auto"
    """cuda, cuda:N, mps, cpu, or auto."""

    def __post_init__(self) -> None:
        if not self.images or not self.backbone:
            raise UserError("embed needs images and --backbone NAME")
        if self.batch_size < 1:
            raise UserError(f"--batch-size must be above 0, not {self.batch_size}")
        if self.workers < 0:
            raise UserError(f"--workers must not be negative, not {self.workers}")
        if self.dtype == "float32" and not self.patches:
            raise UserError("--dtype has no effect without --patches: pooled features are always float32")
        row_group_bytes(self.max_row_group_gib)
