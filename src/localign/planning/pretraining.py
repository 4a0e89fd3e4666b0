"""Compute of the pre-training of published backbones, to compare that of an alignment with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from localign.backbones import CATALOGUE, create_backbone

_TRAINING = 3
"""Operations of forward and backward pass, in forward passes."""
_IN1K, _IN21K = 1_281_167, 14_197_122
"""Images of ImageNet-1k and of all of ImageNet-21k."""


@dataclass(frozen=True)
class Pretraining:
    """What a backbone was trained on before."""

    source: str
    """Where the figures come from."""
    stages: tuple[tuple[float, int], ...]
    """For each stage the images seen, repetitions included, and the side of the input in pixels."""
    views: float = 1.0
    """Tokens that the trained tower runs on per image, in whole images: crops count more, hidden patches less."""


_CLIP = "Radford et al. 2021: 400 M pairs, 32 epochs"
_SIGLIP = "Zhai et al. 2023: 40 B pairs at 224 px"
_AUGREG = Pretraining("Steiner et al. 2021: ImageNet-21k, 300 epochs", ((300 * _IN21K, 224),))
PRETRAINING: dict[str, Pretraining] = {
    **{f"in1k-vit-{size}": _AUGREG for size in "tsbl"},
    "moco-vit-b": Pretraining("Chen et al. 2021: ImageNet-1k, 300 epochs, 2 crops", ((300 * _IN1K, 224),), 2),
    "clip-vit-b": Pretraining(_CLIP, ((12.8e9, 224),)),
    "clip-vit-l": Pretraining(_CLIP, ((12.8e9, 224),)),
    "clip-vit-l-336px": Pretraining(f"{_CLIP}, and one at 336 px", ((12.8e9, 224), (0.4e9, 336))),
    "siglip-vit-b": Pretraining(_SIGLIP, ((40e9, 224),)),
    "siglip-vit-so400m": Pretraining(_SIGLIP, ((40e9, 224),)),
    "siglip-vit-so400m-384px": Pretraining(f"{_SIGLIP}, without those at 384 px", ((40e9, 224),)),
    "openclip-vit-b": Pretraining("OpenCLIP's model card: 34 B pairs of LAION-2B", ((34e9, 224),)),
    "dfn-vit-b": Pretraining("Fang et al. 2023: 12.8 B pairs of DFN-2B", ((12.8e9, 224),)),
    "eva02-vit-b": Pretraining("Sun et al. 2023: 8 B pairs of Merged-2B", ((8e9, 224),)),
    "mae-vit-b": Pretraining(
        "He et al. 2022: ImageNet-1k, 1600 epochs, 25 % of the patches", ((1600 * _IN1K, 224),), 0.25
    ),
    "beit-vit-b": Pretraining(
        "Bao et al. 2022: ImageNet-21k, 150 epochs, then 90 with labels", ((240 * _IN21K, 224),)
    ),
    "beitv2-vit-b": Pretraining(
        "Peng et al. 2022: ImageNet-1k, 1600 epochs, then ImageNet-21k, 90 with labels",
        ((1600 * _IN1K + 90 * _IN21K, 224),),
    ),
    "dino-vit-b": Pretraining(
        "Caron et al. 2021: ImageNet-1k, 400 epochs, 2 crops of 224 px and 10 of 96 px",
        ((400 * _IN1K, 224),),
        2 + 10 * (96 / 224) ** 2,
    ),
    "dinov2-vit-b": Pretraining(
        "Oquab et al. 2023: 625,000 steps of 2,048 images, 2 crops of 224 px and 8 of 98 px",
        ((625_000 * 2048, 224),),
        2 + 8 * (98 / 224) ** 2,
    ),
}
"""By name of the catalogue. Counted is the trained image tower: no text tower, teacher, decoder or tokenizer."""


def pretraining_of(backbone: str) -> Pretraining | None:
    """The pre-training of a backbone by its name in the catalogue or timm's name; None if it is unknown."""
    names = {entry.timm_name: name for name, entry in CATALOGUE.items() if entry.loader == "timm"}
    return PRETRAINING.get(names.get(backbone, backbone))


def pretraining_flops(backbone: str) -> float | None:
    """Operations of a backbone's pre-training, forward and backward; None if it is unknown."""
    known = pretraining_of(backbone)
    if known is None:
        return None
    return sum(
        _TRAINING * images * known.views * _forward_flops(backbone, side) for images, side in known.stages
    )


def _forward_flops(name: str, side: int) -> float:
    """Operations of a forward pass on one image, with weights that hold no data."""
    with torch.device("meta"):
        backbone = create_backbone(name, weights="none", image_size=side)
    mode = FakeTensorMode()
    with mode, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        backbone._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))  # type: ignore[no-untyped-call]
        with FlopCounterMode(display=False) as counter:
            backbone.tokens(torch.empty(1, 3, side, side))
    return float(counter.get_total_flops())
