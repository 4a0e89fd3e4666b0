"""SigLIP's and SigLIP 2's image towers (SiglipVisionModel, SiglipModel, and Siglip2 on its square grid).

There is no class token; an attention head pools the patches. Hidden states are taken before the last norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from localign.backbones.families.base import (
    Config,
    TransformersFamily,
    activation_name,
    common_arguments,
    common_config,
    number,
)
from localign.backbones.families.clip import encoder_names
from localign.backbones.families.names import NameMap, linear
from localign.backbones.weights import StateDict
from localign.errors import UserError
from localign.portable.native_localign_vlm import PositionInterpolation

_PATCH = "embeddings.patch_embedding.weight"


class SigLIP(TransformersFamily):
    """SigLIP: no prefix tokens, attention pooling."""

    model_types = ("siglip_vision_model",)
    wrappers = ("siglip",)
    square = True
    position_interpolation: ClassVar[PositionInterpolation] = "bicubic-aliased"
    anchor = "embeddings.patch_embedding.bias"
    ignored = ("embeddings.position_ids",)

    def architecture(self, config: Config) -> tuple[str, dict[str, Any]]:
        config = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
                  "intermediate_size": 3072, **config}  # fmt: skip
        arguments = common_arguments(config, act="gelu_pytorch_tanh", eps=1e-6)
        if not config.get("vision_use_head", True):
            arguments["global_pool"] = ""
        return "vit_base_patch16_siglip_224", arguments

    def names(self, config: Config) -> NameMap:
        plain, joined = encoder_names("post_layernorm")
        plain |= {
            "patch_embed.proj.bias": self.anchor,
            "attn_pool.latent": "head.probe",
            **linear("attn_pool.proj", "head.attention.out_proj"),
            **linear("attn_pool.norm", "head.layernorm"),
            **linear("attn_pool.mlp.fc1", "head.mlp.fc1"),
            **linear("attn_pool.mlp.fc2", "head.mlp.fc2"),
        }
        for part in ("weight", "bias"):  # split off by _split_pooling
            plain |= {f"attn_pool.{layer}.{part}": f"head.attention.{layer}.{part}" for layer in ("q", "kv")}
        return NameMap(plain, joined)

    def to_timm(self, state: StateDict, config: Config, shapes: Mapping[str, torch.Size]) -> StateDict:
        if not config.get("vision_use_head", True):
            state = {k: v for k, v in state.items() if not k.startswith("head.")}
        return super().to_timm(_split_pooling(state), config, shapes)

    def to_transformers(self, state: StateDict, config: Config) -> StateDict:
        return _joined_pooling(super().to_transformers(state, config))

    def config_of(self, vit: Any) -> dict[str, Any]:
        return {
            **common_config(vit, "siglip_vision_model", "SiglipVisionModel"),
            "intermediate_size": vit.blocks[0].mlp.fc1.out_features,
            "hidden_act": activation_name(vit.blocks[0].mlp.act),
            "vision_use_head": getattr(vit, "attn_pool", None) is not None,
        }

    def shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        return {"embeddings.position_embedding.weight": (-1, config["hidden_size"])}


def _split_pooling(state: StateDict) -> StateDict:
    """Torch's joined projection of the pooling attention as timm's queries and keys with values."""
    split = dict(state)
    for part in ("weight", "bias"):
        if (joined := split.pop(f"head.attention.in_proj_{part}", None)) is not None:
            width = len(joined) // 3
            split[f"head.attention.q.{part}"], split[f"head.attention.kv.{part}"] = (
                joined[:width],
                joined[width:],
            )
    return split


def _joined_pooling(state: StateDict) -> StateDict:
    joined = dict(state)
    for part in ("weight", "bias"):
        if (query := joined.pop(f"head.attention.q.{part}", None)) is not None:
            joined[f"head.attention.in_proj_{part}"] = torch.cat(
                [query, joined.pop(f"head.attention.kv.{part}")]
            )
    return joined


class SigLIP2(SigLIP):
    """SigLIP 2 with native resolution, read on the square grid of its position embedding.

    Its patch embedding is a linear layer over pixels in the order (row, column, channel).
    """

    model_types = ("siglip2_vision_model",)
    wrappers = ("siglip2",)
    position_interpolation = "bilinear"

    def architecture(self, config: Config) -> tuple[str, dict[str, Any]]:
        patches, patch = number(config, "num_patches", 256), number(config, "patch_size", 16)
        if math.isqrt(patches) ** 2 != patches:
            raise UserError(f"num_patches in config.json is {patches}, which is not a square grid")
        return super().architecture(
            {**config, "image_size": patch * math.isqrt(patches), "patch_size": patch}
        )

    def to_timm(self, state: StateDict, config: Config, shapes: Mapping[str, torch.Size]) -> StateDict:
        if (flat := state.get(_PATCH)) is not None and flat.dim() == 2:
            patch = number(config, "patch_size", 16)
            square = flat.reshape(len(flat), patch, patch, -1).permute(0, 3, 1, 2)
            state = {**state, _PATCH: square.contiguous()}
        return super().to_timm(state, config, shapes)

    def to_transformers(self, state: StateDict, config: Config) -> StateDict:
        named = super().to_transformers(state, config)
        named[_PATCH] = named[_PATCH].permute(0, 2, 3, 1).flatten(1).contiguous()
        return named

    def config_of(self, vit: Any) -> dict[str, Any]:
        config = super().config_of(vit)
        config.pop("image_size")
        grid = math.prod(vit.patch_embed.grid_size)
        return {
            **config,
            "model_type": "siglip2_vision_model",
            "architectures": ["Siglip2VisionModel"],
            "num_patches": grid,
        }
