"""From questions and images to what the model takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from localign.errors import UserError
from localign.vlm.data.images import ImageTransform, open_image
from localign.vlm.data.prompts import IMAGE_MARK, Prompt, PromptFormat, prompt_format
from localign.vlm.data.vocabulary import image_token_id
from localign.vlm.model.modeling import LocalignVLM

Messages = Sequence[Mapping[str, Any]]
"""One conversation: ``{"role": "user" or "assistant", "content": text or a list of parts}``."""


class Conversation:
    """Turns, perhaps a last question without an answer, and images, from messages in transformers' form.

    Raises:
        UserError: The messages are not of this form.
    """

    def __init__(self, messages: Messages) -> None:
        self.turns: list[tuple[str, str]] = []
        self.question: str | None = None
        self.images: list[Any] = []
        for message in messages:
            self._add(message)

    def _add(self, message: Mapping[str, Any]) -> None:
        role, text = message.get("role"), self._text(message.get("content", ""))
        expected = "user" if self.question is None else "assistant"
        if role != expected:
            raise UserError(
                f"the roles of a conversation alternate, user first; found {role!r}, not {expected!r}"
            )
        if self.question is None:
            self.question = text
        else:
            self.turns.append((self.question, text))
            self.question = None

    def _text(self, content: str | Messages) -> str:
        if isinstance(content, str):
            return content
        texts = []
        for part in content:
            if part["type"] == "text":
                texts.append(part["text"])
            elif part["type"] in ("image", "image_url"):
                self.images.append(_image_of(part))
            else:
                raise UserError(f"a conversation holds text and images, not {part['type']!r}")
        return "\n".join(texts)

    def prompt(self, form: PromptFormat, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        """The tokens, without the image's."""
        if self.question is None:
            return form.conversation(tokenizer, self.turns)
        return form.question(tokenizer, self.question, self.turns)


class Rendered(str):
    """The text of a conversation, in the words of its prompt format; no more are to be put around it."""

    conversation: Conversation


