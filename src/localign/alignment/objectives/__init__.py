"""Training objectives of alignment, one per file, and their table."""

from __future__ import annotations

from collections.abc import Mapping

from localign.alignment.objectives.additive import Additive
from localign.alignment.objectives.averaging import Averaging
from localign.alignment.objectives.base import Objective, ObjectiveOptions, PlusWeights
from localign.alignment.objectives.clipself import CLIPSelf
from localign.alignment.objectives.maskembed import MaskEmbed
from localign.alignment.objectives.mim import MaskedImageModelling
from localign.alignment.objectives.plus import MaskEmbedPlus
from localign.options.names import ObjectiveName

OBJECTIVES: Mapping[ObjectiveName, type[Objective]] = {
    "maskembed": MaskEmbed,
    "maskembed+": MaskEmbedPlus,
    "averaging": Averaging,
    "additive": Additive,
    "clipself": CLIPSelf,
    "mim": MaskedImageModelling,
}

__all__ = [
    "OBJECTIVES", "Additive", "Averaging", "CLIPSelf", "MaskEmbed", "MaskEmbedPlus", "MaskedImageModelling",
    "Objective", "ObjectiveOptions", "PlusWeights",
]  # fmt: skip
