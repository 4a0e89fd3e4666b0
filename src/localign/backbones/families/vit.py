"""The original vision transformers (ViTModel, ViTForImageClassification).

A class token comes first; the last norm applies to every token.
"""

from __future__ import annotations

from typing import Any

from localign.backbones.families.base import (
    Config,
    TransformersFamily,
    activation_name,
    common_arguments,
    common_config,
)
from localign.backbones.families.names import NameMap, joined_linear, linear


class ViT(TransformersFamily):
    """ViT."""

    model_types = ("vit",)
    position_interpolation = "bicubic-aliased"
    anchor = "embeddings.cls_token"
    ignored = ("embeddings.mask_token", "pooler.", "classifier.")

    def architecture(self, config: Config) -> tuple[str, dict[str, Any]]:
        config = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
                  "intermediate_size": 3072, **config}  # fmt: skip
        arguments = common_arguments(config, act="gelu", eps=1e-12)
        return "vit_base_patch16_224", {**arguments, "qkv_bias": bool(config.get("qkv_bias", True))}

    def names(self, config: Config) -> NameMap:
        block = "encoder.layer.{}"
        plain = {
            "cls_token": self.anchor,
            "pos_embed": "embeddings.position_embeddings",
            **linear("patch_embed.proj", "embeddings.patch_embeddings.projection"),
            **linear("norm", "layernorm"),
            **linear("blocks.{}.norm1", f"{block}.layernorm_before"),
            **linear("blocks.{}.norm2", f"{block}.layernorm_after"),
            **linear("blocks.{}.attn.proj", f"{block}.attention.output.dense"),
            **linear("blocks.{}.mlp.fc1", f"{block}.intermediate.dense"),
            **linear("blocks.{}.mlp.fc2", f"{block}.output.dense"),
        }
        parts = [f"{block}.attention.attention.{part}" for part in ("query", "key", "value")]
        return NameMap(plain, joined_linear("blocks.{}.attn.qkv", parts))

    def config_of(self, vit: Any) -> dict[str, Any]:
        return {
            **common_config(vit, "vit", "ViTModel"),
            "intermediate_size": vit.blocks[0].mlp.fc1.out_features,
            "hidden_act": activation_name(vit.blocks[0].mlp.act),
            "qkv_bias": vit.blocks[0].attn.qkv.bias is not None,
        }
