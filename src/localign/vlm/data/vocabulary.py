"""Special tokens that a vision-language model adds to its language model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from localign.errors import UserError
from localign.vlm.data.dialects import IMAGE_MARK
from localign.vlm.data.prompts import prompt_format

PAD_TOKEN = "<PAD>"
ROWS_MULTIPLE = 64
"""Embedding matrices are padded to a multiple of this many rows."""


def add_special_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Add the image token to a tokenizer in place, and a padding token if it has none.

    Returns:
        The image token's id.
    """
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.add_tokens([AddedToken(IMAGE_MARK, special=True, normalized=False)], special_tokens=True)
    return image_token_id(tokenizer)


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the image token. Raises UserError if the tokenizer has none."""
    token = tokenizer.convert_tokens_to_ids(IMAGE_MARK)
    if not isinstance(token, int) or token == tokenizer.unk_token_id:
        raise UserError(f"the tokenizer has no image token {IMAGE_MARK}")
    return token


@torch.no_grad()
def resize_embeddings(language_model: PreTrainedModel, tokens: int) -> None:
    """Grow the embeddings in place to a multiple of 64 rows, at least ``tokens``.

    New rows of the input and output embeddings are the mean of the old rows.
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
    """The ids at which generation stops, sorted: the prompt format's end token, and the model's and tokenizer's.

    Raises:
        UserError: The format is unknown, or has no end token with this tokenizer.
    """
    ends = {prompt_format(format_name).end_token_id(tokenizer)}
    own: Any = model.generation_config.eos_token_id if model.generation_config is not None else None
    for end in (tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])):
        if end is not None:
            ends.add(int(end))
    return sorted(ends)
