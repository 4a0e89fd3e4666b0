"""Tiny vision-language models and records for them, shared by several test files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from tiny_vlm import TEXT_WIDTH, tiny_backbone, tiny_llm, tiny_tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from localign.alignment.student import Student, build_student
from localign.backbones import Backbone
from localign.options.names import AdapterName
from localign.vlm import LocalignVLM, LocalignVLMProcessor
from localign.vlm.data.prompts import prompt_format
from localign.vlm.model.adapters import fresh_adapter
from localign.vlm.model.presets import VisionSource
from localign.vlm.model.vision import TowerConfig, VisionTower

KINDS = ("linear", "mlp", "fused-mlp", "transformer", "decoder", "truncated", "fused-decoder")
"""All adapters."""

QUESTIONS = ["What is it?", "Where?", "Name the colour of the largest shape, please.", ""]


def tiny_tower(**backbone: Any) -> VisionTower:
    """A tower that gives the four patch tokens of the second-to-last block."""
    vit = tiny_backbone(**backbone)
    return VisionTower([TowerConfig.of(vit, layer=-2, norm=False, keep_prefix=False)], [vit])


def tiny_vlm(
    kind: str | PreTrainedModel = "llama",
    adapter: AdapterName = "mlp",
    *,
    pad: bool = False,
    words: Sequence[str] = (),
    **llm: Any,
) -> tuple[LocalignVLM, PreTrainedTokenizerBase]:
    """A random model in eval mode and its tokenizer, in which each of ``words`` is one token.

    ``kind`` is as for :func:`tiny_llm`, or a language model.
    """
    tower = tiny_tower()
    tokenizer = tiny_tokenizer(pad=pad, bos=kind == "llama")
    if words:
        tokenizer.add_tokens(list(words))
        llm["vocab_size"] = len(tokenizer)
    language_model = tiny_llm(kind, **llm) if isinstance(kind, str) else kind
    module = fresh_adapter(adapter, tower, TEXT_WIDTH)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(4)  # otherwise images hardly change the answers
    return LocalignVLM.from_parts(tower, module, language_model, tokenizer).eval(), tokenizer  # type: ignore[no-untyped-call]


def tiny_processor(model: LocalignVLM, tokenizer: PreTrainedTokenizerBase) -> LocalignVLMProcessor:
    return LocalignVLMProcessor.for_model(model, tokenizer)


def picture(seed: int, size: tuple[int, int] = (24, 18)) -> Image.Image:
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


class Encoded(NamedTuple):
    """One record: ids and labels ``(tokens,)``, and its image ``(0 or 1, 3, 16, 16)``."""

    ids: Tensor
    labels: Tensor
    image: Tensor


def encoded(
    model: LocalignVLM, tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str]], image: int | None
) -> Encoded:
    prompt = prompt_format("in-out").conversation(tokenizer, turns)
    count = 0 if image is None else model.vision.num_tokens
    at = prompt.image_position
    ids = [*prompt.ids[:at], *[model.config.image_token_id] * count, *prompt.ids[at:]]
    labels = [*prompt.labels[:at], *[-100] * count, *prompt.labels[at:]]
    generator = torch.Generator().manual_seed(image or 0)
    pixels = torch.randint(0, 256, (int(image is not None), 3, 16, 16), generator=generator)
    return Encoded(torch.tensor(ids), torch.tensor(labels), pixels.to(torch.uint8))


def mixed_records(model: LocalignVLM, tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Text only, an image, several turns with and without an image, and a short record with an image."""
    conversations: list[tuple[list[tuple[str, str]], int | None]] = [
        ([("Say hello.", "Hello.")], None),
        ([("What is it?", "A kite")], 1),
        ([("How many?", "2"), ("Of which colour?", "red and blue"), ("Sure?", "Yes")], 2),
        ([("a", "b"), ("c", "d")], None),
        ([("", "x")], 3),
    ]
    return [encoded(model, tokenizer, turns, image) for turns, image in conversations]


def packed(records: list[Encoded]) -> dict[str, Tensor]:
    """Model arguments for one packed row."""
    lengths = torch.tensor([0, *(len(r.ids) for r in records)])
    return {
        "input_ids": torch.cat([r.ids for r in records])[None],
        "labels": torch.cat([r.labels for r in records])[None],
        "position_ids": torch.cat([torch.arange(len(r.ids)) for r in records])[None],
        "cu_seqlens": lengths.cumsum(0).to(torch.int32),
        "pixel_values": torch.cat([r.image for r in records]),
    }


def padded(records: list[Encoded], pad_token_id: int) -> dict[str, Tensor]:
    """Model arguments for one row per record, padded on the right."""
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([r.ids for r in records], True, pad_token_id),
        "labels": pad([r.labels for r in records], True, -100),
        "attention_mask": pad([torch.ones_like(r.ids) for r in records], True, 0),
        "pixel_values": torch.cat([r.image for r in records]),
    }


def pixels(batch: int = 2, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)


def tiny_student(backbone: Backbone | None = None, **options: Any) -> Student:
    """A student with large random weights, in eval mode."""
    student = build_student(backbone or tiny_backbone(), soft_cap=1.0, **options).eval()
    torch.manual_seed(5)
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.3)
    return student


def aligned_source(backbone: Backbone | None = None) -> VisionSource:
    student = tiny_student(backbone)
    return VisionSource(student.encoder.backbone, aligned=True, student=student)


def student_of(source: VisionSource) -> Any:
    assert source.student is not None
    return source.student


def sides(kind: str) -> list[VisionSource]:
    """Backbones that an adapter takes."""
    if kind == "fused-mlp":
        return [VisionSource(tiny_backbone("other", width=24)), VisionSource(tiny_backbone())]
    if kind == "fused-decoder":
        return [VisionSource(tiny_backbone("other", width=24)), aligned_source()]
    return [aligned_source()] if kind == "decoder" else [VisionSource(tiny_backbone())]
