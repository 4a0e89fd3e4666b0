"""Options of `localign plan`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from localign.errors import UserError
from localign.gpus import gpu
from localign.options.align import AlignConfig

IMAGES: dict[str, int] = {"imagenet-1k": 1_281_167, "imagenet-21k": 12_600_000}
"""Training images of the data that recipes name; ImageNet-21k is the processed one, rounded."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig(AlignConfig):
    """What an alignment will take: parameters, arithmetic, memory, decoding and hours; nothing is run or fetched."""

    GROUPS: ClassVar[Mapping[str, str]] = {
        "Plan": "gpus gpu dataset_size mfu decode_rate out",
        **AlignConfig.GROUPS,
        "Run": AlignConfig.GROUPS["Run"].removeprefix("out "),
    }

    dataset_size: int | None = None
    """Training images; default the number that is known of imagenet-1k and imagenet-21k."""
    gpus: int = 8
    """GPUs, over all nodes; each is a rank."""
    gpu: str = "H100"
    """Their name: A100, A100-40GB, H100, H100-PCIe, H100-NVL, H200, B200, L40S, A10 or RTX-4090."""
    mfu: float = 0.4
    """Share of the GPU's peak that training reaches; 0.4 is usual, and `localign bench align` measures it."""
    decode_rate: float = 400.0
    """Training crops that a CPU core decodes per second; `localign bench loader` measures it. On one core of a server
    it is about 100 from photographs of 3 megapixels, and 850 where the short side is 256 pixels."""
    out: str = ""
    """JSON file to write the plan to, given on the command line: in a config file, out is the folder of the run that
    is planned."""

    def __post_init__(self) -> None:
        super().__post_init__()
        gpu(self.gpu)
        for name in ("dataset_size", "gpus", "decode_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value}")
        if not 0 < self.mfu <= 1:
            raise UserError(f"--mfu is a share of the GPU's peak, above 0 and at most 1, not {self.mfu}")

    @property
    def images(self) -> int:
        """Training images.

        Raises:
            UserError: It is not known how many the data holds.
        """
        found = self.dataset_size or IMAGES.get(self.data)
        if found is None:
            raise UserError(f"how many images does {self.data} hold? give --dataset-size")
        return found
