"""The numbers and rows of the paper's probing tables.

Recall is macro recall in percent on COCO-Stuff (183 classes) with the transformer head, as printed in the paper. Row
keys are ``<table>/<slug>``, the name of the row's recipe. Tables 1 and 4 have a number only where table 5 has it too
(the teachers, and the method with its published settings); their other numbers are None.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Recall(NamedTuple):
    """Local and global macro recall, percent."""

    local: float
    global_: float


@dataclass(frozen=True)
class PublishedPair:
    """One row of table 5: a backbone before and after alignment."""

    label: str
    supervision: str
    """Supervision of the pre-training: image-level or dense."""
    baseline: Recall
    aligned: Recall
    difference: Recall
    """As printed; its last digit may differ from the difference of the printed numbers."""


@dataclass(frozen=True)
class PaperRow:
    """One row of tables 1 and 4."""

    label: str
    block: str
    recall: Recall | None = None
    remark: str = ""
    """The paper's words on the row, where its numbers are not available."""
    teacher: str = "teacher"
    """Slug of the row to which differences are taken."""
    optional: bool = False
    """Whether the row is not in the paper; it is left out where it was not run."""


_IMAGE, _DENSE = "image-level", "dense"


def _pair(label: str, supervision: str, *numbers: float) -> PublishedPair:
    baseline, aligned, difference = (Recall(*numbers[i : i + 2]) for i in (0, 2, 4))
    return PublishedPair(label, supervision, baseline, aligned, difference)


TABLE5: dict[str, PublishedPair] = {
    "in1k-vit-t": _pair("IN1k ViT-T", _IMAGE, 30.13, 41.26, 30.28, 40.89, 0.15, -0.36),
    "in1k-vit-s": _pair("IN1k ViT-S", _IMAGE, 37.35, 46.37, 41.46, 46.20, 4.10, -0.17),
    "in1k-vit-b": _pair("IN1k ViT-B", _IMAGE, 43.50, 51.04, 45.96, 51.84, 2.46, 0.80),
    "in1k-vit-l": _pair("IN1k ViT-L", _IMAGE, 46.00, 52.97, 48.03, 53.30, 2.03, 0.33),
    "moco-vit-b": _pair("MoCo ViT-B", _IMAGE, 37.50, 44.60, 40.38, 45.29, 2.88, 0.69),
    "clip-vit-b": _pair("CLIP ViT-B", _IMAGE, 44.63, 52.61, 46.32, 54.55, 1.68, 1.94),
    "clip-vit-l": _pair("CLIP ViT-L", _IMAGE, 46.40, 54.51, 51.38, 57.54, 4.99, 3.03),
    "clip-vit-l-336px": _pair("CLIP ViT-L @ 336px", _IMAGE, 46.05, 55.13, 52.71, 57.75, 6.66, 2.62),
    "siglip-vit-b": _pair("SigLIP ViT-B", _IMAGE, 44.48, 54.53, 46.54, 54.39, 2.06, -0.14),
    "siglip-vit-so400m": _pair("SigLIP SO400M", _IMAGE, 48.15, 58.25, 51.54, 58.98, 3.38, 0.73),
    "siglip-vit-so400m-384px": _pair("SigLIP SO400M @ 384px", _IMAGE, 50.25, 60.53, 53.00, 60.62, 2.75, 0.09),
    "openclip-vit-b": _pair("OpenCLIP ViT-B", _IMAGE, 44.25, 52.20, 45.17, 52.62, 0.92, 0.42),
    "eva02-vit-b": _pair("EVA02 ViT-B", _IMAGE, 44.91, 52.93, 49.21, 51.47, 4.30, -1.46),
    "dfn-vit-b": _pair("DFN ViT-B", _IMAGE, 44.36, 52.36, 45.67, 53.72, 1.31, 1.36),
    "mae-vit-b": _pair("MAE ViT-B", _DENSE, 39.46, 43.53, 37.80, 42.33, -1.66, -1.20),
    "beit-vit-b": _pair("BEiT ViT-B", _DENSE, 41.01, 49.56, 43.13, 49.90, 2.13, 0.35),
    "beitv2-vit-b": _pair("BEiTv2 ViT-B", _DENSE, 42.98, 49.44, 46.60, 53.58, 3.62, 4.14),
    "dino-vit-b": _pair("DINO ViT-B", _DENSE, 40.84, 46.35, 40.18, 46.32, -0.67, -0.03),
    "dinov2-vit-b": _pair("DINOv2 ViT-B", _DENSE, 50.18, 56.95, 50.79, 55.64, 0.61, -1.31),
}
"""By the catalogue's name of the backbone, in the order of the paper."""

