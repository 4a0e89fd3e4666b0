"""The parts that the transformers configuration of a vision-language model describes."""

from __future__ import annotations

from localign.errors import UserError
from localign.portable.configuration_localign_vlm import LocalignVLMConfig
from localign.vlm.model.adapters import AdapterConfig
from localign.vlm.model.vision import TowerConfig

__all__ = ["LocalignVLMConfig", "adapter_config", "tower_configs"]


def tower_configs(config: LocalignVLMConfig) -> list[TowerConfig]:
    """``towers``, parsed. Raises UserError if they are damaged."""
    try:
        return [TowerConfig(**tower) for tower in config.towers]
    except TypeError as error:
        raise UserError(f"the model's config describes no vision tower: {error}") from None


def adapter_config(config: LocalignVLMConfig) -> AdapterConfig:
    """``adapter``, parsed. Raises UserError if it is damaged."""
    try:
        return AdapterConfig(**(config.adapter or {}))
    except TypeError as error:
        raise UserError(f"the model's config describes no adapter: {error}") from None
