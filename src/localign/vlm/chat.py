"""`localign vlm chat`: ask a model about an image, in the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from localign.data.sources import UnreadableImage, read_image
from localign.engine.distributed import choose_device
from localign.errors import UserError
from localign.files import replacing
from localign.files.disk import describe
from localign.files.output import is_marked_png, png_mark
from localign.options.vlm.tools import ChatConfig
from localign.text.printing import printable
from localign.vlm.model.build import load_vlm
from localign.vlm.model.modeling import LocalignVLM
from localign.vlm.model.processing import LocalignVLMProcessor
from localign.vlm.scoring.boxes import Box, BoxFrame, Size, parse_box

_LINE = (255, 40, 40)
_CHAT = "vlm chat"
"""The mark of drawings, which are replaced by newer ones."""


class Chat:
    """A conversation about one image.

    Args:
        model: The model, in eval mode.
        processor: The model's processor.
        image: RGB.
        max_new_tokens: Most tokens per answer.
    """

    def __init__(
        self,
        model: LocalignVLM,
        processor: LocalignVLMProcessor,
        image: Image.Image,
        max_new_tokens: int = 512,
    ) -> None:
        self.model: Any = model  # transformers types generate() only for its own models
        self.processor, self.image = processor, image
        self.max_new_tokens = max_new_tokens
        self.messages: list[dict[str, object]] = []

    @torch.inference_mode()
    def ask(self, question: str) -> str:
        """Add a question to the conversation and return the greedy answer."""
        content: list[dict[str, object]] = [{"type": "text", "text": question}]
        if not self.messages:
            content.insert(0, {"type": "image", "image": self.image})
        self.messages.append({"role": "user", "content": content})
        batch = self.processor.apply_chat_template(self.messages, tokenize=True, return_dict=True)
        batch = batch.to(self.model.device)
        ids = self.model.generate(**batch, max_new_tokens=self.max_new_tokens, do_sample=False)
        new = ids[0, batch["input_ids"].shape[1] :]
        answer: str = self.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
        self.messages.append({"role": "assistant", "content": answer})
        return answer


def run_chat(config: ChatConfig) -> None:
    """Answer questions until the input ends; draw the boxes that answers name onto a copy of the image."""
    path, frame = Path(config.image), BoxFrame.parse(config.boxes)
    try:
        image = read_image(config.image, config.image)
    except UnreadableImage as error:
        raise UserError(f"cannot read the image: {error}") from None
    device = choose_device(config.device)
    bf16 = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    model, tokenizer = load_vlm(config.model)
    model.to(device=device, dtype=torch.bfloat16 if bf16 else torch.float32).eval()  # type: ignore[call-arg]
    chat = Chat(model, LocalignVLMProcessor.for_model(model, tokenizer), image, config.max_new_tokens)
    drawing = drawing_path(path)
    boxes: list[Box] = []
    for question in _questions(config.question):
        answer = chat.ask(question)
        print(answer, flush=True)
        box = parse_box(answer, frame, Size(*image.size))
        if isinstance(box, Box):
            boxes.append(box)
            try:
                with replacing(drawing) as temporary:
                    draw_boxes(image, boxes).save(temporary, format="PNG", pnginfo=png_mark(_CHAT))
            except OSError as error:  # images often lie where nothing can be written; the chat goes on
                print(f"box        not drawn: {describe(error)}")
            else:
                print(f"box        {printable(drawing)}")


def drawing_path(image: Path) -> Path:
    """The file beside an image for its drawing: the first name that is free, or taken by a drawing of localign."""
    names = (f"{image.stem}-boxes{'' if number == 1 else f'-{number}'}.png" for number in count(1))
    paths = (image.with_name(name) for name in names)
    return next(path for path in paths if not os.path.lexists(path) or is_marked_png(path, _CHAT))


def draw_boxes(image: Image.Image, boxes: Iterable[Box]) -> Image.Image:
    """A copy of the image with the boxes outlined."""
    copy = image.copy()
    draw = ImageDraw.Draw(copy)
    width = max(1, round(max(image.size) / 200))
    for box in boxes:
        draw.rectangle(box.within_image().pixels(), outline=_LINE, width=width)
    return copy


def _questions(question: str | None) -> Iterator[str]:
    if question is not None:
        yield question
        return
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            print("> ", end="", flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line
