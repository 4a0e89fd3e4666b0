"""The processor: from questions and images to model inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from localign.backbones.native import padded_patches
from localign.data.transforms import NativeView
from localign.errors import UserError
from localign.portable import VLM_PROCESSOR, add_entries
from localign.vlm.data.dialects import IMAGE_MARK
from localign.vlm.data.images import ImageTransform, open_image
from localign.vlm.data.prompts import Prompt, PromptFormat, prompt_format
from localign.vlm.data.vocabulary import image_token_id
from localign.vlm.model.modeling import LocalignVLM

Messages = Sequence[Mapping[str, Any]]
"""One conversation: ``{"role": "user" or "assistant", "content": text or a list of parts}``."""


class Conversation:
    """A conversation parsed from messages in transformers' format: turns, images, perhaps an open last question.

    Raises:
        UserError: The messages are not in this format.
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
                f"roles must alternate, starting with user: expected {expected!r}, found {role!r}"
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
                raise UserError(f"a message can contain text and images, not {part['type']!r}")
        return "\n".join(texts)

    def prompt(self, prompt_format: PromptFormat, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        """The tokenised text, without image tokens."""
        if self.question is None:
            return prompt_format.conversation(tokenizer, self.turns)
        return prompt_format.question(tokenizer, self.question, self.turns)


class RenderedPrompt(str):
    """The text of a conversation in its prompt format; the processor does not wrap it again."""

    conversation: Conversation


class LocalignVLMProcessor(ProcessorMixin):
    """Turns questions or conversations, each with at most one image, into a left-padded batch.

    An image's tokens follow the beginning-of-sequence token; ``<image>`` in the text is removed, wherever it is.
    Special tokens written in a question are ordinary text.

    Args:
        tokenizer: Has the image token and a padding token; see
            :func:`localign.vlm.data.vocabulary.add_special_tokens`.
        image_size: Rows and columns of the vision tower's input, pixels.
        num_image_tokens: Tokens per image; of the largest if images have several sizes.
        prompt_format: Name of the prompt format.
        resize: ``naive``, ``letterbox`` or ``crop``.
        mean: RGB fill colour of letterbox padding, 0..1.
        chat_template: Ignored; the prompt format may use the tokenizer's.
        interpolation: Resampling filter of images.
        max_patches: Most patches of an image that keeps its aspect ratio; None if all images have ``image_size``.
        patch_size: Patch height and width, pixels; matters with ``max_patches`` only.

    Raises:
        UserError: The tokenizer lacks a token, or the prompt format or the way to resize is unknown.
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
        interpolation: str = "bicubic",
        max_patches: int | None = None,
        patch_size: Sequence[int] = (16, 16),
    ) -> None:
        cast(Any, super()).__init__(tokenizer, chat_template=chat_template)  # untyped in transformers
        if IMAGE_MARK not in tokenizer.get_vocab() or tokenizer.pad_token_id is None:
            raise UserError(f"the tokenizer lacks {IMAGE_MARK} or a padding token")
        self.image_size = [int(side) for side in image_size]
        self.num_image_tokens = num_image_tokens
        self.prompt_format = prompt_format
        self.resize = resize
        self.mean = [float(m) for m in mean]
        self.interpolation = interpolation
        self.max_patches = max_patches
        self.patch_size = [int(side) for side in patch_size]
        self.image_token_id = image_token_id(tokenizer)
        self._format()
        self.image_transform()

    @classmethod
    def for_model(cls, model: LocalignVLM, tokenizer: PreTrainedTokenizerBase) -> LocalignVLMProcessor:
        """The processor that goes with a model."""
        return cls(
            tokenizer,
            image_size=model.vision.image_size,
            num_image_tokens=model.num_image_tokens,
            prompt_format=model.config.prompt_format,
            resize=model.config.resize,
            mean=model.vision.configs[0].mean,
            interpolation=model.vision.configs[0].interpolation or "bicubic",
            max_patches=model.config.max_patches,
            patch_size=model.vision.backbones[0].patch_size,
        )

    @property
    def model_input_names(self) -> list[str]:
        """Keys that a batch can have."""
        return ["input_ids", "attention_mask", "pixel_values", "image_grids"]

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """As in transformers, and name the class that a process without localign uses."""
        written = super().save_pretrained(save_directory, push_to_hub, **kwargs)
        add_entries(Path(save_directory) / "processor_config.json", {"auto_map": VLM_PROCESSOR})
        return written

    def _format(self) -> PromptFormat:
        return prompt_format(self.prompt_format)

    def image_transform(self) -> ImageTransform | NativeView:
        """The transform from an image to an entry of ``pixel_values``, or to an image of whole patches."""
        if self.max_patches is not None:
            height, width = self.patch_size
            return NativeView((height, width), self.max_patches, self.interpolation)
        return ImageTransform(self.image_size, self.resize, self.mean, self.interpolation)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str = "pt",
        padding: bool = True,
    ) -> BatchFeature:
        """Make a batch of questions and their images.

        Args:
            images: One image for one question; or a list with an image or None per question. An image is a PIL
                image, a path or a URL.
            text: One or several questions, without the prompt format around them; or texts that
                :meth:`apply_chat_template` returned.
            return_tensors: Must be ``pt``.
            padding: Ignored; batches are always padded.

        Returns:
            ``input_ids`` and ``attention_mask``, int64 ``(questions, tokens)``, padded on the left; and
            ``pixel_values``, uint8 ``(images, 3, rows, columns)``, if there is an image. With ``max_patches``, they are
            patches, uint8 ``(images, longest, 3 * patch height * patch width)``, and ``image_grids``, int64 ``(images,
            2)``, are their rows and columns.

        Raises:
            UserError: The numbers of questions and images differ, or an image cannot be read.
        """
        if text is None:
            raise UserError("an image needs a question")
        texts = [text] if isinstance(text, str) else list(text)
        parts = []
        for question, question_images in zip(texts, _images_per_text(images, len(texts)), strict=True):
            if isinstance(question, RenderedPrompt):
                conversation = question.conversation
            else:
                conversation = Conversation([{"role": "user", "content": question}])
            parts.append((conversation, question_images or conversation.images))
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
        """Apply the model's prompt format to conversations in transformers' format.

        Args:
            conversation: One conversation, or several. Roles alternate, starting with the user; there is no system
                message. Contents are text, or lists of ``{"type": "text", "text": ...}`` and at most one
                ``{"type": "image", "image" or "path" or "url": ...}``.
            chat_template: Must be None; the prompt format decides.
            tokenize: Return a batch instead of text.
            return_dict: With ``tokenize``, return the whole batch instead of its ``input_ids``.
            return_tensors: Must be ``pt``.
            add_generation_prompt: Ignored; a final question is always followed by the start of an answer.
            continue_final_message: Must be False.
            processor_kwargs: Ignored.

        Returns:
            With ``tokenize``, a batch as from calling the processor, or its ``input_ids``; else text, which the
            processor accepts, with the images, and does not wrap again.

        Raises:
            UserError: A conversation is not in this format.
        """
        if chat_template is not None or continue_final_message:
            raise UserError(
                "the model has its own prompt format: leave out chat_template and continue_final_message"
            )
        single = isinstance(conversation[0], Mapping)
        many: Any = [conversation] if single else conversation
        conversations = [Conversation(messages) for messages in many]
        if tokenize:
            batch = self._batch([(c, c.images) for c in conversations], return_tensors)
            return batch if return_dict else batch["input_ids"]
        texts = [self._render(c) for c in conversations]
        return texts[0] if single else texts

    def _render(self, conversation: Conversation) -> RenderedPrompt:
        if conversation.question is None:
            raise UserError(
                "only a conversation that ends with a question has a text form; use tokenize=True"
            )
        text = self._format().text(self.tokenizer, conversation.question, conversation.turns)
        rendered = RenderedPrompt(text)
        rendered.conversation = conversation
        return rendered

    def _batch(self, parts: Sequence[tuple[Conversation, list[Any]]], return_tensors: str) -> BatchFeature:
        if return_tensors != "pt":
            raise UserError(f"batches are PyTorch tensors (return_tensors='pt'), not {return_tensors!r}")
        chosen_format, transform = self._format(), self.image_transform()
        rows, pixels = [], []
        for number, (conversation, images) in enumerate(parts):
            ids, _, position = conversation.prompt(chosen_format, self.tokenizer)
            if len(images) > 1:
                raise UserError(f"conversation {number} has {len(images)} images; at most one is allowed")
            if images:
                pixels.append(transform(open_image(images[0])))
                tokens = self._image_tokens(pixels[-1])
                ids = [*ids[:position], *[self.image_token_id] * tokens, *ids[position:]]
            rows.append(ids)
        data = _pad_left(rows, int(self.tokenizer.pad_token_id))
        if pixels and isinstance(transform, NativeView):
            data["pixel_values"], grids = padded_patches(pixels, transform.patch)
            data["image_grids"] = torch.tensor(grids)
        elif pixels:
            data["pixel_values"] = torch.stack(pixels)
        return BatchFeature(data)

    def _image_tokens(self, pixels: Tensor) -> int:
        if self.max_patches is None:
            return self.num_image_tokens
        return self.num_image_tokens - self.max_patches + pixels[0].numel() // math.prod(self.patch_size)


def _pad_left(rows: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, Tensor]:
    longest = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for number, row in enumerate(rows):
        input_ids[number, longest - len(row) :] = torch.tensor(row)
        attention_mask[number, longest - len(row) :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _images_per_text(images: Any, texts: int) -> list[list[Any]]:
    if images is None:
        return [[] for _ in range(texts)]
    listed = list(images) if isinstance(images, (list, tuple)) else [images]
    if len(listed) != texts:
        raise UserError(
            f"{texts} questions but {len(listed)} images; give None for a question without an image"
        )
    groups = [image if isinstance(image, (list, tuple)) else [image] for image in listed]
    return [[image for image in group if image is not None] for group in groups]


def _image_of(part: Mapping[str, Any]) -> Any:
    """The image of a message's part, or its path or URL; None if the caller passes the image separately."""
    for name in ("image", "path", "url", "image_url"):
        if part.get(name) is not None:
            value = part[name]
            return value["url"] if isinstance(value, Mapping) else value
    return None
