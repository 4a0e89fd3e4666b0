"""Options of `localign bench align` and `localign bench loader`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from localign.errors import UserError


@dataclass(frozen=True, kw_only=True)
class MeasurementConfig:
    """Options of every measurement."""

    what: ClassVar[str]
    """Name of the measurement, for its file."""

    out: str | None = None
    """JSON file of the measurements; default runs/bench-NAME.json."""
    seed: int = 0
    """Seed of everything that is drawn."""

    @property
    def file(self) -> str:
        """Where the measurements are written."""
        return self.out or f"runs/bench-{self.what}.json"

    def check_positive(self, *names: str) -> None:
        """Raises UserError where one of the options is given and not above 0."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value}")

    def check_workers(self, workers: int | None) -> None:
        """Raises UserError for a negative number of loader workers."""
        if workers is not None and workers < 0:
            raise UserError(f"there cannot be {workers} loader workers")


@dataclass(frozen=True, kw_only=True)
class AlignBenchConfig(MeasurementConfig):
    """Measure alignment steps against the same mathematics written out plainly, in one run."""

    what = "align"

    backbone: str | None = None
    """A name of the catalogue or of timm; default vit_tiny_patch16_224. The weights are random."""
    image_size: int | None = None
    """Side of the images, pixels; default the backbone's own."""
    data: str | None = None
    """A folder of photographs; default drawn photographs."""
    batch_size: int | None = None
    """Images per step; default 32. On CUDA each way is also measured at the largest batch that fits."""
    steps: int | None = None
    """Measured steps, whose median counts; default 8."""
    precision: Literal["fp32", "bf16"] | None = None
    """fp32 or bf16 autocast; default bf16 on CUDA, fp32 elsewhere."""
    compile: bool = False
    """Also measure steps compiled with torch.compile."""
    workers: int | None = None
    """Image loading processes; 0 loads in the main process. Default 8 on CUDA, 0 elsewhere."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        self.check_workers(self.workers)
        self.check_positive("image_size", "batch_size", "steps")


@dataclass(frozen=True, kw_only=True)
class LoaderBenchConfig(MeasurementConfig):
    """Measure loading of training crops from a folder, tar shards and parquet against torchvision's loader."""

    what = "loader"

    data: str | None = None
    """A folder of photographs; default drawn photographs."""
    images: int | None = None
    """Photographs: 64 drawn ones by default, or 256 of --data, taken at even distances."""
    image_size: int | None = None
    """Side of the crops, pixels; default 224."""
    batch_size: int | None = None
    """Crops per batch; default 32."""
    workers: int | None = None
    """Image loading processes; default 0, which loads in the main process."""
    repeats: int | None = None
    """Passes of each way, whose median counts; default 3."""

    def __post_init__(self) -> None:
        self.check_workers(self.workers)
        self.check_positive("images", "image_size", "batch_size", "repeats")
