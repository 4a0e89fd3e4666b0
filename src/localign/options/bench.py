"""Options of `localign bench align` and `localign bench loader`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from localign.errors import UserError


@dataclass(frozen=True, kw_only=True)
class MeasurementConfig:
    """Options of every measurement."""

    benchmark: ClassVar[str]
    """Name of the benchmark, for its file."""

    out: str | None = None
    """JSON file of the results; default runs/bench-NAME.json."""
    seed: int = 0
    """Seed of all random draws."""

    @property
    def file(self) -> str:
        """Path of the JSON file."""
        return self.out or f"runs/bench-{self.benchmark}.json"

    def check_positive(self, *names: str) -> None:
        """Raises UserError if one of the options is given and not above 0."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value}")

    def check_workers(self, workers: int | None) -> None:
        """Raises UserError for a negative number of loader workers."""
        if workers is not None and workers < 0:
            raise UserError(f"--workers must not be negative, not {workers}")


@dataclass(frozen=True, kw_only=True)
class AlignBenchConfig(MeasurementConfig):
    """Measure alignment steps against a plain PyTorch implementation of the same method, in one run."""

    benchmark = "align"

    backbone: str | None = None
    """Catalogue or timm name of the backbone, which gets random weights; default vit_tiny_patch16_224."""
    image_size: int | None = None
    """Side of the images, pixels; default the backbone's size."""
    data: str | None = None
    """A folder of photographs; default synthetic photographs."""
    batch_size: int | None = None
    """Images per step; default 32."""
    largest_batch: bool = False
    """On CUDA, also measure each implementation at its own largest batch, which is found by running out of memory: 5 to
    10 minutes."""
    steps: int | None = None
    """Number of measured steps; the median is reported. Default 8."""
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
    """Measure loading of training crops from a folder, tar shards and parquet files against plain torchvision."""

    benchmark = "loader"

    data: str | None = None
    """A folder of photographs; default synthetic photographs."""
    images: int | None = None
    """Number of photographs; default 64 synthetic photographs, or 256 evenly spaced photographs of --data."""
    image_size: int | None = None
    """Side of the crops, pixels; default 224."""
    batch_size: int | None = None
    """Crops per batch; default 32."""
    workers: int | None = None
    """Image loading processes; default 0, which loads in the main process."""
    repeats: int | None = None
    """Passes of each loader; the median is reported. Default 3."""

    def __post_init__(self) -> None:
        self.check_workers(self.workers)
        self.check_positive("images", "image_size", "batch_size", "repeats")