class LocalignVLMProcessor(ProcessorMixin):
    """Questions or conversations, each with one image or none, to a batch padded on the left.

    An image's tokens come after the beginning-of-sequence token, wherever the text has ``<image>``, which is
    removed. Special tokens written in a question are ordinary text.

    Args:
        tokenizer: Knows the image token and a padding token; see
            :func:`localign.vlm.data.vocabulary.add_special_tokens`.
        image_size: The vision tower's, rows and columns.
        num_image_tokens: Tokens per image.
        prompt_format: Words around questions and answers, by name.
        resize: ``naive``, ``letterbox`` or ``crop``.
        mean: RGB, 0..1, that letterbox pads with.
        chat_template: Not used; the prompt format may use the tokenizer's.

    Raises:
        UserError: The tokenizer lacks a token, or there is no such prompt format or way to resize.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_size: Sequence[int] = (224, 224),
        num_image_tokens: int = 256,
        prompt_format: str = "in-out",
        resize: str = "naive",
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        chat_template: str | None = None,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template)
        if IMAGE_MARK not in tokenizer.get_vocab() or tokenizer.pad_token_id is None:
            raise UserError(f"the tokenizer lacks {IMAGE_MARK} or a padding token")
        self.image_size = [int(side) for side in image_size]
        self.num_image_tokens = num_image_tokens
        self.prompt_format = prompt_format
        self.resize = resize
        self.mean = [float(m) for m in mean]
        self.image_token_id = image_token_id(tokenizer)
        self.form()
        self.image_transform()

    @classmethod
    def for_model(cls, model: LocalignVLM, tokenizer: PreTrainedTokenizerBase) -> LocalignVLMProcessor:
        """The processor that goes with a model."""
        return cls(
            tokenizer,
            image_size=model.vision.image_size,
            num_image_tokens=model.vision.num_tokens,
            prompt_format=model.config.prompt_format,
            resize=model.config.resize,
            mean=model.vision.configs[0].mean,
        )

    @property
    def model_input_names(self) -> list[str]:
        """What a batch may hold."""
        return ["input_ids", "attention_mask", "pixel_values"]

    def form(self) -> PromptFormat:
        """The prompt format."""
        return prompt_format(self.prompt_format)

    def image_transform(self) -> ImageTransform:
        """From an image to one of ``pixel_values``."""
        return ImageTransform(self.image_size, self.resize, self.mean)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str = "pt",
        padding: bool = True,
    ) -> BatchFeature:
        """Questions and their images.

        Args:
            images: One image for one question; or a list with an image, or None, for each question. An image
                is a PIL image, a path or a URL.
            text: A question or several, without the prompt format's words; or what
                :meth:`apply_chat_template` gave.
            return_tensors: ``pt``; nothing else.
            padding: Always done.

        Returns:
            ``input_ids`` and ``attention_mask``, int64 ``(questions, tokens)``, padded on the left; and
            ``pixel_values``, uint8 ``(images, 3, rows, columns)``, if there is an image.

        Raises:
            UserError: The numbers of questions and images differ, or an image cannot be read.
        """
        if text is None:
            raise UserError("an image needs a question")
        texts = [text] if isinstance(text, str) else list(text)
        parts = []
        for question, its_images in zip(texts, _per_text(images, len(texts)), strict=True):
            if isinstance(question, Rendered):
                conversation = question.conversation
            else:
                conversation = Conversation([{"role": "user", "content": question}])
            parts.append((conversation, its_images or conversation.images))
        return self._batch(parts, return_tensors)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Messages | Sequence[Messages],
        chat_template: str | None = None,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str = "pt",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Conversations in transformers' form, in the words of the model's prompt format.

        Args:
            conversation: One, or several. Roles alternate, the user first; there is no system message.
                Contents are text, or lists of ``{"type": "text", "text": ...}`` and at most one
                ``{"type": "image", "image" or "path" or "url": ...}``.
            chat_template: None; the prompt format decides.
            tokenize: Give a batch instead of text.
            return_dict: Of a batch, give everything instead of ``input_ids``.
            return_tensors: ``pt``.
            add_generation_prompt: Always done after a question.
            continue_final_message: Not possible.
            processor_kwargs: Further arguments of the processor's call, all of which are defaults.

        Returns:
            With ``tokenize`` a batch as of calling the processor, or its ``input_ids``; else text, which the
            processor takes (with the images) without putting words around it again.

        Raises:
            UserError: A conversation is not of this form.
        """
        if chat_template is not None or continue_final_message:
            raise UserError(
                "chat_template and continue_final_message do not go with a model's own prompt format"
            )
        single = isinstance(conversation[0], Mapping)
        many: Any = [conversation] if single else conversation
        conversations = [Conversation(messages) for messages in many]
        if tokenize:
            batch = self._batch([(c, c.images) for c in conversations], return_tensors)
            return batch if return_dict else batch["input_ids"]
        texts = [self._rendered(c) for c in conversations]
        return texts[0] if single else texts

    def _rendered(self, conversation: Conversation) -> Rendered:
        if conversation.question is None:
            raise UserError(
                "a conversation is given as text up to a question; tokenize one that ends otherwise"
            )
        text = self.form().text(self.tokenizer, conversation.question, conversation.turns)
        rendered = Rendered(text)
        rendered.conversation = conversation
        return rendered

    def _batch(self, parts: Sequence[tuple[Conversation, list[Any]]], return_tensors: str) -> BatchFeature:
        if return_tensors != "pt":
            raise UserError(f"batches are PyTorch tensors (return_tensors='pt'), not {return_tensors!r}")
        form, transform = self.form(), self.image_transform()
        rows, pixels = [], []
        for number, (conversation, images) in enumerate(parts):
            ids, _, position = conversation.prompt(form, self.tokenizer)
            if len(images) > 1:
                raise UserError(f"conversation {number} has {len(images)} images; one at most")
            if images:
                pixels.append(transform(open_image(images[0])))
                ids = [*ids[:position], *[self.image_token_id] * self.num_image_tokens, *ids[position:]]
            rows.append(ids)
        data = _left_padded(rows, int(self.tokenizer.pad_token_id))
        if pixels:
            data["pixel_values"] = torch.stack(pixels)
        return BatchFeature(data)


def _left_padded(rows: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, Tensor]:
    longest = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for number, row in enumerate(rows):
        input_ids[number, longest - len(row) :] = torch.tensor(row)
        attention_mask[number, longest - len(row) :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _per_text(images: Any, texts: int) -> list[list[Any]]:
    """For each text, its images."""
    if images is None:
        return [[] for _ in range(texts)]
    listed = list(images) if isinstance(images, (list, tuple)) else [images]
    if len(listed) != texts:
        raise UserError(
            f"{texts} questions and {len(listed)} images; give None for a question without an image"
        )
    each = [image if isinstance(image, (list, tuple)) else [image] for image in listed]
    return [[image for image in group if image is not None] for group in each]


def _image_of(part: Mapping[str, Any]) -> Any:
    """Where a message's image is; None where it comes beside the text."""
    for name in ("image", "path", "url", "image_url"):
        if part.get(name) is not None:
            value = part[name]
            return value["url"] if isinstance(value, Mapping) else value
    return None
