"""Prompt formats: how a conversation becomes text, token ids and labels.

Images are not part of the text: ``<image>`` in a turn is removed, and the image tokens go to
:attr:`Prompt.image_position`, after the beginning-of-sequence token. Text from users is never tokenised into special
tokens.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from localign.errors import UserError, did_you_mean
from localign.options.names import PromptName
from localign.vlm.data.dialects import IMAGE_MARK

IGNORE_INDEX = -100
"""Label of tokens that are not learned."""

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

Turns = Sequence[tuple[str, str]]
"""(question, answer) pairs."""


class Prompt(NamedTuple):
    """A tokenised text; ``labels`` are aligned with ``ids``, not shifted."""

    ids: list[int]
    labels: list[int]
    """The ids of learned tokens (answers and their end tokens), else IGNORE_INDEX."""
    image_position: int
    """Where to insert the image tokens: 1 after a beginning-of-sequence token, else 0."""


class PromptFormat(ABC):
    """A way to write conversations for a language model."""

    name: ClassVar[PromptName]

    @abstractmethod
    def conversation(self, tokenizer: PreTrainedTokenizerBase, turns: Turns) -> Prompt:
        """Tokenise a complete conversation with labels.

        Raises:
            UserError: The tokenizer lacks a token or template that the format needs.
        """

    def conversations(self, tokenizer: PreTrainedTokenizerBase, batch: Sequence[Turns]) -> list[Prompt]:
        """:meth:`conversation` for several conversations at once, which may be faster."""
        return [self.conversation(tokenizer, turns) for turns in batch]

    @abstractmethod
    def question(self, tokenizer: PreTrainedTokenizerBase, question: str, history: Turns = ()) -> Prompt:
        """Tokenise a conversation up to the start of the answer to ``question``, without labels.

        Raises:
            UserError: The tokenizer lacks a token or template that the format needs.
        """

    @abstractmethod
    def text(self, tokenizer: PreTrainedTokenizerBase, question: str, history: Turns = ()) -> str:
        """The text that :meth:`question` tokenises, without the tokenizer's beginning-of-sequence token."""

    @abstractmethod
    def end_token_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """The token that ends an answer. Raises UserError if there is none."""


def prompt_format(name: str) -> PromptFormat:
    """The prompt format of a name. Raises UserError if the name is unknown."""
    if name not in _FORMATS:
        raise UserError(
            f"unknown prompt format {name!r}; known: {', '.join(_FORMATS)}{did_you_mean(name, _FORMATS)}"
        )
    return _FORMATS[name]


def clean(message: str) -> str:
    """A turn's text without image marks and surrounding white space."""
    return message.replace(IMAGE_MARK, "").strip()


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token if the tokenizer writes one, else an empty list.

    Some tokenizers (Qwen, SmolLM) name such a token but never write it.
    """
    ids = tokenizer("", verbose=False)["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


class _Wrapped(PromptFormat):
    """Wraps questions in fixed text, tokenises each turn separately, and ends answers with EOS."""

    opening: ClassVar[str] = ""  # before the first question
    wrapper: ClassVar[str]

    def conversation(self, tokenizer: PreTrainedTokenizerBase, turns: Turns) -> Prompt:
        return self.conversations(tokenizer, [turns])[0]

    def conversations(self, tokenizer: PreTrainedTokenizerBase, batch: Sequence[Turns]) -> list[Prompt]:
        bos = bos_ids(tokenizer)
        end = self.end_token_id(tokenizer)
        # One call for all texts: calling a tokenizer takes far longer than tokenising a question.
        texts = [text for turns in batch for turn in enumerate(turns) for text in self._texts(*turn)]
        encoded = iter(_encode_plain(tokenizer, texts))
        prompts = []
        for turns in batch:
            ids, labels = list(bos), [IGNORE_INDEX] * len(bos)
            for _ in turns:
                question, answer = next(encoded), [*next(encoded), end]
                ids += question + answer
                labels += [IGNORE_INDEX] * len(question) + answer
            prompts.append(Prompt(ids, labels, len(bos)))
        return prompts

    def _texts(self, number: int, turn: tuple[str, str]) -> tuple[str, str]:
        """Question and answer of a turn, formatted."""
        question, answer = turn
        # An empty answer would teach the model to stop at once; the published code writes a space.
        return self._wrap(question, first=number == 0), clean(answer) or " "

    def question(self, tokenizer: PreTrainedTokenizerBase, question: str, history: Turns = ()) -> Prompt:
        ids, _, position = self.conversation(tokenizer, history)
        ids += _encode_plain(tokenizer, [self._wrap(question, first=not history)])[0]
        return Prompt(ids, [IGNORE_INDEX] * len(ids), position)

    def text(self, tokenizer: PreTrainedTokenizerBase, question: str, history: Turns = ()) -> str:
        parts = []
        for number, turn in enumerate(history):
            parts += [*self._texts(number, turn), str(tokenizer.eos_token)]
        return "".join([*parts, self._wrap(question, first=not history)])

    def end_token_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end-of-sequence token to end answers with")
        return int(tokenizer.eos_token_id)

    def _wrap(self, question: str, first: bool) -> str:
        return (self.opening if first else "") + self.wrapper.format(clean(question))


class _InOut(_Wrapped):
    name = "in-out"
    wrapper = "In: {}\nOut:"


class _Vicuna(_Wrapped):
    name = "vicuna"
    opening = VICUNA_SYSTEM + " "
    wrapper = "USER: {} ASSISTANT:"


class _Span(NamedTuple):
    """The characters of one message in a rendered template."""

    begin: int
    end: int
    answer: bool


class _Token(NamedTuple):
    id: int
    begin: int
    end: int


class _ChatTemplate(PromptFormat):
    """The tokenizer's own chat template, tokenised as one text like elsewhere."""

    name = "chat-template"

    def conversation(self, tokenizer: PreTrainedTokenizerBase, turns: Turns) -> Prompt:
        text, spans = _render(tokenizer, [message for turn in turns for message in turn])
        tokens = _encode_rendered(tokenizer, text, spans)
        specials = set(tokenizer.all_special_ids)
        ids, labels = [token.id for token in tokens], [IGNORE_INDEX] * len(tokens)
        for span in (span for span in spans if span.answer):
            first = next((i for i, token in enumerate(tokens) if token.end > span.begin), len(tokens))
            after = next((i for i, token in enumerate(tokens) if token.begin >= span.end), len(tokens))
            last = next((i for i in range(after, len(tokens)) if ids[i] in specials), None)
            if last is None or text[span.end : tokens[last].begin].strip():
                raise UserError("the tokenizer's chat template writes no special token right after an answer")
            labels[first : last + 1] = ids[first : last + 1]
        return Prompt(ids, labels, _leading_bos(tokenizer, ids))

    def question(self, tokenizer: PreTrainedTokenizerBase, question: str, history: Turns = ()) -> Prompt:
        text, spans = _render(tokenizer, [*(message for turn in history for message in turn), question])
        ids = [token.id for token in _encode_rendered(tokenizer, text, spans)]
        return Prompt(ids, [IGNORE_INDEX] * len(ids), _leading_bos(tokenizer, ids))

    def text(self, tokenizer: PreTrainedTokenizerBase, question: str, history: Turns = ()) -> str:
        text, _ = _render(tokenizer, [*(message for turn in history for message in turn), question])
        return text.removeprefix(str(tokenizer.bos_token)) if bos_ids(tokenizer) else text

    def end_token_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        labels = self.conversation(tokenizer, [("a", "b")]).labels
        return [label for label in labels if label != IGNORE_INDEX][-1]


