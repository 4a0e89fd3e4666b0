"""From a record to token ids and labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from localign.errors import UserError
from localign.vlm.data.prompts import IGNORE_INDEX, IMAGE_MARK, PromptFormat
from localign.vlm.data.records import Record


class NothingToLearn(Exception):
    """A record none of whose answers lies within the limit; says so on one line."""


@dataclass(frozen=True)
class Example:
    """One conversation as the model reads it."""

    input_ids: Tensor
    """int64 ``(tokens,)``: beginning-of-sequence token, the image's tokens, text."""
    labels: Tensor
    """int64 ``(tokens,)``, aligned with ``input_ids``: the ids of answers and their ends, else -100."""
    position_ids: Tensor
    """int64 ``(tokens,)``, from 0; each independent turn goes on where the image ends."""
    turns: Tensor | None = None
    """int64 ``(tokens,)``, of independent turns: 0 for what all of them see (beginning and image), then 1, 2, ..."""


@dataclass(frozen=True)
class ConversationTokenizer:
    """How records become examples.

    Args:
        prompt: The words around questions and answers.
        tokenizer: Knows the image token (see :func:`localign.vlm.data.vocabulary.add_special_tokens`).
        num_image_tokens: Tokens an image takes.
        max_length: The longest example, in tokens; what is beyond is cut off.
        text_limit: ``max_length`` counts the text alone, and an image's tokens come on top, as published.
        independent: No turn sees another one: each is what a record of its own would be, but for the image's
            tokens, which come once.

    Raises:
        UserError: The tokenizer has no image token, or the limit has no room for an image and text.
    """

    prompt: PromptFormat
    tokenizer: PreTrainedTokenizerBase
    num_image_tokens: int
    max_length: int
    text_limit: bool = False
    independent: bool = False

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
            independent=self.independent,
        )

    def length(self, record: Record) -> int:
        """Tokens of a record with its image's, without a limit."""
        ids, _, _, _ = _text(record, self.prompt, self.tokenizer, self.independent)
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
    """Ids, labels, each token's turn (a conversation is one turn), and where an image's tokens go."""
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
    """Positions of tokens whose turns these are; turns are in order, and each begins after what all see."""
    index = torch.arange(len(turns))
    shared = int((turns == 0).sum())
    starts = torch.searchsorted(turns, turns)  # of each token's own turn
    return torch.where(turns == 0, index, shared + index - starts)


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The placeholder of an image's tokens. Raises UserError if the tokenizer has none."""
    token = tokenizer.convert_tokens_to_ids(IMAGE_MARK)
    if not isinstance(token, int) or token == tokenizer.unk_token_id:
        raise UserError(f"the tokenizer has no image token {IMAGE_MARK}")
    return token
