"""Options of the benchmarks."""

# Annotations stay types here: the command line is made from this module's config classes.

import math
from dataclasses import dataclass
from typing import Literal

from localign.errors import UserError
from localign.options.bench import MeasurementConfig


@dataclass(frozen=True, kw_only=True)
class LabelsConfig(MeasurementConfig):
    """Measure the reduction of label maps against loops over patches."""

    what = "labels"

    data: str | None = None
    """A folder of label maps (PNG); default drawn label maps."""
    images: int | None = None
    """Label maps that are drawn; default 64."""
    image_size: int | None = None
    """Side of the maps, pixels; default 384."""
    patch_size: int | None = None
    """Side of a patch, pixels; default 14."""
    repeats: int | None = None
    """Measurements of each way, the fastest of which counts; default 5, and 1 for the loops."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        self.check_positive("images", "image_size", "patch_size", "repeats")
        if self.data is not None and self.images is not None:
            raise UserError(
                "--images is how many label maps are drawn; with --data all of the folder are taken"
            )


@dataclass(frozen=True, kw_only=True)
class ProbingConfig(MeasurementConfig):
    """Measure all probing heads in one pass against one run for each head."""

    what = "probe"

    backbone: str | None = None
    """Name or export folder; default scenes-vit."""
    weights: str | None = None
    """Weights of a name: pretrained (default), none, or a weight file."""
    images: int | None = None
    """Scenes that heads are trained on; default 600. A quarter as many judge them."""
    epochs: float | None = None
    """Passes over the training scenes; default 5."""
    repeats: int | None = None
    """Measurements of each way, the fastest of which counts; default 1."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        self.check_positive("images", "epochs", "repeats")


@dataclass(frozen=True, kw_only=True)
class AnswersConfig(MeasurementConfig):
    """Measure reading VQAv2's files and scoring answers against the plain way."""

    what = "answers"

    questions: int | None = None
    """Questions; default as many as VQAv2 has, 214354."""
    repeats: int | None = None
    """Measurements of each way, the fastest of which counts; default 1."""

    def __post_init__(self) -> None:
        self.check_positive("questions", "repeats")


@dataclass(frozen=True, kw_only=True)
class ScalingConfig(MeasurementConfig):
    """Measure alignment steps with more ranks, more images and more tokens."""

    what = "scaling"

    backbone: str | None = None
    """A timm name; default vit_tiny_patch16_224. The weights are random."""
    image_size: int | None = None
    """Side of the images, pixels; default 224. One case doubles it."""
    batch_size: int | None = None
    """Images per step, a multiple of 4; default 8. Further cases take two and four times as many."""
    steps: int | None = None
    """Measured steps, whose median counts; default 8."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        self.check_positive("image_size", "batch_size", "steps")
        if self.batch_size is not None and self.batch_size % 4:
            raise UserError(f"--batch-size is a multiple of 4, for 4 ranks, not {self.batch_size}")


@dataclass(frozen=True, kw_only=True)
class VLMBenchConfig(MeasurementConfig):
    """Measure training steps of a vision-language model on packed batches against padded batches."""

    what = "vlm"

    llm: str | None = None
    """tiny (default, 3.7 million parameters), 1b or 7b for Llama's shapes, or a folder with another config.json.
    The weights are random."""
    image_tokens: int | None = None
    """Tokens per image, a square number; default 576, for small language models 64. Below 576, texts are shorter than
    in LLaVA's mixture by the same factor."""
    stage: Literal["align", "finetune", "lora"] | None = None
    """The part that is trained, as in vlm train; default finetune."""
    batch_size: int | None = None
    """Conversations per optimizer step; default 16."""
    micro_batch: int | None = None
    """Conversations per forward pass; default all of a step."""
    steps: int | None = None
    """Optimizer steps of a pass, a multiple of 16, since one step in 16 has conversations without images; default
    16."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    repeats: int | None = None
    """Passes of each way; the median of every step counts. Default 3."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        self.check_positive("image_tokens", "batch_size", "micro_batch", "steps", "repeats")
        if self.image_tokens is not None and math.isqrt(self.image_tokens) ** 2 != self.image_tokens:
            raise UserError(f"--image-tokens is a square number, such as 64 or 576, not {self.image_tokens}")
        if self.steps is not None and self.steps % 16:
            raise UserError(f"--steps is a multiple of 16, not {self.steps}")
