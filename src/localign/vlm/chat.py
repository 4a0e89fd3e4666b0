"""`localign vlm chat`: ask a model about an image, in the terminal."""

# Annotations stay types here: the command line is made from this module's config class.

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageDraw

from localign.data.sources import UnreadableImage, read_image
from localign.engine.distributed import choose_device
from localign.errors import UserError
from localign.files import replacing
from localign.vlm.model.build import load_vlm
from localign.vlm.model.modeling import LocalignVLM
from localign.vlm.model.processing import LocalignVLMProcessor
from localign.vlm.scoring.boxes import Box, BoxFrame, Size, parse_box

_LINE = (255, 40, 40)


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
        BoxFrame.parse(self.boxes)


class Chat:
    """A conversation about one image.

    Args:
        model: In eval mode, on its device.
        processor: The model's.
        image: What it is about, RGB.
        max_new_tokens: Longest answer.
    """

    def __init__(
        self,
        model: LocalignVLM,
        processor: LocalignVLMProcessor,
        image: Image.Image,
        max_new_tokens: int = 512,
    ) -> None:
        self.model: Any = model  # transformers types generate() for its own models alone
        self.processor, self.image = processor, image
        self.max_new_tokens = max_new_tokens
        self.messages: list[dict[str, object]] = []

    @torch.inference_mode()
    def ask(self, question: str) -> str:
        """The greedy answer to one more question."""
        content: list[dict[str, object]] = [{"type": "text", "text": question}]
        if not self.messages:
            content.insert(0, {"type": "image", "image": self.image})
        self.messages.append({"role": "user", "content": content})
        batch = self.processor.apply_chat_template(self.messages, tokenize=True, return_dict=True)
        batch = batch.to(self.model.device)
        ids = self.model.generate(**batch, max_new_tokens=self.max_new_tokens, do_sample=False)
        new = ids[0, batch["input_ids"].shape[1] :]
        answer = self.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
        self.messages.append({"role": "assistant", "content": answer})
        return answer


def run_chat(config: ChatConfig) -> None:
    """Answer questions until there are no more; where an answer names a box, draw it onto a copy of the image."""
    path = Path(config.image)
    try:
        image = read_image(config.image, config.image)
    except UnreadableImage as error:
        raise UserError(f"cannot read the image: {error}") from None
    device = choose_device(config.device)
    low = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    model, tokenizer = load_vlm(config.model)
    model.to(device=device, dtype=torch.bfloat16 if low else torch.float32).eval()  # type: ignore[call-arg]
    chat = Chat(model, LocalignVLMProcessor.for_model(model, tokenizer), image, config.max_new_tokens)
    frame, drawn = BoxFrame.parse(config.boxes), path.with_name(f"{path.stem}-boxes.png")
    boxes: list[Box] = []
    for question in _questions(config.question):
        answer = chat.ask(question)
        print(answer, flush=True)
        box = parse_box(answer, frame, Size(*image.size))
        if isinstance(box, Box):
            boxes.append(box)
            with replacing(drawn) as temporary:
                draw_boxes(image, boxes).save(temporary, format="PNG")
            print(f"box        {drawn}")


def draw_boxes(image: Image.Image, boxes: Iterable[Box]) -> Image.Image:
    """A copy of the image with the boxes' outlines."""
    copy = image.copy()
    draw = ImageDraw.Draw(copy)
    width = max(1, round(max(image.size) / 200))
    for box in boxes:
        draw.rectangle(box.within_image().pixels(), outline=_LINE, width=width)
    return copy


def _questions(only: str | None) -> Iterator[str]:
    if only is not None:
        yield only
        return
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            print("> ", end="", flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line
