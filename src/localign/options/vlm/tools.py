"""Options of `localign vlm chat`, `check`, `convert` and `export`."""

from dataclasses import dataclass
from typing import Literal

from localign.errors import UserError
from localign.options.names import PromptName

Conversion = Literal["lvis", "lrv", "strip-text-only", "ocr-vqa"]


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Go through conversations before a run: what is malformed, missing, too long."""

    data: tuple[str, ...] = ()
    """LLaVA-format JSON or JSON-lines files."""
    images: tuple[str, ...] = ()
    """Folders that image paths in the data are relative to; default each file's own folder."""
    llm: str | None = None
    """Also count tokens, with this language model's tokenizer."""
    image_tokens: int = 576
    """Tokens an image takes, where tokens are counted."""
    max_length: int = 2048
    """The limit, tokens, image included."""
    prompt: PromptName = "in-out"
    """Words around questions and answers: in-out, vicuna, or chat-template."""
    missing_list: str | None = None
    """Write the missing images to this file, one a line."""

    def __post_init__(self) -> None:
        if not self.data:
            raise UserError("check what? give LLaVA-format JSON files")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Make the published mixtures of conversations from the files of their parts."""

    what: Conversion | None = None
    """lvis (LLaVA-1.5 with LVIS-Instruct-4V), lrv (with LRV-Instruct), strip-text-only (records with images alone), or
    ocr-vqa (save that data set's GIF and PNG images as JPEG too)."""
    base: str | None = None
    """The LLaVA-format file that is added to or stripped."""
    add: str | None = None
    """Of lvis: its file. Of lrv: the folder of its three files. Of ocr-vqa: the folder of images."""
    before: str | None = None
    """Of lrv, where base holds LVIS-Instruct-4V already: LLaVA-1.5 by itself. The published order depends on it."""
    images: tuple[str, ...] = ()
    """Folders of images; those of what is added must be there."""
    out: str | None = None
    """File to write."""

    def __post_init__(self) -> None:
        if self.what is None:
            raise UserError("convert what? give lvis, lrv, strip-text-only or ocr-vqa")
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
    """A run folder of `localign vlm train`, or what it exported."""
    out: str = "export"
    """Folder to write."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of the stored weights."""

    def __post_init__(self) -> None:
        if not self.model:
            raise UserError("export what? give a run folder of `localign vlm train`")


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Ask a model about an image; the conversation is remembered until it is ended by an empty line."""

    model: str = ""
    """A run folder of `localign vlm train`, or what it exported."""
    image: str = ""
    """An image file."""
    question: str | None = None
    """Ask this alone and stop; default questions are read line by line."""
    boxes: str = "original:0-1"
    """What coordinates in answers mean, as LAYOUT:0-SCALE: original:0-1 (shares of the image), original:0-1000, ..."""
    max_new_tokens: int = 512
    """Longest answer, tokens."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on CUDA, float32 elsewhere."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        if not self.model or not self.image:
            raise UserError("chat takes a model and an image: localign vlm chat MODEL IMAGE")
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens must be above 0, not {self.max_new_tokens}")
