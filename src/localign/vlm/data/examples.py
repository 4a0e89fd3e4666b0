"""Turning a record into token ids and labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from localign.errors import UserError
from localign.vlm.data.dialects import Record
from localign.vlm.data.prompts import IGNORE_INDEX, PromptFormat
from localign.vlm.data.vocabulary import image_token_id


class NothingToLearn(Exception):
    """No answer of a record begins within the token limit; the message is one line."""


@dataclass(frozen=True)
class Example:
    """One tokenised conversation."""

    input_ids: Tensor
    """int64 ``(tokens,)``: beginning-of-sequence token, image tokens, text."""
    labels: Tensor
    """int64 ``(tokens,)``, aligned with ``input_ids``: the ids of answers and their end tokens, else -100."""
    position_ids: Tensor
    """int64 ``(tokens,)``, from 0; each independent turn continues from the image."""
    turns: Tensor | None = None
    """int64 ``(tokens,)`` for independent turns: 0 for the shared prefix (beginning and image), then 1, 2, ..."""


@dataclass(frozen=True)
class ConversationTokenizer:
    """Tokenises records.

    Args:
        prompt: The prompt format.
        tokenizer: Has the image token (see :func:`localign.vlm.data.vocabulary.add_special_tokens`).
        num_image_tokens: Tokens per image; of the largest if images have several sizes.
        max_length: Most tokens per example; longer examples are truncated.
        text_limit: ``max_length`` counts text only, without image tokens, as in the published code.
        independent: Turns do not see one another: each is tokenised like a record of its own, but all share one
            copy of the image tokens.

    Raises:
        UserError: The tokenizer has no image token, or the limit leaves no room for an image and text.
    """

    prompt: PromptFormat
    tokenizer: PreTrainedTokenizerBase
    num_image_tokens: int
    max_length: int
    text_limit: bool = False
    independent: bool = False

    def __post_init__(self) -> None:
        image_token_id(self.tokenizer)
        # The shortest text: beginning-of-sequence, a question, an answer and its end token.
        minimum = 4 if self.text_limit else self.num_image_tokens + 4
        if self.max_length < minimum:
            raise UserError(
                f"a limit of {self.max_length} tokens leaves no room for text: "
                f"an image takes {self.num_image_tokens}; allow at least {minimum}"
            )

    def __call__(self, record: Record, image_tokens: int | None = None) -> Example:
        """Tokenise a record and truncate it to the limit.

        Args:
            record: The record.
            image_tokens: Tokens of its image; default :attr:`num_image_tokens`.

        Raises:
            NothingToLearn: No label is within the limit.
        """
        return encode(
            record,
            self.prompt,
            self.tokenizer,
            num_image_tokens=self.num_image_tokens if image_tokens is None else image_tokens,
            max_length=self.max_length,
            text_limit=self.text_limit,
            independent=self.independent,
        )

    def length(self, record: Record) -> int:
        """Tokens of a record, image tokens included, before truncation."""
        ids, _, _, _ = _text(record, self.prompt, self.tokenizer, self.independent)
        return len(ids) + (self.num_image_tokens if record.image is not None else 0)

    def limit(self, has_image: bool) -> int:
        """Most tokens of an example, image tokens included."""
        return self.max_length + (self.num_image_tokens if self.text_limit and has_image else 0)


def encode(
    record: Record,
    prompt: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_image_tokens: int,
    max_length: int,
    text_limit: bool = False,
    independent: bool = False,
) -> Example:
    """Tokenise one record; see :class:`ConversationTokenizer` for the arguments.

    Raises:
        NothingToLearn: No label is within the limit.
        UserError: The tokenizer has no image token.
    """
    ids, labels, numbers, position = _text(record, prompt, tokenizer, independent)
    image_tokens = num_image_tokens if record.image is not None else 0
    if image_tokens:
        ids[position:position] = [image_token_id(tokenizer)] * image_tokens
        labels[position:position] = [IGNORE_INDEX] * image_tokens
        numbers[position:position] = [0] * image_tokens
    limit = max_length + image_tokens if text_limit else max_length
    if all(label == IGNORE_INDEX for label in labels[:limit]):
        raise NothingToLearn(f"no answer begins within {max_length} tokens")
    input_ids = torch.tensor(ids[:limit], dtype=torch.int64)
    turns = torch.tensor(numbers[:limit], dtype=torch.int64) if independent else None
    return Example(
        input_ids,
        torch.tensor(labels[:limit], dtype=torch.int64),
        torch.arange(len(input_ids)) if turns is None else _positions(turns),
        turns,
    )


def _text(
    record: Record, prompt: PromptFormat, tokenizer: PreTrainedTokenizerBase, independent: bool
) -> tuple[list[int], list[int], list[int], int]:
    """Ids, labels, the turn of each token (1 throughout a conversation), and where the image tokens go."""
    parts = [[turn] for turn in record.turns] if independent else [record.turns]
    prompts = prompt.conversations(tokenizer, parts)
    position = prompts[0].image_position
    ids, labels, turns = prompts[0].ids[:position], [IGNORE_INDEX] * position, [0] * position
    for number, part in enumerate(prompts, start=1):
        ids += part.ids[position:]
        labels += part.labels[position:]
        turns += [number] * (len(part.ids) - position)
    return ids, labels, turns, position


def _positions(turns: Tensor) -> Tensor:
    """Position ids for sorted ``turns``: each turn continues from the shared prefix."""
    index = torch.arange(len(turns))
    shared = int((turns == 0).sum())
    starts = torch.searchsorted(turns, turns)  # the first token of each token's turn
    return torch.where(turns == 0, index, shared + index - starts)