_CLIP, _IN1K = TABLE5["clip-vit-b"], TABLE5["in1k-vit-b"]
_BELOW = "below the teacher"

TABLE1: dict[str, PaperRow] = {
    "teacher": PaperRow("teacher, not aligned", "", _CLIP.baseline),
    "clipself": PaperRow("CLIPSelf (one crop, averaged features)", "crops", remark=_BELOW),
    "clipself-decoder": PaperRow("CLIPSelf with a transformer decoder", "crops", optional=True),
    "additive": PaperRow("additive (sum of patch vectors)", "masks", optional=True),
    "averaging-1": PaperRow("MaskEmbed, averaged features, 1 mask", "masks", remark=_BELOW),
    "averaging-3": PaperRow("MaskEmbed, averaged features, 3 masks", "masks", optional=True),
    "maskembed-1": PaperRow("MaskEmbed, 1 mask", "masks"),
    "maskembed-3": PaperRow("MaskEmbed, 3 masks (default)", "masks", _CLIP.aligned),
}
"""CLIPSelf comparison, CLIP ViT-B/16 (section 4.3)."""


def _epochs(prefix: str, block: str, teacher: str, in21k_5: Recall) -> dict[str, PaperRow]:
    """The rows on training data and duration of one backbone; IN21k for 5 epochs is the setting of table 5."""
    runs = [("IN1k", n) for n in (2, 10, 25, 50, 100)] + [("IN21k", n) for n in (1, 5, 10)]
    return {
        f"{prefix}{data.lower()}-{n}": PaperRow(
            f"{data}, {n} epoch{'s' * (n > 1)}",
            block,
            in21k_5 if (data, n) == ("IN21k", 5) else None,
            teacher=teacher,
        )
        for data, n in runs
    }


_TARGET, _AUGMENT, _MASKS = "reconstruction target", "augmentation", "mask sampling"

TABLE4: dict[str, PaperRow] = {
    "teacher": PaperRow("teacher, not aligned", "IN1k ViT-B", _IN1K.baseline),
    "target-cls": PaperRow("pooled output", _TARGET),
    "target-last": PaperRow("tokens of the last layer", _TARGET),
    "target-penultimate": PaperRow("tokens of the second-to-last layer (default)", _TARGET),
    "augment-crop": PaperRow("random crop (default)", _AUGMENT),
    "augment-mixup": PaperRow("with Mixup", _AUGMENT),
    "augment-cutmix": PaperRow("with CutMix", _AUGMENT),
    "augment-autoaugment": PaperRow("with AutoAugment", _AUGMENT),
    "masks-block": PaperRow("block", _MASKS),
    "masks-bernoulli-25": PaperRow("Bernoulli, 25 % visible", _MASKS),
    "masks-bernoulli-50": PaperRow("Bernoulli, 50 % visible", _MASKS),
    "masks-bernoulli-75": PaperRow("Bernoulli, 75 % visible", _MASKS),
    "masks-uniform": PaperRow("uniform", _MASKS),
    "masks-uniform-complement": PaperRow("uniform, complement", _MASKS),
    "masks-uniform-complement-visible": PaperRow("uniform, complement, all-visible (default)", _MASKS),
    "loss-cosine": PaperRow("cosine loss", "loss", optional=True),
    **_epochs("", "data: IN1k ViT-B", "teacher", _IN1K.aligned),
    "clip-teacher": PaperRow("teacher, not aligned", "CLIP ViT-B", _CLIP.baseline, teacher="clip-teacher"),
    **_epochs("clip-", "data: CLIP ViT-B", "clip-teacher", _CLIP.aligned),
}
"""Ablations (appendix B.1); IN1k for 25 epochs unless the row names other data."""
