"""Options of `localign plan` for a VLM recipe."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from localign.errors import UserError
from localign.gpus import gpu
from localign.options.vlm.train import VLMConfig


@dataclass(frozen=True, kw_only=True)
class VLMPlanConfig(VLMConfig):
    """Plan the training of a vision-language model: parameters, image tokens, memory and steps. No weights are read."""

    GROUPS: ClassVar[Mapping[str, str]] = {
        "Plan": "gpus gpu out",
        **VLMConfig.GROUPS,
        "Run": VLMConfig.GROUPS["Run"].removeprefix("out "),
    }

    gpus: int = 8
    """GPUs over all nodes, one rank each."""
    gpu: str = "H100"
    """GPU: A100, A100-40GB, H100, H100-PCIe, H100-NVL, H200, B200, L40S, A10 or RTX-4090."""
    out: str = ""
    """JSON file for the plan, given on the command line. In a config file, out is the folder of the planned run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        gpu(self.gpu)
        if self.gpus < 1:
            raise UserError(f"--gpus must be above 0, not {self.gpus}")
