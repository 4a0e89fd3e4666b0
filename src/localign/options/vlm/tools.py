"""Options of `localign vlm chat`, `check`, `convert`, `export` and `swap`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from localign.errors import UserError
from localign.options.names import AdapterName, AttentionBackend, PromptName, check_repository

Dtype = Literal["float32", "bfloat16", "float16"]
Conversion = Literal["lvis", "lrv", "strip-text-only", "ocr-vqa"]


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Check conversations before a run: malformed records, missing images, conversations over the limit."""

    data: tuple[str, ...] = ()
    """LLaVA-format JSON or JSON-lines files."""
    images: tuple[str, ...] = ()
    """Folders that image paths in the data are relative to, or PREFIX=FOLDER; default each data file's own folder."""
    llm: str | None = None
    """Language model whose tokenizer counts tokens; default: tokens are not counted."""
    image_tokens: int = 576
    """Tokens per image; --llm only."""
    max_length: int = 2048
    """Maximum number of tokens per conversation, image tokens included; --llm only."""
    prompt: PromptName = "in-out"
    """Prompt format: in-out, vicuna, or chat-template."""
    allow_outside: bool = False
    """Accept image paths, absolute or with .., that lead out of the image folders."""
    missing_list: str | None = None
    """Write the paths of missing images to this file, one per line."""

    def __post_init__(self) -> None:
        if not self.data:
            raise UserError("check needs LLaVA-format JSON files")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Build the published mixtures of conversations from the files of their parts."""

    what: Conversion | None = None
    """lvis (LLaVA-1.5 with LVIS-Instruct-4V), lrv (with LRV-Instruct), strip-text-only (drop records without an
    image), or ocr-vqa (save that data set's GIF and PNG images as JPEG too)."""
    base: str | None = None
    """LLaVA-format file to add records to, or to strip."""
    add: str | None = None
    """lvis: the LVIS-Instruct-4V file. lrv: the folder with LRV-Instruct's three files. ocr-vqa: the image folder."""
    before: str | None = None
    """lrv only, if base already contains LVIS-Instruct-4V: the LLaVA-1.5 file, on which the published order depends."""
    images: tuple[str, ...] = ()
    """Image folders; they must hold every image of the added records."""
    out: str | None = None
    """File to write."""

    def __post_init__(self) -> None:
        if self.what is None:
            raise UserError("convert needs one of lvis, lrv, strip-text-only and ocr-vqa")
        needs = {
            "lvis": ("base", "add", "images", "out"),
            "lrv": ("base", "add", "images", "out"),
            "strip-text-only": ("base", "out"),
            "ocr-vqa": ("add",),
        }[self.what]
        takes = (*needs, "before") if self.what == "lrv" else needs
        for name in ("base", "add", "before", "images", "out"):
            given = bool(getattr(self, name))
            if name in needs and not given:
                raise UserError(f"convert {self.what} needs --{name}")
            if given and name not in takes:
                raise UserError(f"--{name} has no effect with convert {self.what}")


@dataclass(frozen=True, kw_only=True)
class VLMExportConfig:
    """Write a trained vision-language model as a transformers folder."""

    model: str = ""
    """Run folder of `localign vlm train`, or its export."""
    out: str = "export"
    """Folder to write."""
    format: Literal["localign", "llava"] = "localign"
    """localign: any model; transformers and vLLM load it with trust_remote_code=True. llava: transformers' own LLaVA
    class, for one CLIP, SigLIP, DINOv2 or ViT tower without final norm and soft-cap, and an mlp adapter; the logits of
    both are compared."""
    dtype: Dtype = "bfloat16"
    """Data type of the stored weights."""
    push_to: str | None = None
    """Upload the export to this repository of the Hugging Face Hub, ORGANISATION/NAME; it is created if it does not
    exist. Needs a token: `hf auth login`, or HF_TOKEN."""
    private: bool = False
    """Keep the repository of --push-to private."""

    def __post_init__(self) -> None:
        if not self.model:
            raise UserError("export needs a run folder of `localign vlm train`")
        check_repository(self.push_to, self.private)


@dataclass(frozen=True, kw_only=True)
class SwapConfig:
    """Put another vision tower and adapter into a LLaVA model, whose language model and tokenizer stay."""

    llava: str = ""
    """LLaVA-1.5 or LLaVA-NeXT: a folder in transformers' format or a name on the Hub."""
    backbone: tuple[str, ...] = ()
    """The new tower: a run or export folder, a name from `localign list backbones`, a timm name, or a folder or Hub
    repository of transformers or timm."""
    adapter: AdapterName | Literal["keep"] = "decoder"
    """Module between ViT and language model: decoder (the alignment's decoder), linear, mlp, transformer or truncated,
    which `vlm train --stage align` trains next; or keep (the LLaVA model's projector, on the block that it reads)."""
    out: str = "swapped"
    """Folder to write."""
    dtype: Dtype = "float32"
    """Data type of the stored weights."""
    prompt: PromptName = "vicuna"
    """Prompt format: vicuna (LLaVA-1.5's), in-out, or chat-template (the tokenizer's own)."""
    resize: Literal["auto", "naive", "letterbox", "crop"] = "auto"
    """How an image is made square: naive (stretches), letterbox (pads), crop, or auto (as the LLaVA model's own
    processor)."""
    features: Literal["auto", "baseline", "aligned"] = "auto"
    """ViT features: baseline (second-to-last block, no final norm), aligned (last block and final norm), or auto
    (aligned for an export of `localign align`, otherwise baseline)."""
    weights: str = "pretrained"
    """Weights of a backbone given by name: pretrained, none (random), or a weight file."""
    image_size: int | None = None
    """Side of the square input in pixels, for a backbone given by name; default the backbone's own."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """Extra arguments for timm's constructor, for a backbone given by name; for example depth=2."""
    attention: AttentionBackend = "auto"
    """Implementation of soft-capped attention, for ViTs that have it: eager, flex, or auto (flex on CUDA)."""
    seed: int = 0
    """Seed of the random weights of a new adapter."""
    published_quirks: bool = False
    """Reproduce the published code where it differs from the paper: a truncated baseline loses a block and its norm;
    a decoder's blocks use exact GELU."""

    def __post_init__(self) -> None:
        if not self.llava or len(self.backbone) != 1:
            raise UserError(
                "swap needs a LLaVA model and one backbone: localign vlm swap LLAVA --backbone RUN"
            )
        if self.adapter in ("fused-mlp", "fused-decoder"):
            raise UserError(f"swap takes one backbone; --adapter {self.adapter} takes several")


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Chat with a model about an image. The model sees the conversation so far; an empty line ends the chat."""

    model: str = ""
    """Run folder of `localign vlm train`, or its export."""
    image: str = ""
    """Image file."""
    question: str | None = None
    """Ask only this question, then stop; by default questions are read line by line."""
    boxes: str = "original:0-1"
    """Meaning of coordinates in answers, as LAYOUT:0-SCALE: original:0-1 (shares of the image), original:0-1000, ..."""
    max_new_tokens: int = 512
    """Maximum number of tokens per answer."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision; auto is bfloat16 on CUDA and float32 elsewhere."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        if not self.model or not self.image:
            raise UserError("chat needs a model and an image: localign vlm chat MODEL IMAGE")
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens must be at least 1, not {self.max_new_tokens}")