_FORMATS: dict[str, PromptFormat] = {f.name: f for f in (_InOut(), _Vicuna(), _ChatTemplate())}

# Some templates write today's date, and some start an answer with (empty) thoughts. A run must not depend on the
# date, and answers must start at the same place in training and inference.
_TEMPLATE_OPTIONS: dict[str, Any] = {"date_string": "26 Jul 2024", "enable_thinking": False}
_MARK = "\ue000{}\ue001"
_MARKS = re.compile("\ue000(\\d+)\ue001")


def _encode_plain(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, without any special tokens."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)
    return list(encoded["input_ids"])


def _leading_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    bos = bos_ids(tokenizer)
    return int(bool(bos) and ids[:1] == bos)


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[str]) -> tuple[str, list[_Span]]:
    """The rendered template and the span of each message in it; a final question is followed by an answer's start.

    Messages are replaced by marks before rendering and inserted afterwards. This gives their spans, and no template
    can rewrite an answer.
    """
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template; the prompt formats in-out and vicuna need none")
    chat = [
        {"role": "assistant" if i % 2 else "user", "content": _MARK.format(i)} for i in range(len(messages))
    ]
    unanswered = len(messages) % 2 == 1
    try:
        rendered = str(
            tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=unanswered, **_TEMPLATE_OPTIONS
            )
        )
    except TemplateError as error:
        raise UserError(f"the tokenizer's chat template refuses the conversation: {error}") from None
    pieces = _MARKS.split(rendered)  # alternately text of the template and message numbers
    if pieces[1::2] != [str(i) for i in range(len(messages))]:
        raise UserError("the tokenizer's chat template does not write every turn once and in order")
    text, spans = pieces[0], []
    for number, template_text in zip(pieces[1::2], pieces[2::2], strict=True):
        begin = len(text)
        text += clean(messages[int(number)])
        spans.append(_Span(begin, len(text), answer=int(number) % 2 == 1))
        text += template_text
    return text, spans


def _encode_rendered(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[_Span]) -> list[_Token]:
    """Tokens with the characters that they cover; messages give no special tokens, the template may."""
    if not tokenizer.is_fast:
        raise UserError("the chat-template format needs a fast tokenizer, because it needs token offsets")
    special = re.compile("|".join(re.escape(token) for token in _special_tokens(tokenizer)))
    tokens: list[_Token] = []
    done = 0
    for span in spans:
        if special.search(text, span.begin, span.end):  # rare, and the only reason to split the text
            tokens += _encode_part(tokenizer, text, done, span.begin, plain=False)
            tokens += _encode_part(tokenizer, text, span.begin, span.end, plain=True)
            done = span.end
    tokens += _encode_part(tokenizer, text, done, len(text), plain=False)
    return tokens


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)


def _encode_part(
    tokenizer: PreTrainedTokenizerBase, text: str, begin: int, end: int, *, plain: bool
) -> Iterator[_Token]:
    encoded = tokenizer(
        text[begin:end],
        add_special_tokens=False,
        split_special_tokens=plain,
        return_offsets_mapping=True,
        verbose=False,
    )
    for token, (first, last) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        yield _Token(token, begin + first, begin + last)
