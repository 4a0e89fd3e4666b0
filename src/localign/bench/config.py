"""Options of `localign bench`."""

# Annotations stay types here: the command line is made from this module's config class.

import math
from dataclasses import dataclass
from typing import Literal

from localign.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Measure a part of localign against the plain way of doing it, in one run."""

    what: Literal["labels", "probe", "vlm", "answers", "loader", "scaling", "align"] = "labels"
    """labels: reducing label maps against a loop over patches. probe: all heads in one pass against a run for
    each. vlm: training steps on packed batches against padded ones. answers: reading VQAv2's files and scoring.
    loader: training crops from a folder, tar shards and parquet against torchvision's. scaling: alignment steps with
    more ranks, images, tokens. align: alignment steps against the same mathematics written out plainly."""
    out: str | None = None
    """JSON file of the measurements; default runs/bench-WHAT.json."""
    seed: int = 0
    """Of drawn label maps, conversations, answers or photographs, or of heads."""
    images: int | None = None
    """labels: label maps, default 64. probe: scenes to train heads on, default 600; a quarter as many to judge
    them on. loader: photographs to draw, default 64, or to take of --data at even distances, default 256."""
    data: str | None = None
    """labels: a folder of label maps (PNG) instead of drawn ones. loader, align: a folder of photographs instead."""
    image_size: int | None = None
    """labels: side of the maps, default 384 pixels. loader: side of the crops, default 224 pixels. scaling: side of the
    images, default 224 pixels, and twice that. align: side of the images, default the backbone's own."""
    workers: int | None = None
    """loader, align: processes that load, default 0, which loads in this one; align on CUDA: 8."""
    patch_size: int | None = None
    """labels: side of a patch, default 14 pixels."""
    backbone: str | None = None
    """probe: name or export folder, default scenes-vit. scaling, align: a timm name, default
    vit_tiny_patch16_224; align takes names of the catalogue, too. Their weights are random."""
    weights: str | None = None
    """probe: of a name: pretrained (default), none, or a weight file."""
    epochs: float | None = None
    """probe: passes over the training scenes, default 5."""
    llm: str | None = None
    """vlm: tiny (default, 3.7 million parameters), 1b or 7b for Llama's shapes, or a folder whose config.json
    has others; weights are random."""
    image_tokens: int | None = None
    """vlm: tokens of an image, a square number; default 576, for small language models 64. Texts are as many
    times shorter than in LLaVA's mix as this is below 576."""
    batch_size: int | None = None
    """vlm: conversations per optimizer step, default 16. loader: crops per batch, default 32. scaling: images per step,
    default 8, and twice and four times as many. align: images per step, default 32; on CUDA also as many as fit."""
    micro_batch: int | None = None
    """vlm: conversations per forward pass, default all of a step."""
    steps: int | None = None
    """vlm: optimizer steps of a pass, a multiple of 16 (the text-only conversations fill one in 16), default 16.
    scaling, align: steps whose median counts, default 8."""
    precision: Literal["fp32", "bf16"] | None = None
    """align: float32 or bfloat16 autocast; default fp32, on CUDA bf16."""
    compile: bool = False
    """align: also measure steps compiled with torch.compile."""
    stage: Literal["align", "finetune", "lora"] | None = None
    """vlm: what is trained, as in vlm train; default finetune."""
    grad_checkpointing: bool = False
    """vlm: recompute activations in the backward pass."""
    questions: int | None = None
    """answers: questions, default as many as VQAv2's 214354."""
    repeats: int | None = None
    """How often each way is measured. labels: default 5 (its loops once), probe: default 1, the best counting;
    vlm: default 3, of whose steps the medians count. answers: default 1, the best counting. loader: default 3,
    the medians counting."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        own = {
            "labels": ("images", "data", "image_size", "patch_size"),
            "probe": ("images", "backbone", "weights", "epochs"),
            "vlm": (
                "llm",
                "image_tokens",
                "batch_size",
                "micro_batch",
                "steps",
                "stage",
                "grad_checkpointing",
            ),
            "answers": ("questions",),
            "loader": ("images", "data", "image_size", "workers", "batch_size"),
            "scaling": ("backbone", "image_size", "batch_size", "steps"),
            "align": (
                "backbone",
                "data",
                "image_size",
                "workers",
                "batch_size",
                "steps",
                "precision",
                "compile",
            ),
        }
        for name in {name for names in own.values() for name in names}.difference(own[self.what]):
            if getattr(self, name) not in (None, False):
                raise UserError(f"--{name.replace('_', '-')} has no effect on bench {self.what}")
        if self.what in ("answers", "loader") and self.device not in ("auto", "cpu"):
            raise UserError(f"--device has no effect on bench {self.what}")
        if self.workers is not None and self.workers < 0:
            raise UserError(f"there cannot be {self.workers} loader workers")
        positive = ("images", "image_size", "patch_size", "epochs", "repeats", "image_tokens", "batch_size",
                    "micro_batch", "steps", "questions")  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value}")
        if self.what == "labels" and self.data is not None and self.images is not None:
            raise UserError(
                "--images is how many label maps are drawn; with --data all of the folder are taken"
            )
        if self.image_tokens is not None and math.isqrt(self.image_tokens) ** 2 != self.image_tokens:
            raise UserError(f"--image-tokens is a square number, such as 64 or 576, not {self.image_tokens}")
        if self.what in ("scaling", "align") and self.repeats is not None:
            raise UserError(f"--repeats has no effect on bench {self.what}, where --steps count")
        if self.what == "scaling" and self.batch_size is not None and self.batch_size % 4:
            raise UserError(f"--batch-size is a multiple of 4, for 4 ranks, not {self.batch_size}")
        if self.what == "vlm" and self.steps is not None and self.steps % 16:
            raise UserError(f"--steps is a multiple of 16, not {self.steps}")

    @property
    def file(self) -> str:
        """Where measurements are written."""
        return self.out or f"runs/bench-{self.what}.json"
