"""Options of `localign vlm train`.

Defaults are the paper's values (appendix D) where it gives one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from localign.errors import UserError
from localign.options.names import (
    BACKENDS,
    AdapterName,
    AttentionBackend,
    CrossEntropy,
    ImageSize,
    PromptName,
)
from localign.options.train import TrainConfig

Stage = Literal["align", "finetune", "full-finetune", "lora"]
Features = Literal["auto", "baseline", "aligned"]
Resize = Literal["naive", "letterbox", "crop"]
Batching = Literal["packed", "padded"]
Sampler = Literal["shuffled", "grouped"]
Turns = Literal["conversation", "independent"]

WARMUP_RATIO = 0.03


@dataclass(frozen=True, kw_only=True)
class VLMConfig(TrainConfig):
    """Train a vision-language model: a ViT, an adapter and a causal language model."""

    GROUPS: ClassVar[Mapping[str, str]] = {
        "Model": "llm backbone adapter init features resize weights image_size max_patches model_kwargs attention "
        "llm_weights llm_attention",
        "Data": "data images val val_records prompt max_length turns batching sampler skip_missing "
        "skip_malformed allow_outside max_bad_share",
        "Objective": "stage lora_rank lora_alpha cross_entropy published_quirks",
        **TrainConfig.GROUPS,
        "Optimisation": f"{TrainConfig.GROUPS['Optimisation']} adapter_lr",
        "Run": f"{TrainConfig.GROUPS['Run']} dry_run plan_ranks",
    }

    out: str = "runs/vlm"
    """Run folder: config, log, results, checkpoints, export (a transformers folder)."""
    data: tuple[str, ...] = ()
    """LLaVA-format JSON or JSON-lines files of conversations."""
    images: tuple[str, ...] = ()
    """Folders that image paths in the data are relative to, or PREFIX=FOLDER; default each data file's own folder."""
    val: tuple[str, ...] = ()
    """Validation conversations in the same format; default none."""
    val_records: int | None = 2048
    """Maximum number of conversations per validation; null for all."""
    skip_missing: bool = False
    """Drop records whose image is missing instead of refusing to start."""
    skip_malformed: bool = False
    """Drop records that cannot be read as a conversation instead of refusing to start; they are counted and named."""
    allow_outside: bool = False
    """Accept image paths, absolute or with .., that lead out of the image folders."""
    backbone: tuple[str, ...] = ("scenes-vit",)
    """One backbone, or several whose tokens are concatenated on channels: run or export folders, names from
    `localign list backbones`, timm names, or folders or Hub repositories of transformers or timm."""
    weights: str = "pretrained"
    """Weights of a backbone given by name: pretrained, none (random), or a weight file."""
    image_size: ImageSize | None = None
    """Side of the input in pixels, or HEIGHTxWIDTH; default the backbone's own. Positions are resampled."""
    max_patches: int | None = None
    """Native resolution: each image keeps its aspect ratio, is resized to at most this many patches, and has one token
    per patch; default one size for all, or with --init that model's own."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """Extra arguments for timm's constructor, for a backbone given by name; for example depth=2."""
    features: Features = "auto"
    """ViT features: baseline (second-to-last block, no final norm), aligned (last block and final norm), or auto
    (aligned for an export of `localign align`, otherwise baseline)."""
    attention: AttentionBackend = "auto"
    """Implementation of soft-capped attention, for ViTs that have it: eager, flex, or auto (flex on CUDA)."""
    adapter: AdapterName = "mlp"
    """Module between ViT and language model: linear, mlp, fused-mlp (several backbones), transformer (from scratch),
    decoder (the alignment's decoder), fused-decoder (the alignment's decoder, beside other backbones), truncated (the
    ViT's last two blocks)."""
    llm: str = ""
    """Causal language model: a name on the Hugging Face Hub or a folder in transformers' format."""
    llm_weights: Literal["pretrained", "none"] = "pretrained"
    """Weights of the language model: pretrained, or none (random)."""
    llm_attention: str = "sdpa"
    """Attention implementation of the language model, by its transformers name: sdpa (on CUDA, packed rows use torch's
    varlen kernel), eager, flash_attention_2, ..."""
    init: str | None = None
    """Exported model of an earlier stage to start from; it brings its own backbone, adapter and language model."""
    stage: Stage = "finetune"
    """Trained parts. align: the adapter. finetune: adapter and language model. full-finetune: the ViT too. lora: the
    adapter, and low-rank updates of the language model (needs the extra localign[lora])."""
    lora_rank: int = 64
    """Rank of the low-rank updates; --stage lora only."""
    lora_alpha: int = 16
    """Scale of the low-rank updates, divided by the rank; --stage lora only."""
    prompt: PromptName = "in-out"
    """Prompt format: in-out (the paper's, for base models), vicuna, or chat-template (the tokenizer's own)."""
    resize: Resize = "naive"
    """How an image is made square: naive (the paper's; stretches), letterbox (pads) or crop."""
    max_length: int = 2048
    """Maximum number of tokens per conversation, image tokens included; longer conversations are truncated."""
    batching: Batching = "packed"
    """packed: the conversations of a micro-batch share one row, and each attends only to itself. padded: one row per
    conversation."""
    turns: Turns = "conversation"
    """conversation: each turn attends to earlier turns. independent: each turn attends only to the image and itself,
    for questions whose answers would reveal one another; the image is encoded once."""
    cross_entropy: CrossEntropy = "chunked"
    """How the loss avoids holding all logits at once. chunked: with torch, which recomputes logits in the backward
    pass. liger: with liger-kernel, on CUDA only (needs the extra localign[liger])."""
    sampler: Sampler = "shuffled"
    """shuffled, or grouped: the published sampler, whose batches hold one modality and similar lengths."""
    max_bad_share: float = 0.01
    """Stop when more than this share of the records is unreadable, 0..1."""
    dry_run: bool = False
    """Print parameters, memory per rank and steps without loading weights, then stop."""
    plan_ranks: int = 1
    """Processes to plan for; --dry-run only."""
    published_quirks: bool = False
    """Reproduce the published code where it differs from the paper: a truncated baseline loses a block and its norm;
    a decoder's blocks, and a CLIP tower beside another backbone, use exact GELU; --max-length counts text only."""

    batch_size: int = 128
    """Conversations per optimizer step, over all ranks and micro-batches."""
    lr: float | None = 2e-5
    """Peak learning rate."""
    adapter_lr: float | None = None
    """Peak learning rate of the adapter, on the same schedule; default --lr. For decoder, fused-decoder and truncated
    it applies to the pretrained layers; the new output layer keeps --lr."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end of the cosine, as a share of the peak."""
    warmup_ratio: float | None = None
    """Warm-up as a share of all steps (rounded down); default 0.03 if no other warm-up is given."""
    warmup_init_ratio: float = 0.0
    """Learning rate of the first step, as a share of the peak."""
    weight_decay: float = 0.1
    """AdamW weight decay, on matrices only: not on norms, biases, position embeddings or tokens."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW moment decay rates."""

    def __post_init__(self) -> None:
        if not self.warmup_steps and self.warmup_epochs is None and self.warmup_ratio is None:
            object.__setattr__(self, "warmup_ratio", WARMUP_RATIO)
        super().__post_init__()
        if not self.data:
            raise UserError("train needs --data, a LLaVA-format JSON file")
        if not self.llm and self.init is None:
            raise UserError("train needs --llm, a Hub name or a folder in transformers' format")
        if self.attention not in BACKENDS:
            raise UserError(f"--attention takes {', '.join(BACKENDS)}, not {self.attention!r}")
        if self.adapter_lr is not None and (self.lr is None or not self.adapter_lr > 0):
            raise UserError(f"--adapter-lr must be above 0 and needs --lr; not {self.adapter_lr}, {self.lr}")
        if self.max_length < 8:
            raise UserError(f"--max-length must be at least 8, not {self.max_length}")
        if self.max_patches is not None and self.max_patches < 4:
            raise UserError(f"--max-patches must be at least 4, not {self.max_patches}")
        if self.max_patches is not None and self.resize != "naive":
            raise UserError(
                f"--resize {self.resize} does not apply to images of several sizes; leave out --max-patches or it"
            )
        if self.lora_rank < 1 or self.lora_alpha < 1:
            raise UserError("--lora-rank and --lora-alpha must be at least 1")
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(f"--max-bad-share is a share in 0..1, not {self.max_bad_share}")
        several = len(self.backbone) > 1
        if several and self.adapter not in ("linear", "mlp", "fused-mlp", "fused-decoder"):
            raise UserError(
                f"--adapter {self.adapter} takes one backbone, not {len(self.backbone)}; try fused-mlp"
            )
        if not several and self.adapter in ("fused-mlp", "fused-decoder"):
            raise UserError(f"--adapter {self.adapter} takes several backbones, not one")
        if self.plan_ranks < 1:
            raise UserError(f"--plan-ranks must be at least 1, not {self.plan_ranks}")
        if not self.backbone:
            raise UserError("--backbone needs at least one backbone")
        if self.init is not None and self.llm_attention != "sdpa":
            raise UserError("--llm-attention needs --llm; the language model of --init keeps its own")
        if self.init is not None and self.llm:
            raise UserError("--init brings its own language model; leave --llm out")
