"""From a record to token ids and labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from localign.errors import UserError
from localign.vlm.prompts import IGNORED, IMAGE_MARK, PromptFormat
from localign.vlm.records import Record


class NothingToLearn(Exception):
    """A record none of whose answers lies within the limit; says so on one line."""


@dataclass(frozen=True)
class Example:
    """One conversation as the model reads it."""

    input_ids: Tensor
    """int64 ``(tokens,)``: beginning-of-sequence token, the image's tokens, text."""
    labels: Tensor
    """int64 ``(tokens,)``, aligned with ``input_ids``: the ids of answers and their ends, else -100."""


@dataclass(frozen=True)
class Encoder:
    """How records become examples.

    Args:
        prompt: The words around questions and answers.
        tokenizer: Knows the image token (see :func:`localign.vlm.vocabulary.add_special_tokens`).
        num_image_tokens: Tokens an image takes.
        max_length: The longest example, in tokens; what is beyond is cut off.
        text_limit: ``max_length`` counts the text alone, and an image's tokens come on top, as published.

    Raises:
        UserError: The tokenizer has no image token, or the limit has no room for an image and text.
    """

    prompt: PromptFormat
    tokenizer: PreTrainedTokenizerBase
    num_image_tokens: int
    max_length: int
    text_limit: bool = False

    def __post_init__(self) -> None:
        image_token_id(self.tokenizer)
        # Beginning, a word, an answer and its end: below that no record whatever could be learned from.
        least = 4 if self.text_limit else self.num_image_tokens + 4
        if self.max_length < least:
            raise UserError(
                f"a limit of {self.max_length} tokens leaves no room for text: "
                f"an image takes {self.num_image_tokens}; allow at least {least}"
            )

    def __call__(self, record: Record) -> Example:
        """The example of a record, within the limit.

        Raises:
            NothingToLearn: No label is within the limit.
        """
        return encode(
            record,
            self.prompt,
            self.tokenizer,
            num_image_tokens=self.num_image_tokens,
            max_length=self.max_length,
            text_limit=self.text_limit,
        )

    def length(self, record: Record) -> int:
        """Tokens of a record with its image's, without a limit."""
        ids, _, _ = self.prompt.conversation(self.tokenizer, record.turns)
        return len(ids) + (self.num_image_tokens if record.image is not None else 0)

    def limit(self, has_image: bool) -> int:
        """The longest example there can be."""
        return self.max_length + (self.num_image_tokens if self.text_limit and has_image else 0)


def encode(
    record: Record,
    prompt: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_image_tokens: int,
    max_length: int,
    text_limit: bool = False,
) -> Example:
    """Tokenise one record; see :class:`Encoder` for the arguments.

    Raises:
        NothingToLearn: No label is within the limit.
        UserError: The tokenizer has no image token.
    """
    ids, labels, position = prompt.conversation(tokenizer, record.turns)
    if text_limit:
        ids, labels = ids[:max_length], labels[:max_length]
    if record.image is not None:
        ids[position:position] = [image_token_id(tokenizer)] * num_image_tokens
        labels[position:position] = [IGNORED] * num_image_tokens
    if not text_limit:
        ids, labels = ids[:max_length], labels[:max_length]
    if all(label == IGNORED for label in labels):
        raise NothingToLearn(f"no answer begins within {max_length} tokens")
    return Example(torch.tensor(ids, dtype=torch.int64), torch.tensor(labels, dtype=torch.int64))


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The placeholder of an image's tokens. Raises UserError if the tokenizer has none."""
    token = tokenizer.convert_tokens_to_ids(IMAGE_MARK)
    if not isinstance(token, int) or token == tokenizer.unk_token_id:
        raise UserError(f"the tokenizer has no image token {IMAGE_MARK}")
    return token
