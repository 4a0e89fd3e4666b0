"""The processor of a vision-language model that localign trained, for ``trust_remote_code=True``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.transforms import CenterCropOrPad, ResizeKeepRatio
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import make_flat_list_of_images

from .native_localign_vlm import native_grid, padded_patches

IMAGE_TOKEN = "<image>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
# The image tokens follow the beginning-of-sequence token, wherever the image stands in the messages.
MESSAGES = (
    "{%- set ns = namespace(plain=[], images='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{%- set text = message['content'] -%}"
    "{%- else -%}"
    "{%- set texts = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') -%}"
    "{%- set text = texts | join('\\n') -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] in ['image', 'image_url'] -%}"
    "{%- set ns.images = ns.images + '<image>' -%}"
    "{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{%- set text = text | replace('<image>', '') | trim -%}"
    "{%- set ns.plain = ns.plain + [{'role': message['role'], 'content': text}] -%}"
    "{%- endfor -%}"
)
TURNS = (
    "{{- bos + ns.images + opening -}}"
    "{%- for message in ns.plain -%}"
    "{%- if message['role'] == 'user' -%}{{- before + message['content'] + after -}}"
    "{%- else -%}{{- (message['content'] or ' ') + eos -}}{%- endif -%}"
    "{%- endfor -%}"
)
WRAPPERS = {"in-out": ("", "In: ", "\nOut:"), "vicuna": (SYSTEM, "USER: ", " ASSISTANT:")}


class LocalignImageProcessor(ImageProcessingMixin):
    """Brings images to the vision tower's input size; the tower normalises them.

    Args:
        image_size: Rows and columns, pixels.
        resize: ``naive`` stretches, ``letterbox`` pads to the target's aspect ratio, ``crop`` crops the centre.
        mean: RGB fill colour of letterbox padding, 0..1.
        interpolation: Resampling filter, by Pillow's name.
        max_patches: Most patches of an image that keeps its aspect ratio; None if all images have ``image_size``.
        patch_size: Patch height and width, pixels; matters with ``max_patches`` only.
    """

    model_input_names = ["pixel_values", "image_grids"]  # noqa: RUF012

    def __init__(
        self,
        image_size: Sequence[int],
        resize: str,
        mean: Sequence[float],
        interpolation: str = "bicubic",
        max_patches: int | None = None,
        patch_size: Sequence[int] = (16, 16),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        height, width = patch_size
        self.patch_size, self.max_patches = (int(height), int(width)), max_patches
        # Servers take it for the size with the most tokens.
        rows, columns = image_size if max_patches is None else (height, max_patches * width)
        self.size = {"height": int(rows), "width": int(columns)}
        self.resize = resize
        self.fill = tuple(int(255 * m) for m in mean)
        self.interpolation = interpolation

    def __call__(self, images: Any, **_: Any) -> BatchFeature:
        """Images to ``pixel_values``, uint8 ``(images, 3, rows, columns)``.

        With ``max_patches``: to patches, uint8 ``(images, max_patches, 3 * patch height * patch width)``, and
        ``image_grids``, int64 ``(images, 2)``, their rows and columns.
        """
        flat: Any = make_flat_list_of_images(images)
        pixels = [self._pixels(image) for image in flat]
        if self.max_patches is None:
            return BatchFeature({"pixel_values": torch.stack(pixels)})
        patches, grids = padded_patches(pixels, self.patch_size, self.max_patches)
        return BatchFeature({"pixel_values": patches, "image_grids": torch.tensor(grids)})

    def _pixels(self, image: Any) -> torch.Tensor:
        if not isinstance(image, Image.Image):
            array = np.asarray(image)
            image = Image.fromarray(array if array.shape[-1] in (1, 3, 4) else array.transpose(1, 2, 0))
        resized = self._resized(_upright_rgb(image))
        return torch.from_numpy(np.array(resized, dtype=np.uint8).transpose(2, 0, 1).copy())

    def _resized(self, image: Image.Image) -> Image.Image:
        if self.max_patches is not None:
            rows, columns = native_grid(image.height, image.width, self.patch_size, self.max_patches)
            size = (columns * self.patch_size[1], rows * self.patch_size[0])
            return image.resize(size, Image.Resampling[self.interpolation.upper()])
        rows, columns = self.size["height"], self.size["width"]
        if self.resize == "crop":
            covering = ResizeKeepRatio((rows, columns), interpolation=self.interpolation)  # type: ignore[no-untyped-call]
            cropped: Image.Image = CenterCropOrPad([rows, columns], padding_mode="reflect")(covering(image))
            return cropped
        if self.resize == "letterbox":
            width = max(image.width, round(image.height * columns / rows))
            height = max(image.height, round(image.width * rows / columns))
            padded = Image.new("RGB", (width, height), self.fill)
            padded.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
            image = padded
        return image.resize((columns, rows), Image.Resampling[self.interpolation.upper()])


def _upright_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class LocalignProcessor(ProcessorMixin):
    """Turns text and images into the model's inputs.

    ``apply_chat_template`` writes the prompts that the model was trained with. In text that comes from elsewhere every
    image is one ``<image>``.

    Args:
        tokenizer: The model's tokenizer.
        image_size: Rows and columns of the vision tower's input, pixels.
        num_image_tokens: Tokens per image; of the largest if images have several sizes.
        prompt_format: ``in-out``, ``vicuna`` or ``chat-template``.
        resize: ``naive``, ``letterbox`` or ``crop``.
        mean: RGB fill colour of letterbox padding, 0..1.
        chat_template: Ignored; it is the tokenizer's own, without images.
        interpolation: Resampling filter of images, by Pillow's name.
        max_patches: Most patches of an image that keeps its aspect ratio; None if all images have ``image_size``.
        patch_size: Patch height and width, pixels; matters with ``max_patches`` only.
    """

    def __init__(
        self,
        tokenizer: Any,
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
        super().__init__(tokenizer, chat_template=prompt_template(prompt_format, tokenizer))  # type: ignore[no-untyped-call]
        self.image_size, self.num_image_tokens = list(image_size), num_image_tokens
        self.prompt_format, self.resize, self.mean = prompt_format, resize, list(mean)
        self.interpolation = interpolation
        self.max_patches, self.patch_size = max_patches, list(patch_size)

    @property
    def image_processor(self) -> LocalignImageProcessor:
        """Brings images to the vision tower's input size, or to sizes of their own."""
        sizes = self.max_patches, self.patch_size
        return LocalignImageProcessor(self.image_size, self.resize, self.mean, self.interpolation, *sizes)

    @property
    def image_token(self) -> str:
        """The placeholder of an image in a text, and each of its tokens."""
        return IMAGE_TOKEN

    @property
    def image_token_id(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "image_grids"]

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The tokens of one image."""
        if self.max_patches is None:
            return IMAGE_TOKEN * self.num_image_tokens
        rows, columns = image_inputs["image_grids"][image_idx].tolist()
        return IMAGE_TOKEN * self._tokens(rows * columns)

    def _tokens(self, patches: int) -> int:
        assert self.max_patches is not None
        return self.num_image_tokens - self.max_patches + patches

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> dict[str, list[int]]:
        """What servers ask: the numbers of tokens and of rows of ``pixel_values`` of images of these sizes."""
        sizes = list(image_sizes or ())
        tokens = [self.num_image_tokens] * len(sizes)
        if self.max_patches is not None:
            patch = self.image_processor.patch_size
            grids = [native_grid(height, width, patch, self.max_patches) for height, width in sizes]
            tokens = [self._tokens(rows * columns) for rows, columns in grids]
        return {"num_image_tokens": tokens, "num_image_patches": [1] * len(sizes)}

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the template writes all special tokens that training had."""
        given = kwargs.pop("processor_kwargs", None) or {}
        kwargs["processor_kwargs"] = {"add_special_tokens": False} | given
        return super().apply_chat_template(conversation, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """As in transformers. The tokenizer keeps its own chat template; ours is made anew on loading."""
        own, self.chat_template = self.chat_template, None
        try:
            return super().save_pretrained(save_directory, push_to_hub, **kwargs)
        finally:
            self.chat_template = own


def prompt_template(prompt_format: str, tokenizer: Any) -> str:
    """The Jinja template of a prompt format."""
    begins = tokenizer("", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]
    constants = {"bos": tokenizer.bos_token if begins else "", "eos": tokenizer.eos_token or ""}
    if prompt_format == "chat-template":
        # The date must not change the prompt, and an answer starts without thoughts, as in training.
        constants |= {"date_string": "26 Jul 2024"}
        template: str = (
            _constants(constants) + "{%- set enable_thinking = false -%}" + MESSAGES
            + "{%- set messages = ns.plain -%}{% set rendered %}" + tokenizer.chat_template + "{% endset %}"
            + "{%- set rest = rendered[bos | length:] if rendered[:bos | length] == bos else rendered -%}"
            + "{{- rendered[: rendered | length - rest | length] + ns.images + rest -}}"
        )  # fmt: skip
        return template
    constants["opening"], constants["before"], constants["after"] = WRAPPERS[prompt_format]
    return _constants(constants) + MESSAGES + TURNS


def _constants(values: dict[str, str]) -> str:
    return "".join(f"{{%- set {name} = {json.dumps(value)} -%}}" for name, value in values.items())
