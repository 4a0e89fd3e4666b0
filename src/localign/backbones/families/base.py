"""The interface of a family of vision transformers that transformers and timm both implement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from localign.backbones.families.names import NameMap
from localign.backbones.weights import StateDict
from localign.errors import UserError
from localign.portable.native_localign_vlm import PositionInterpolation

Config = Mapping[str, Any]
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
}


class TransformersFamily(ABC):
    """One family: its names in, its names out."""

    model_types: ClassVar[tuple[str, ...]]
    """``model_type`` in ``config.json``, of the vision model itself."""
    wrappers: ClassVar[tuple[str, ...]] = ()
    """``model_type`` of models whose ``vision_config`` describes the vision model."""
    anchor: ClassVar[str]
    """A tensor that only this vision model has. The text before the anchor is the prefix of all its names."""
    mean: ClassVar[tuple[float, float, float]] = (0.5, 0.5, 0.5)
    std: ClassVar[tuple[float, float, float]] = (0.5, 0.5, 0.5)
    position_interpolation: ClassVar[PositionInterpolation] = "bicubic"
    """How transformers resamples positions to another grid."""
    square: ClassVar[bool] = False
    """Whether transformers' class takes square images only."""
    ignored: ClassVar[tuple[str, ...]] = ()
    """Prefixes of tensors that compute no patch token: position numbers, mask tokens, poolers."""

    @abstractmethod
    def architecture(self, config: Config) -> tuple[str, dict[str, Any]]:
        """timm's name and constructor arguments, JSON-able. ``norm_eps`` sets the epsilon of every norm.

        Raises:
            UserError: The config has a setting that timm's model cannot express; the line names it.
        """

    @abstractmethod
    def names(self, config: Config) -> NameMap:
        """The parameter names."""

    @abstractmethod
    def config_of(self, vit: Any) -> dict[str, Any]:
        """The ``config.json`` of a timm model of this family.

        Raises:
            UserError: The model has a part that the family lacks; the line names it.
        """

    def interpolation(self, config: Config) -> PositionInterpolation:
        """How transformers resamples the positions of a model with this config."""
        return self.position_interpolation

    def to_timm(self, state: StateDict, config: Config, shapes: Mapping[str, torch.Size]) -> StateDict:
        """Tensors with timm's names; the parts without a role in patch tokens are dropped."""
        kept = {k: v for k, v in state.items() if not k.startswith(self.ignored)}
        return self.names(config).to_timm(kept, shapes, depth_of(config))

    def to_transformers(self, state: StateDict, config: Config) -> StateDict:
        """Tensors with transformers' names."""
        return self.names(config).to_transformers(state, self.shapes(config), depth_of(config))

    def shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        """Shapes that differ from timm's, by transformers' name."""
        return {}


def depth_of(config: Config) -> int:
    return number(config, "num_hidden_layers")


def number(config: Config, key: str, default: int | None = None) -> int:
    """A positive whole number of a config.

    Raises:
        UserError: The key is missing or has another value.
    """
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= 2**20:
        raise UserError(f"{key} in config.json is {value!r:.60}, not a positive number")
    return value


def side(config: Config, key: str, default: int) -> int | tuple[int, int]:
    """An image or patch size: a number, or ``[height, width]``."""
    value = config.get(key, default)
    if isinstance(value, list) and len(value) == 2:
        return number({key: value[0]}, key), number({key: value[1]}, key)
    return number(config, key, default)


def decimal(config: Config, key: str, default: float) -> float:
    """A finite number of a config, above 0.

    Raises:
        UserError: The key has another value.
    """
    value = config.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e6:
        raise UserError(f"{key} in config.json is {value!r:.60}, not a positive number")
    return float(value)


def activation(config: Config, default: str) -> str:
    """timm's name of the activation.

    Raises:
        UserError: timm has no such activation.
    """
    name = config.get("hidden_act", default)
    if name not in _ACTIVATIONS:
        raise UserError(f"hidden_act in config.json is {name!r:.60}; known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def common_arguments(config: Config, *, act: str, eps: float) -> dict[str, Any]:
    """timm's arguments that all families share."""
    width, hidden = number(config, "hidden_size"), config.get("intermediate_size")
    ratio = number(config, "intermediate_size") / width if hidden is not None else config.get("mlp_ratio", 4)
    return {
        "img_size": side(config, "image_size", 224),
        "patch_size": side(config, "patch_size", 16),
        "embed_dim": width,
        "depth": depth_of(config),
        "num_heads": number(config, "num_attention_heads"),
        "mlp_ratio": exact_ratio(ratio, width),
        "act_layer": activation(config, act),
        "norm_eps": decimal(config, "layer_norm_eps", eps),
    }


def exact_ratio(ratio: float, width: int) -> float:
    """A ratio from which timm's ``int(width * ratio)`` recovers the hidden width."""
    hidden = round(ratio * width)
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width


def activation_name(module: Any) -> str:
    """transformers' name of an activation module.

    Raises:
        UserError: transformers has no such activation.
    """
    names = {"GELU": "gelu", "QuickGELU": "quick_gelu", "GELUTanh": "gelu_pytorch_tanh", "SiLU": "silu"}
    name = names.get(type(module).__name__)
    if name == "gelu" and getattr(module, "approximate", "none") == "tanh":
        return "gelu_pytorch_tanh"
    if name is None:
        raise UserError(f"transformers has no activation {type(module).__name__}")
    return name


def timm_activation(module: Any) -> str:
    """timm's name of an activation module.

    Raises:
        UserError: It is none of those that transformers and timm share.
    """
    return _ACTIVATIONS[activation_name(module)]


def common_config(vit: Any, model_type: str, architecture: str) -> dict[str, Any]:
    """The part of ``config.json`` that all families share."""
    height, width = vit.patch_embed.img_size
    block = vit.blocks[0]
    return {
        "model_type": model_type,
        "architectures": [architecture],
        "hidden_size": int(vit.embed_dim),
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": int(block.attn.num_heads),
        "image_size": int(height) if height == width else [int(height), int(width)],
        "patch_size": int(vit.patch_embed.patch_size[0]),
        "num_channels": 3,
        "layer_norm_eps": float(block.norm1.eps),
        "dtype": "float32",
    }
