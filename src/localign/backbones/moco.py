"""Checkpoint files of MoCo v3's authors.

The file is a torch pickle. Its ``state_dict`` holds the online encoder under ``module.base_encoder.`` and the momentum
encoder under ``module.momentum_encoder.``; ``head.*`` is the projection MLP. The position embedding is a fixed 2-d
sine-cosine table that is stored like a weight.
"""

from __future__ import annotations

from pathlib import Path

from localign.backbones.weights import StateDict, read_state_dict
from localign.errors import UserError

_ENCODER = "base_encoder."


def read_moco_v3(path: str | Path) -> StateDict:
    """The encoder of a MoCo v3 checkpoint, with timm's parameter names and without the projection head.

    Raises:
        UserError: The file cannot be read or has no MoCo v3 encoder.
    """
    state = read_state_dict(path)
    encoder = {k.removeprefix(_ENCODER): v for k, v in state.items() if k.startswith(_ENCODER)}
    if not encoder:
        raise UserError(f"{path} is not a MoCo v3 checkpoint: it has no tensors under 'module.{_ENCODER}'")
    return {k: v for k, v in encoder.items() if not k.startswith("head.")}
