"""Greedy answers of a model, and probabilities of an answer's first token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from localign.vlm.data.images import open_image
from localign.vlm.model.processing import LocalignVLMProcessor

# These override a model's own generation settings.
_GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}


class Query(NamedTuple):
    """One question to a model, without the prompt format's words."""

    message: str
    image: Any = None
    """A PIL image, a path, or None."""


@torch.inference_mode()
def greedy_answers(
    model: Any,
    processor: LocalignVLMProcessor,
    questions: Sequence[Query],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 128,
) -> Iterator[str]:
    """The answers in the order of the questions. An answer does not depend on the rest of its batch.

    Args:
        model: A :class:`~localign.vlm.model.modeling.LocalignVLM` in eval mode, on its device.
        processor: The model's processor.
        questions: Independent questions.
        batch_size: Questions per batch.
        max_new_tokens: Longest answer.

    Raises:
        UserError: An image cannot be read.
    """
    for begin in range(0, len(questions), batch_size):
        chunk = questions[begin : begin + batch_size]
        images: list[Image.Image | None] = [None if q.image is None else open_image(q.image) for q in chunk]
        batch = processor(text=[q.message for q in chunk], images=images).to(model.device)
        yield from greedy_texts(model, processor.tokenizer, batch, max_new_tokens)


@torch.inference_mode()
def greedy_texts(
    model: Any, tokenizer: PreTrainedTokenizerBase, batch: Mapping[str, Any], max_new_tokens: int
) -> list[str]:
    """The answers to a left-padded batch, without special tokens and outer white space.

    Args:
        model: Any model of transformers that generates text.
        tokenizer: The model's tokenizer.
        batch: The model's input, on its device.
        max_new_tokens: Longest answer.
    """
    ids = model.generate(**batch, **_GREEDY, max_new_tokens=max_new_tokens)
    texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


@torch.inference_mode()
def first_token_probabilities(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """The probability of every token as the first of the answer, from one forward pass.

    Args:
        model: Any model of transformers that generates text.
        batch: The model's input, left-padded, on its device.

    Returns:
        float64 ``(rows, vocabulary)`` on the CPU; every row sums to 1. In float64 no probability underflows to 0.
    """
    # generate() with one token is one forward pass, and it knows each model's positions under padding.
    output = model.generate(
        **batch, **_GREEDY, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
    )
    probabilities: Tensor = output.logits[0].float().cpu().double().softmax(dim=-1)
    return probabilities
