"""The tokens that a language model gets beside its own."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from localign.vlm.data.prompts import IMAGE_MARK, prompt_format

PAD_TOKEN = "<PAD>"
ROWS_MULTIPLE = 64
"""The embedding matrix has a multiple of so many rows."""


def add_special_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Give a tokenizer the image token, and a padding token if it has none, in place.

    Returns:
        The image token's id.
    """
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.add_tokens([AddedToken(IMAGE_MARK, special=True, normalized=False)], special_tokens=True)
    return image_token_id(tokenizer)


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the image token, which the tokenizer must have."""
    return int(tokenizer.get_vocab()[IMAGE_MARK])


@torch.no_grad()
def resize_embeddings(language_model: PreTrainedModel, tokens: int) -> None:
    """Let the embeddings grow, in place, to a multiple of 64 rows that holds ``tokens``.

    New rows, of the output layer too, are the mean of the old ones.
    """
    model: Any = language_model
    old = model.get_input_embeddings().weight.shape[0]
    rows = -(-max(old, tokens) // ROWS_MULTIPLE) * ROWS_MULTIPLE
    if rows == old:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        for values in (layer.weight, getattr(layer, "bias", None)):
            if values is not None:
                values[old:] = values[:old].mean(dim=0, keepdim=True)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, format_name: str) -> list[int]:
    """Where generation stops: what ends an answer in the prompt format, and what model and tokenizer say.

    Raises:
        UserError: There is no such format, or nothing ends its answers.
    """
    ends = {prompt_format(format_name).end_token_id(tokenizer)}
    own: Any = model.generation_config.eos_token_id if model.generation_config is not None else None
    for end in (tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])):
        if end is not None:
            ends.add(int(end))
    return sorted(ends)
