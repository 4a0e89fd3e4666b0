"""timm's NaFlexVit as a plain VisionTransformer: the same tokens on a fixed grid, and on any other.

A NaFlexVit takes patches of images of several sizes. Its blocks are those of a plain ViT; only its patch embedding (a
linear layer) and its position embedding (a grid) have other shapes.
"""

from __future__ import annotations

from typing import Any, get_args

from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import nn

from localign.backbones.building import build_vit
from localign.backbones.families.base import exact_ratio, timm_activation
from localign.errors import UserError
from localign.portable.native_localign_vlm import PositionInterpolation
from localign.weights import load_strict

_ARCHITECTURE = "vit_base_patch16_siglip_224"
"""Any of timm's plain ViTs; the arguments decide everything."""


def plain_vit(vit: Any, name: str) -> tuple[Any, str, dict[str, Any]]:
    """Rebuild a NaFlexVit as a VisionTransformer on the grid of its position embedding.

    Args:
        vit: A NaFlexVit without a classifier.
        name: Named in errors.

    Returns:
        The model, timm's name for it, and the constructor's arguments.

    Raises:
        UserError: The model has parts that a plain ViT lacks; the line names them.
    """
    if problem := _unlike_plain(vit):
        raise UserError(f"{name} is a NaFlexVit with {problem}, which is not supported")
    arguments = _arguments(vit)
    plain = build_vit(_ARCHITECTURE, arguments, pretrained=False)
    state = {key.removeprefix("embeds."): value for key, value in vit.state_dict().items()}
    for key in ("proj.weight", "proj.bias"):
        if key in state:
            state[f"patch_embed.{key}"] = state.pop(key)
    weight = state["patch_embed.proj.weight"]
    if weight.dim() == 2:
        height, width = vit.embeds.patch_size
        shape = (
            (len(weight), height, width, -1) if vit.embeds.channels_last else (len(weight), -1, height, width)
        )
        weight = weight.reshape(shape)
        weight = weight.permute(0, 3, 1, 2) if vit.embeds.channels_last else weight
    state["patch_embed.proj.weight"] = weight.contiguous()
    state["pos_embed"] = state["pos_embed"].flatten(1, 2)
    load_strict(plain, state, name)
    plain.pretrained_cfg = vit.pretrained_cfg
    return plain, _ARCHITECTURE, arguments


def _unlike_plain(vit: Any) -> str | None:
    embeds, block = vit.embeds, vit.blocks[0]
    if vit.rope is not None:
        return "rotary positions"
    if embeds.pos_embed_type != "learned":
        return f"{embeds.pos_embed_type} positions"
    if embeds.pos_embed_interp_mode not in get_args(PositionInterpolation) or not embeds.pos_embed_antialias:
        return "another interpolation of positions than bicubic or bilinear, antialiased"
    if embeds.pos_embed_ar_preserving or embeds.pos_embed_align_corners or embeds.pos_embed_use_grid_sample:
        return "another interpolation of positions than that of whole grids"
    if embeds.norm_input is not None or not isinstance(embeds.norm, nn.Identity):
        return "a norm in the patch embedding"
    if type(block) is not Block or type(block.attn) is not Attention:
        return f"blocks of the class {type(block).__name__} with {type(block.attn).__name__}"
    if not isinstance(block.norm1, nn.LayerNorm):
        return f"norms of the class {type(block.norm1).__name__}"
    return None


def _arguments(vit: Any) -> dict[str, Any]:
    block, embeds = vit.blocks[0], vit.embeds
    rows, columns = embeds.pos_embed.shape[1:3]
    height, width = embeds.patch_size
    hidden = block.mlp.fc1.out_features
    return {
        "img_size": (rows * height, columns * width),
        "patch_size": (height, width),
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": exact_ratio(hidden / vit.embed_dim, vit.embed_dim),
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "proj_bias": block.attn.proj.bias is not None,
        "init_values": None if isinstance(block.ls1, nn.Identity) else 1e-5,
        "class_token": embeds.cls_token is not None,
        "reg_tokens": vit.num_reg_tokens,
        "no_embed_class": True,
        "pre_norm": not isinstance(vit.norm_pre, nn.Identity),
        "global_pool": vit.global_pool,
        "fc_norm": not isinstance(vit.fc_norm, nn.Identity),
        "final_norm": not (isinstance(vit.norm, nn.Identity) and isinstance(vit.fc_norm, nn.Identity)),
        "act_layer": timm_activation(block.mlp.act),
        "norm_eps": block.norm1.eps,
    }
