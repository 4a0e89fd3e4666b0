"""The transformers configuration of a vision-language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from localign.errors import UserError
from localign.vlm.model.adapters import AdapterConfig
from localign.vlm.model.vision import TowerConfig


class LocalignVLMConfig(PretrainedConfig):
    """The configuration of :class:`~localign.vlm.model.modeling.LocalignVLM`.

    Args:
        text_config: The language model's config, or its ``to_dict()``.
        towers: One :class:`~localign.vlm.model.vision.TowerConfig` per backbone, as a dict.
        adapter: The :class:`~localign.vlm.model.adapters.AdapterConfig`, as a dict.
        image_token_id: Id of the placeholder token whose embeddings the adapter's output replaces.
        prompt_format: Name of the prompt format; see :mod:`localign.vlm.data.prompts`.
        resize: How an image is brought to the towers' input size: ``naive``, ``letterbox`` or ``crop``.
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
        super().__init__(**kwargs)

    def tower_configs(self) -> list[TowerConfig]:
        """``towers``, parsed. Raises UserError if they are damaged."""
        try:
            return [TowerConfig(**tower) for tower in self.towers]
        except TypeError as error:
            raise UserError(f"the model's config describes no vision tower: {error}") from None

    def adapter_config(self) -> AdapterConfig:
        """``adapter``, parsed. Raises UserError if it is damaged."""
        try:
            return AdapterConfig(**(self.adapter or {}))
        except TypeError as error:
            raise UserError(f"the model's config describes no adapter: {error}") from None
