"""Names and largest numbers that options accept. The rooms that implement names have tables keyed by them."""

from __future__ import annotations

import math
import re
from typing import Any, Literal, get_args

from localign.errors import UserError

EMBEDDED = "scenes-vit"
"""The backbone whose weights ship with the package."""

AttentionBackend = Literal["auto", "eager", "flex"]
BACKENDS: tuple[str, ...] = get_args(AttentionBackend)

ObjectiveName = Literal["maskembed", "maskembed+", "averaging", "additive", "clipself", "mim"]
TargetName = Literal["penultimate", "last", "cls", "pooled"]
LossName = Literal["mse", "cosine", "l1"]
Readout = Literal["sum", "mean"]
TokenSelection = Literal["all", "hidden", "visible"]
DecoderName = Literal["transformer", "none"]
MaskKind = Literal["uniform", "bernoulli", "block", "shapley"]

TrainCrop = Literal["published", "rkrc", "rrc", "none"]
Decode = Literal["scaled", "full"]

Precision = Literal["auto", "fp32", "bf16"]
Resume = Literal["never", "must", "auto"]
ShardingMode = Literal["none", "full", "hybrid"]

Cache = Literal["auto", "none", "disk", "device"]
Protocol = Literal["fixed", "published"]
HEAD_NAMES = ("linear", "mlp", "transformer")
TASKS = ("local", "global", "majority")
INTERVENTIONS = ("none", "cls-only", "anonymous")

AdapterName = Literal["linear", "mlp", "fused-mlp", "transformer", "decoder", "truncated", "fused-decoder"]
CrossEntropy = Literal["chunked", "liger"]
PromptName = Literal["in-out", "vicuna", "chat-template"]
QuestionKind = Literal[
    "referring", "position", "count", "relation", "presence", "attribute", "choice", "caption"
]

ImageSize = int | tuple[int, int]
"""Side of a square input, or height and width, in pixels; the command line spells the latter 224x336."""

ExportFormat = Literal["timm", "clip", "siglip", "siglip2", "dinov2", "dinov3", "vit", "onnx", "torch-export"]

VLM_FIGURES = ("fig5", "fig11", "fig12", "fig13")
"""Figures of the paper that compare vision-language models."""
REPRODUCTIONS = (
    "table1", "table4", "table5", "fig3", "fig4", "fig6", "fig7", "fig8", "fig9", "fig10", *VLM_FIGURES,
)  # fmt: skip
"""Tables and figures of the paper."""

_MOST = {
    2**10: "profile layer depth decoder_depth train_blocks reinit_blocks seeds",
    2**12: "workers",
    2
    ** 16: "ignore image_size max_patches scale_images resize width decoder_width num_heads patch_size lora_rank "
    "block_min_patches image_tokens gpus plan_ranks port",
    2**20: "batch_size micro_batch probe_batch max_new_tokens questions",
    2**24: "epochs warmup_epochs max_length keep_checkpoints repeats at_once",
    2**28: "scenes train_scenes val_scenes test_scenes val_images val_records images limit",
    2
    ** 36: "steps max_steps warmup_steps llm_steps probe_steps checkpoint_every val_every log_every shard_images "
    "min_images dataset_size timeout",
}
LIMITS = {name: most for most, names in _MOST.items() for name in names.split()}
"""Field of a config class -> the largest value. Real runs stay far below."""


def check_limit(name: str, value: Any) -> None:
    """Check a number that a user gave.

    Args:
        name: The field of the config class.
        value: Its value, of any type.

    Raises:
        UserError: The number is not a number, or larger than any use of the option.
    """
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, tuple | list):
        for item in value:
            check_limit(name, item)
    elif isinstance(value, float) and math.isnan(value):
        raise UserError(f"{option} takes a number, not nan")
    elif isinstance(value, int | float) and name in LIMITS and value > LIMITS[name]:
        raise UserError(f"{option} takes at most {LIMITS[name]:,}, not {float(min(value, 2**1000)):g}")


def check_repository(name: str | None, private: bool) -> None:
    """Check the repository of ``--push-to``.

    Raises:
        UserError: It is not ``ORGANISATION/NAME``, or ``--private`` is given without it.
    """
    if private and name is None:
        raise UserError("--private needs --push-to ORGANISATION/NAME")
    if name is not None and (len(name) > 96 or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII)):
        raise UserError(f"--push-to takes ORGANISATION/NAME, not {name!r}")
