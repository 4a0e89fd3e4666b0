"""What the student may be asked for: one objective per file."""

from __future__ import annotations

from typing import Literal

from localign.alignment.objectives.additive import Additive
from localign.alignment.objectives.averaging import Averaging
from localign.alignment.objectives.base import DecoderName, Objective
from localign.alignment.objectives.clipself import CLIPSelf
from localign.alignment.objectives.maskembed import MaskEmbed
from localign.alignment.objectives.mim import MaskedImageModelling

ObjectiveName = Literal["maskembed", "averaging", "additive", "clipself", "mim"]
OBJECTIVES: dict[str, type[Objective]] = {
    "maskembed": MaskEmbed,
    "averaging": Averaging,
    "additive": Additive,
    "clipself": CLIPSelf,
    "mim": MaskedImageModelling,
}

__all__ = [
    "OBJECTIVES", "Additive", "Averaging", "CLIPSelf", "DecoderName", "MaskEmbed", "MaskedImageModelling",
    "Objective", "ObjectiveName",
]  # fmt: skip
