"""Reader for checkpoints of the authors' release (``*.pth.tar``)."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from localign.alignment.student import Decoder, DecoderConfig, Encoder, Student, prepare_backbone
from localign.backbones import Backbone
from localign.backbones.weights import StateDict, read_file, state_dict_of
from localign.errors import UserError
from localign.text.printing import printable
from localign.weights import check_finite, load_strict

PUBLISHED_SOFT_CAP = 30.0
_SCALED = {"ls1.gamma": "attn.proj", "ls2.gamma": "mlp.fc2"}


def read_published(path: str | Path, backbone: Backbone, *, soft_cap: float | None) -> Student:
    """Build a student from a published checkpoint.

    Args:
        path: A file with ``encoder.*`` and ``decoder.*`` tensors; averaged weights (EMA) are preferred. The encoder's
            ``head`` is the linear layer before the decoder.
        backbone: The architecture that the checkpoint was trained from. Its weights are ignored, and it is not changed.
        soft_cap: Bound of the attention logits that the checkpoint was trained with, or None.

    Returns:
        The student in eval mode.

    Raises:
        UserError: The file is unreadable, or its tensors do not fit the backbone. The error names the tensors.
    """
    content = read_file(path)
    state = state_dict_of(content, path)
    try:
        student = _student(content, state, backbone, soft_cap, path)
    except (IndexError, TypeError, ValueError, ArithmeticError, RuntimeError, AssertionError) as error:
        line = printable(str(error).partition("\n")[0])
        raise UserError(f"{printable(path)} is not a published alignment checkpoint: {line}") from None
    check_finite(student.state_dict(), path)
    return student


def _student(
    content: Mapping[str, Any], state: StateDict, backbone: Backbone, soft_cap: float | None, path: str | Path
) -> Student:
    encoder = {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    decoder = {k.removeprefix("decoder."): v for k, v in state.items() if k.startswith("decoder.")}
    if not encoder or not decoder:
        raise UserError(
            f"{path} is not a published alignment checkpoint: it lacks encoder.* or decoder.* tensors"
        )
    args = content.get("args")
    heads = getattr(args, "decoder_num_heads", None) if isinstance(args, argparse.Namespace) else None
    vit = prepare_backbone(backbone.copy(soft_cap=soft_cap)).requires_grad_(True)
    our_encoder = Encoder(vit, _width(decoder, path))
    our_decoder = Decoder(_decoder_config(decoder, backbone, int(heads or backbone.num_heads), path))
    head = {k: encoder.pop(k) for k in ("head.weight", "head.bias") if k in encoder}
    load_strict(
        our_encoder.head, {k.removeprefix("head."): v for k, v in head.items()}, f"{path} encoder.head"
    )
    load_strict(vit.vit, fold_layer_scale(encoder, vit.vit), f"{path} encoder")
    load_strict(our_decoder, decoder, f"{path} decoder")
    return Student(our_encoder, our_decoder).eval()


def _width(decoder: StateDict, path: str | Path) -> int:
    if "pos_embed" not in decoder or "head.weight" not in decoder:
        raise UserError(
            f"{path} is not a published alignment checkpoint: its decoder lacks pos_embed or head.weight"
        )
    return int(decoder["pos_embed"].shape[-1])


def _decoder_config(decoder: StateDict, backbone: Backbone, heads: int, path: str | Path) -> DecoderConfig:
    blocks = {int(m.group(1)) for k in decoder if (m := re.match(r"blocks\.(\d+)\.", k))}
    gate = decoder.get("blocks.0.mlp.fc1_g.weight")
    return DecoderConfig(
        width=_width(decoder, path),
        output_width=int(decoder["head.weight"].shape[0]),
        num_heads=heads,
        num_tokens=int(decoder["pos_embed"].shape[1]),
        depth=len(blocks),
        qkv_bias="blocks.0.attn.qkv.bias" in decoder,
        layer_scale=1e-6 if "blocks.0.ls1.gamma" in decoder else None,
        activation=backbone.activation.__name__,
        gated_width=None if gate is None else len(gate),
        gated_norm="blocks.0.mlp.norm.weight" in decoder,
    )


def fold_layer_scale(state: StateDict, vit: nn.Module) -> StateDict:
    """Multiply LayerScale vectors into the layers before them where ``vit`` has no LayerScale.

    ``gamma * (W x + b)`` equals ``(gamma W) x + gamma b``: gamma scales the rows of the weight and the bias.

    Raises:
        UserError: The checkpoint lacks the weight or bias of a scaled layer.
    """
    wanted = vit.state_dict()
    folded: StateDict = dict(state)
    for key, gamma in state.items():
        for suffix, layer in _SCALED.items():
            if key.endswith(suffix) and key not in wanted:
                stem = key.removesuffix(suffix) + layer
                folded[f"{stem}.weight"] = _require(folded, f"{stem}.weight") * gamma[:, None]
                folded[f"{stem}.bias"] = _require(folded, f"{stem}.bias") * gamma
                del folded[key]
    return folded


def _require(state: StateDict, key: str) -> Tensor:
    if key not in state:
        raise UserError(f"the checkpoint has a LayerScale for {key} but lacks {key}")
    return state[key]
