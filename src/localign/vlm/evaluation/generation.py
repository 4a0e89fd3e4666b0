"""Greedy answers of a model to many questions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from localign.vlm.data.images import open_image
from localign.vlm.model.processing import LocalignVLMProcessor

# Whatever a model's own settings ask for: no sampling, no beams, no penalties.
_GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}


class Query(NamedTuple):
    """One question, without the prompt format's words."""

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
    """The answers, in the order of the questions; what is in a batch with what changes none of them.

    Args:
        model: A :class:`~localign.vlm.model.modeling.LocalignVLM` in eval mode, on its device.
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
        yield from greedy_texts(model, processor.tokenizer, batch, max_new_tokens)


@torch.inference_mode()
def greedy_texts(
    model: Any, tokenizer: PreTrainedTokenizerBase, batch: Mapping[str, Any], max_new_tokens: int
) -> list[str]:
    """The answers to a batch padded on the left, without special tokens and outer white space.

    Args:
        model: Any that transformers generates text with.
        tokenizer: The model's.
        batch: What the model takes, on its device.
        max_new_tokens: Longest answer.
    """
    ids = model.generate(**batch, **_GREEDY, max_new_tokens=max_new_tokens)
    texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


@torch.inference_mode()
def first_token_probabilities(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """How likely each token is as the first of the answer; one forward pass.

    Args:
        model: Any that transformers generates text with.
        batch: What the model takes, on its device, padded on the left.

    Returns:
        float64 ``(rows, vocabulary)`` on the CPU, every row of sum 1. In this precision no token's probability
        vanishes beside another's.
    """
    # Asked for one token, generate() is one forward pass, with the positions that each model wants under padding.
    found = model.generate(
        **batch, **_GREEDY, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
    )
    probabilities: Tensor = found.logits[0].float().cpu().double().softmax(dim=-1)
    return probabilities
