"""The transformers configuration of a vision-language model that localign trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, LlamaConfig, PretrainedConfig


class LocalignVLMConfig(PretrainedConfig):
    """The configuration of a vision tower, an adapter and a causal language model.

    Args:
        text_config: The language model's config, or its ``to_dict()``.
        towers: One description per backbone: timm architecture and arguments, pixel statistics, layer, norm.
        adapter: The adapter's kind and sizes.
        image_token_id: Id of the placeholder token whose embeddings the adapter's output replaces.
        prompt_format: Name of the prompt format: ``in-out``, ``vicuna`` or ``chat-template``.
        resize: How an image is brought to the towers' input size: ``naive``, ``letterbox`` or ``crop``.
        max_patches: Most patches of an image that keeps its aspect ratio; None if all images have one size.
    """

    model_type = "localign_vlm"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        towers: Sequence[dict[str, Any]] = (),
        adapter: dict[str, Any] | None = None,
        image_token_id: int | None = None,
        prompt_format: str = "in-out",
        resize: str = "naive",
        max_patches: int | None = None,
        **kwargs: Any,
    ) -> None:
        if text_config is None:
            text_config = LlamaConfig()
        elif isinstance(text_config, dict):
            fields = {k: v for k, v in text_config.items() if k != "model_type"}
            text_config = AutoConfig.for_model(text_config.get("model_type", "llama"), **fields)
        self.text_config = text_config
        self.towers = list(towers)
        self.adapter = adapter
        self.image_token_id = image_token_id
        self.prompt_format = prompt_format
        self.resize = resize
        self.max_patches = max_patches
        super().__init__(**kwargs)
