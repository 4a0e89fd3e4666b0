"""Names that options accept. The rooms that implement them have tables keyed by these names."""

from typing import Literal, get_args

EMBEDDED = "scenes-vit"
"""The backbone whose weights ship with the package."""

AttentionBackend = Literal["auto", "eager", "flex"]
BACKENDS: tuple[str, ...] = get_args(AttentionBackend)

ObjectiveName = Literal["maskembed", "averaging", "additive", "clipself", "mim"]
TargetName = Literal["penultimate", "last", "cls", "pooled"]
LossName = Literal["mse", "cosine", "l1"]
TokenSelection = Literal["all", "hidden", "visible"]
DecoderName = Literal["transformer", "none"]
MaskKind = Literal["uniform", "bernoulli", "block", "shapley"]

TrainCrop = Literal["published", "rrc", "none"]
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

ExportFormat = Literal["timm", "clip", "siglip", "siglip2", "dinov2", "dinov3", "vit"]

REPRODUCTIONS = ("table1", "table4", "table5", "fig3", "fig4", "fig6", "fig7", "fig8", "fig9", "fig10")
"""Tables and figures of the paper."""
