"""How a conversation becomes text, token ids and labels.

An image is no part of the text: ``<image>`` written in a turn is removed, and the image's tokens go to
:attr:`Prompt.image_position`, after the beginning-of-sequence token. What a user writes is never taken for a
special token.
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

IGNORE_INDEX = -100
"""The label of what is not learned."""

IMAGE_MARK = "<image>"

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
    """The ids where they are learned (answers and their end tokens), else IGNORE_INDEX."""
    image_position: int
    """Where the image's tokens are to be inserted: 1 after a beginning-of-sequence token, else 0."""


class PromptFormat(ABC):
    """One way to write conversations for a language model."""

    name: ClassVar[PromptName]

    @abstractmethod
    def conversation(self, tokenizer: PreTrainedTokenizerBase, turns: Turns) -> Prompt:
        """A whole conversation, to learn from.

        Raises:
            UserError: The tokenizer lacks what the format needs.
        """

    def conversations(self, tokenizer: PreTrainedTokenizerBase, several: Sequence[Turns]) -> list[Prompt]:
        """Several conversations, each as by itself, in less time."""
        return [self.conversation(tokenizer, turns) for turns in several]

    @abstractmethod
    def question(self, tokenizer: PreTrainedTokenizerBase, question: str, history: Turns = ()) -> Prompt:
        """A conversation up to where the answer to ``question`` begins; nothing is labelled.

        Raises:
            UserError: The tokenizer lacks what the format needs.
        """

    @abstractmethod
    def text(self, tokenizer: PreTrainedTokenizerBase, question: str, history: Turns = ()) -> str:
        """What :meth:`question` tokenises, to read; without the tokenizer's beginning-of-sequence token."""

    @abstractmethod
    def end_token_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """The token that ends an answer. Raises UserError if there is none."""


def prompt_format(name: str) -> PromptFormat:
    """The format of a name.

    Raises:
        UserError: There is none of that name.
    """
    if name not in _FORMATS:
        raise UserError(
            f"unknown prompt format {name!r}; known: {', '.join(_FORMATS)}{did_you_mean(name, _FORMATS)}"
        )
    return _FORMATS[name]


def clean(message: str) -> str:
    """A turn as it is put into a format: without image marks and outer white space."""
    return message.replace(IMAGE_MARK, "").strip()


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token, if the tokenizer puts one before a text, else nothing.

    That a tokenizer *names* such a token is not enough: Qwen's and SmolLM's never write it.
    """
    ids = tokenizer("", verbose=False)["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


class _Wrapped(PromptFormat):
    """Questions between fixed words; each turn is tokenised by itself, an answer ends in EOS."""

    opening: ClassVar[str] = ""  # before the first question
    wrapper: ClassVar[str]

    def conversation(self, tokenizer: PreTrainedTokenizerBase, turns: Turns) -> Prompt:
        return self.conversations(tokenizer, [turns])[0]

    def conversations(self, tokenizer: PreTrainedTokenizerBase, several: Sequence[Turns]) -> list[Prompt]:
        begin = bos_ids(tokenizer)
        end = self.end_token_id(tokenizer)
        # One call for all texts: a tokenizer takes far longer to be called than to split a question.
        texts = [text for turns in several for turn in enumerate(turns) for text in self._texts(*turn)]
        encoded = iter(_plain_ids(tokenizer, texts))
        prompts = []
        for turns in several:
            ids, labels = list(begin), [IGNORE_INDEX] * len(begin)
            for _ in turns:
                asked, answered = next(encoded), [*next(encoded), end]
                ids += asked + answered
                labels += [IGNORE_INDEX] * len(asked) + answered
            prompts.append(Prompt(ids, labels, len(begin)))
        return prompts

    def _texts(self, number: int, turn: tuple[str, str]) -> tuple[str, str]:
        """A question and an answer, as they are written."""
        question, answer = turn
        # An answer of nothing but EOS would teach to be silent; the published wrapper writes a space.
        return self._wrap(question, first=number == 0), clean(answer) or " "

    def question(self, tokenizer: PreTrainedTokenizerBase, question: str, history: Turns = ()) -> Prompt:
        ids, _, position = self.conversation(tokenizer, history)
        ids += _plain_ids(tokenizer, [self._wrap(question, first=not history)])[0]
        return Prompt(ids, [IGNORE_INDEX] * len(ids), position)

    def text(self, tokenizer: PreTrainedTokenizerBase, question: str, history: Turns = ()) -> str:
        parts = []
        for number, (asked, answer) in enumerate(history):
            parts += [*self._texts(number, (asked, answer)), str(tokenizer.eos_token)]
        return "".join([*parts, self._wrap(question, first=not history)])

    def end_token_id(self, tokenizer: PreTrainedTokenizerBase) -> int:
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end-of-sequence token, so an answer could never end")
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
    """The characters of one turn in a rendered template."""

    begin: int
    end: int
    answer: bool


class _Token(NamedTuple):
    id: int
    begin: int
    end: int


class _ChatTemplate(PromptFormat):
    """The tokenizer's own template, tokenised as one text, as everybody else who uses the model does."""

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

# Some templates write today's date, some open an answer with (empty) thoughts: a run must not depend on the
# day, and an answer must begin in training where it does in use.
_TEMPLATE_OPTIONS: dict[str, Any] = {"date_string": "26 Jul 2024", "enable_thinking": False}
_MARK = "\ue000{}\ue001"
_MARKS = re.compile("\ue000(\\d+)\ue001")


def _plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)
    return list(encoded["input_ids"])


def _leading_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    begin = bos_ids(tokenizer)
    return int(bool(begin) and ids[:1] == begin)


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[str]) -> tuple[str, list[_Span]]:
    """The template's text, and where in it each message lies; after a question, an answer is opened.

    The template is rendered with a mark for each message, and the messages are put in afterwards: so it is
    known which characters are whose, and no template rewrites an answer.
    """
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template; the prompt formats in-out and vicuna need none")
    chat = [
        {"role": "assistant" if i % 2 else "user", "content": _MARK.format(i)} for i in range(len(messages))
    ]
    opened = len(messages) % 2 == 1
    try:
        rendered = str(
            tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=opened, **_TEMPLATE_OPTIONS
            )
        )
    except TemplateError as error:
        raise UserError(f"the tokenizer's chat template refuses the conversation: {error}") from None
    pieces = _MARKS.split(rendered)  # words of the template and numbers of messages, in turn
    if pieces[1::2] != [str(i) for i in range(len(messages))]:
        raise UserError("the tokenizer's chat template does not write every turn once and in order")
    text, spans = pieces[0], []
    for number, words in zip(pieces[1::2], pieces[2::2], strict=True):
        begin = len(text)
        text += clean(messages[int(number)])
        spans.append(_Span(begin, len(text), answer=int(number) % 2 == 1))
        text += words
    return text, spans


def _encode_rendered(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[_Span]) -> list[_Token]:
    """The tokens with the characters they cover; special tokens only where the template wrote them."""
    if not tokenizer.is_fast:
        raise UserError("the chat-template format needs a fast tokenizer, which tells what each token covers")
    special = re.compile("|".join(re.escape(token) for token in _special_tokens(tokenizer)))
    tokens: list[_Token] = []
    done = 0
    for span in spans:
        if special.search(text, span.begin, span.end):  # rare: only then is the text cut
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
