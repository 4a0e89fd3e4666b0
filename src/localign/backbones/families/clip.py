"""CLIP's image towers (CLIPVisionModel, CLIPModel, and the towers of LLaVA-1.5 and LLaVA-NeXT).

A class token comes first; the last norm applies to the pooled class token, and hidden states are taken before it.
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


def encoder_names(final_norm: str) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Names of the blocks and the last norm, as CLIP and SigLIP have them."""
    block = "encoder.layers.{}"
    plain = {
        "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
        "pos_embed": "embeddings.position_embedding.weight",
        **linear("norm", final_norm),
        **linear("blocks.{}.norm1", f"{block}.layer_norm1"),
        **linear("blocks.{}.norm2", f"{block}.layer_norm2"),
        **linear("blocks.{}.attn.proj", f"{block}.self_attn.out_proj"),
        **linear("blocks.{}.mlp.fc1", f"{block}.mlp.fc1"),
        **linear("blocks.{}.mlp.fc2", f"{block}.mlp.fc2"),
    }
    parts = [f"{block}.self_attn.{part}_proj" for part in "qkv"]
    return plain, joined_linear("blocks.{}.attn.qkv", parts)


class CLIP(TransformersFamily):
    """CLIP: class token, norm before the blocks, no bias in the patch embedding."""

    model_types = ("clip_vision_model",)
    wrappers = ("clip",)
    square = True
    position_interpolation = "bicubic-aliased"
    anchor = "embeddings.class_embedding"
    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)
    ignored = ("embeddings.position_ids",)

    def architecture(self, config: Config) -> tuple[str, dict[str, Any]]:
        config = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 32,
                  "intermediate_size": 3072, **config}  # fmt: skip
        return "vit_base_patch16_clip_224", common_arguments(config, act="quick_gelu", eps=1e-5)

    def names(self, config: Config) -> NameMap:
        plain, joined = encoder_names("post_layernorm")
        plain |= {"cls_token": self.anchor, **linear("norm_pre", "pre_layrnorm")}
        return NameMap(plain, joined)

    def config_of(self, vit: Any) -> dict[str, Any]:
        hidden = vit.blocks[0].mlp.fc1.out_features
        act = activation_name(vit.blocks[0].mlp.act)
        common = common_config(vit, "clip_vision_model", "CLIPVisionModel")
        return {
            **common,
            "intermediate_size": hidden,
            "hidden_act": act,
            "projection_dim": common["hidden_size"],
        }

    def shapes(self, config: Config) -> dict[str, tuple[int, ...]]:
        return {self.anchor: (-1,), "embeddings.position_embedding.weight": (-1, config["hidden_size"])}
