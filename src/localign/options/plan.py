"""Options of `localign plan`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from localign.errors import UserError
from localign.gpus import gpu
from localign.options.align import AlignConfig

IMAGES: dict[str, int] = {"imagenet-1k": 1_281_167, "imagenet-21k": 12_600_000}
"""Number of training images by the data set's name in recipes; ImageNet-21k is the processed release, rounded."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig(AlignConfig):
    """Plan an alignment: parameters, compute, memory, image decoding and hours. Nothing is trained or downloaded."""

    GROUPS: ClassVar[Mapping[str, str]] = {
        "Plan": "gpus gpu dataset_size mfu decode_rate out",
        **AlignConfig.GROUPS,
        "Run": AlignConfig.GROUPS["Run"].removeprefix("out "),
    }

    dataset_size: int | None = None
    """Number of training images. Default: known for imagenet-1k and imagenet-21k, required for other data."""
    gpus: int = 8
    """GPUs over all nodes, one rank each."""
    gpu: str = "H100"
    """GPU: A100, A100-40GB, H100, H100-PCIe, H100-NVL, H200, B200, L40S, A10 or RTX-4090."""
    mfu: float = 0.4
    """Share of the GPU's peak FLOP/s that training reaches, 0..1. 0.4 is usual; `localign bench align` measures it."""
    decode_rate: float = 400.0
    """Training crops that one CPU core decodes per second; `localign bench loader` measures it. A server core decodes
    about 100 per second from 3-megapixel photographs, and 850 from images with a short side of 256 pixels."""
    out: str = ""
    """JSON file for the plan, given on the command line. In a config file, out is the folder of the planned run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_patches is not None:
            raise UserError(
                "plans count images of one size; instead of --max-patches give an --image-size of as many patches"
            )
        gpu(self.gpu)
        for name in ("dataset_size", "gpus", "decode_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value}")
        if not 0 < self.mfu <= 1:
            raise UserError(f"--mfu is a share of the GPU's peak, above 0 and at most 1, not {self.mfu}")

    @property
    def images(self) -> int:
        """Number of training images.

        Raises:
            UserError: The number is unknown.
        """
        found = self.dataset_size or IMAGES.get(self.data.removesuffix("/train"))
        if found is None:
            raise UserError(f"the number of images in {self.data} is unknown; give --dataset-size")
        return found
