"""Greedy answers of a model to many questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image

from localign.vlm.images import open_image
from localign.vlm.processing import LocalignVLMProcessor


class Asked(NamedTuple):
    """One question, without the prompt format's words."""

    message: str
    image: Any = None
    """A PIL image, a path, or None."""


@torch.inference_mode()
def greedy_answers(
    model: Any,
    processor: LocalignVLMProcessor,
    questions: Sequence[Asked],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 128,
) -> Iterator[str]:
    """The answers, in the order of the questions; what is in a batch with what changes none of them.

    Args:
        model: A :class:`~localign.vlm.modeling.LocalignVLM` in eval mode, on its device.
        processor: The model's.
        questions: Each by itself.
        batch_size: Questions that are answered together.
        max_new_tokens: Longest answer.

    Raises:
        UserError: An image cannot be read.
    """
    for begin in range(0, len(questions), batch_size):
        asked = questions[begin : begin + batch_size]
        images: list[Image.Image | None] = [None if q.image is None else open_image(q.image) for q in asked]
        batch = processor(text=[q.message for q in asked], images=images).to(model.device)
        ids = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        texts = processor.tokenizer.batch_decode(
            ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        yield from (text.strip() for text in texts)
