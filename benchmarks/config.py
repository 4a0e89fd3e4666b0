"""Options of the benchmarks."""

# No `from __future__ import annotations`: the command line is built from the types of these config classes.

import math
from dataclasses import dataclass
from typing import Literal

from localign.errors import UserError
from localign.options.bench import MeasurementConfig


@dataclass(frozen=True, kw_only=True)
class LabelsConfig(MeasurementConfig):
    """Measure the reduction of label maps against loops over patches."""

    benchmark = "labels"

    data: str | None = None
    """A folder of label maps (PNG); default synthetic label maps."""
    images: int | None = None
    """Number of synthetic label maps; default 64."""
    image_size: int | None = None
    """Side of the maps, pixels; default 384."""
    patch_size: int | None = None
    """Side of a patch, pixels; default 14."""
    repeats: int | None = None
    """Measurements of each implementation; the fastest is reported. Default 5, and 1 for the loops."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        self.check_positive("images", "image_size", "patch_size", "repeats")
        if self.data is not None and self.images is not None:
            raise UserError(
                "--images is the number of synthetic label maps; with --data all maps of the folder are used"
            )


@dataclass(frozen=True, kw_only=True)
class ProbingConfig(MeasurementConfig):
    """Measure training of all probing heads in one pass against one run per head."""

    benchmark = "probe"

    backbone: str | None = None
    """Name or export folder of the backbone; default scenes-vit."""
    weights: str | None = None
    """Weights of a named backbone: pretrained (default), none, or a weight file."""
    images: int | None = None
    """Training scenes; default 600. A quarter as many scenes are used for testing."""
    epochs: float | None = None
    """Passes over the training scenes; default 5."""
    repeats: int | None = None
    """Measurements of each implementation; the fastest is reported. Default 1."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        self.check_positive("images", "epochs", "repeats")


@dataclass(frozen=True, kw_only=True)
class AnswersConfig(MeasurementConfig):
    """Measure reading VQAv2's files and scoring answers against a plain script."""

    benchmark = "answers"

    questions: int | None = None
    """Number of questions; default 214354, as in VQAv2."""
    repeats: int | None = None
    """Measurements of each implementation; the fastest is reported. Default 1."""

    def __post_init__(self) -> None:
        self.check_positive("questions", "repeats")


@dataclass(frozen=True, kw_only=True)
class ScalingConfig(MeasurementConfig):
    """Measure alignment steps with more ranks, more images and more tokens."""

    benchmark = "scaling"

    backbone: str | None = None
    """timm name of the backbone, which gets random weights; default vit_tiny_patch16_224."""
    image_size: int | None = None
    """Side of the images, pixels; default 224. One case doubles it."""
    batch_size: int | None = None
    """Images per step, a multiple of 4; default 8. Further cases double and quadruple it."""
    steps: int | None = None
    """Number of measured steps; the median is reported. Default 8."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        self.check_positive("image_size", "batch_size", "steps")
        if self.batch_size is not None and self.batch_size % 4:
            raise UserError(f"--batch-size must be a multiple of 4, for 4 ranks, not {self.batch_size}")


@dataclass(frozen=True, kw_only=True)
class VLMBenchConfig(MeasurementConfig):
    """Measure training steps of a vision-language model on packed batches against padded batches."""

    benchmark = "vlm"

    llm: str | None = None
    """Language model with random weights: tiny (default, 3.7 million parameters), 1b or 7b (Llama shapes), or a folder
    with a config.json."""
    image_tokens: int | None = None
    """Tokens per image, a square number; default 576, or 64 for small language models. Texts are scaled by the same
    factor, relative to LLaVA's mixture with 576."""
    stage: Literal["align", "finetune", "lora"] | None = None
    """Training stage, as in `localign vlm train`; default finetune."""
    batch_size: int | None = None
    """Conversations per optimizer step; default 16."""
    micro_batch: int | None = None
    """Conversations per forward pass; default --batch-size."""
    steps: int | None = None
    """Optimizer steps per pass, a multiple of 16, because one conversation in 16 has no image; default 16."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    compile: bool = False
    """Compile the language model's layers with torch.compile, for all ways."""
    repeats: int | None = None
    """Passes of each implementation; the median of every step is reported. Default 3."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        self.check_positive("image_tokens", "batch_size", "micro_batch", "steps", "repeats")
        if self.image_tokens is not None and math.isqrt(self.image_tokens) ** 2 != self.image_tokens:
            raise UserError(
                f"--image-tokens must be a square number, such as 64 or 576, not {self.image_tokens}"
            )
        if self.steps is not None and self.steps % 16:
            raise UserError(f"--steps must be a multiple of 16, not {self.steps}")


@dataclass(frozen=True, kw_only=True)
class ObjectivesConfig(MeasurementConfig):
    """Align with several objectives on drawn scenes, and compare what heads read from the features.

    The runs lie in a folder beside the JSON file, with its name; finished ones are not repeated.
    """

    benchmark = "objectives"

    objectives: tuple[str, ...] = ("maskembed", "plus")
    """Names of the table in benchmarks/objectives.py."""
    seeds: int = 1
    """Number of seeds, each for alignment and heads."""
    steps: int = 400
    """Alignment steps."""
    batch_size: int = 64
    """Scenes per alignment step."""
    split: Literal["val", "test"] = "val"
    """Scenes to report on. Choose on val; test is for the final table."""
    train_scenes: int = 3000
    """Scenes to train heads on."""
    test_scenes: int = 2000
    """Scenes to report on."""
    probe_steps: int = 1000
    """Steps of the heads' training."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""

    def __post_init__(self) -> None:
        self.check_positive("seeds", "steps", "batch_size", "train_scenes", "test_scenes", "probe_steps")
