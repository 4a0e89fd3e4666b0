"""Options of `localign vlm train`.

Defaults are those of the paper's runs (appendix D), where it names them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from localign.errors import UserError
from localign.options.names import BACKENDS, AdapterName, AttentionBackend, CrossEntropy, PromptName
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
        "Model": "llm backbone adapter init features resize weights image_size model_kwargs attention llm_weights "
        "llm_attention",
        "Data": "data images val val_records prompt max_length turns batching sampler skip_missing max_bad_share",
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
    """Folders that image paths in the data are relative to; default each file's own folder."""
    val: tuple[str, ...] = ()
    """Validation conversations, likewise; default none."""
    val_records: int | None = 2048
    """Conversations per validation, at most; null for all."""
    skip_missing: bool = False
    """Leave out records whose image is missing, rather than refuse to start."""
    backbone: tuple[str, ...] = ("scenes-vit",)
    """One backbone, or several to be fused on channels: run or export folders, names of
    `localign list backbones`, any timm names, hf-hub:... or local-dir:..."""
    weights: str = "pretrained"
    """Of backbone names: pretrained, none (random), or a weight file."""
    image_size: int | None = None
    """Of backbone names: side of the square input, pixels; default the backbone's own."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """Of backbone names: further arguments of timm's constructor, for example depth=2."""
    features: Features = "auto"
    """What the ViT gives: baseline (the second-to-last block, no final norm), aligned (the last block and the final
    norm), or auto (aligned for what `localign align` wrote, baseline else)."""
    attention: AttentionBackend = "auto"
    """Back-end of the ViT's soft-capped attention, where it has it: eager, flex, or auto (flex on CUDA)."""
    adapter: AdapterName = "mlp"
    """Between ViT and language model: linear, mlp, fused-mlp (several backbones), transformer (from scratch), decoder
    (the alignment's own), fused-decoder (the alignment's own beside other backbones), truncated (the ViT's last two
    blocks)."""
    llm: str = ""
    """Causal language model: a name on the Hugging Face Hub or a folder in transformers' format."""
    llm_weights: Literal["pretrained", "none"] = "pretrained"
    """none: the architecture alone, with random weights."""
    llm_attention: str = "sdpa"
    """Attention of the language model, by transformers' names: sdpa (on CUDA packed rows go through torch's varlen
    kernel), eager, flash_attention_2, ..."""
    init: str | None = None
    """Start from this exported model's adapter and language model (an earlier stage); backbone, adapter and llm are
    then the model's own."""
    stage: Stage = "finetune"
    """What is trained. align: the adapter. finetune: adapter and language model. full-finetune: the ViT too. lora: the
    adapter, and low-rank updates of the language model (needs the extra localign[lora])."""
    lora_rank: int = 64
    """Of lora: rank of the updates."""
    lora_alpha: int = 16
    """Of lora: scale of the updates, divided by the rank."""
    prompt: PromptName = "in-out"
    """Words around questions and answers: in-out (of the paper, for base models), vicuna, or chat-template (the
    tokenizer's own)."""
    resize: Resize = "naive"
    """How an image becomes a square: naive (of the paper; stretched), letterbox (padded) or crop."""
    max_length: int = 2048
    """Tokens of a conversation, image tokens included; what is beyond is cut off."""
    batching: Batching = "packed"
    """packed: conversations of a micro-batch in one row, with attention of each to itself alone. padded: a row each."""
    turns: Turns = "conversation"
    """conversation: each turn sees those before it. independent: each sees the image alone, as if it were a record of
    its own whose image costs nothing; for questions asked one by one, whose answers would give one another away."""
    cross_entropy: CrossEntropy = "chunked"
    """How the loss is computed from a part of the logits at a time. chunked: by torch, which makes them anew in the
    backward pass. liger: by liger-kernel, on CUDA alone (needs the extra localign[liger])."""
    sampler: Sampler = "shuffled"
    """shuffled, or grouped: the published batches of one modality and like lengths."""
    max_bad_share: float = 0.01
    """Share of unreadable records at which the run stops."""
    dry_run: bool = False
    """Print parameters, memory per rank and steps, without weights, and stop."""
    plan_ranks: int = 1
    """Of a dry run: processes to plan for."""
    published_quirks: bool = False
    """Follow the published code where it departs from the paper, for comparisons. A truncated baseline loses a block
    and its norm; a decoder's blocks, and a CLIP tower beside another one, have exact GELU; the limit of a
    conversation's tokens counts text alone."""

    batch_size: int = 128
    """Conversations per optimizer step, over all ranks and micro-batches."""
    lr: float | None = 2e-5
    """Peak learning rate."""
    adapter_lr: float | None = None
    """Peak learning rate of the adapter, on the same schedule; default that of all else. Of decoder, fused-decoder and
    truncated it is the rate of what comes from trained weights; their output layer is new and keeps --lr."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end of the cosine, as a share of the peak."""
    warmup_ratio: float | None = None
    """The warm-up as a share of all steps (rounded down); default 0.03 where no other warm-up is given."""
    warmup_init_ratio: float = 0.0
    """Learning rate of the first step, as a share of the peak."""
    weight_decay: float = 0.1
    """AdamW's, on matrices only: not on norms, biases, position embeddings or tokens."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decay rates."""

    def __post_init__(self) -> None:
        if not self.warmup_steps and self.warmup_epochs is None and self.warmup_ratio is None:
            object.__setattr__(self, "warmup_ratio", WARMUP_RATIO)
        super().__post_init__()
        if not self.data:
            raise UserError("train on what? give --data, a LLaVA-format JSON file")
        if not self.llm and self.init is None:
            raise UserError(
                "which language model? give --llm, a Hub name or a folder in transformers' format"
            )
        if self.attention not in BACKENDS:
            raise UserError(f"--attention takes {', '.join(BACKENDS)}, not {self.attention!r}")
        if self.adapter_lr is not None and (self.lr is None or not self.adapter_lr > 0):
            raise UserError(
                f"--adapter-lr must be above 0 and goes with --lr; not {self.adapter_lr}, {self.lr}"
            )
        if self.max_length < 8:
            raise UserError(f"--max-length must leave room for an image and words, not {self.max_length}")
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
            raise UserError("--backbone names none")
        if self.init is not None and self.llm_attention != "sdpa":
            raise UserError("--llm-attention goes with --llm; the model of --init has its own")
        if self.init is not None and self.llm:
            raise UserError("--init has its own language model; leave --llm out")
