"""MoCo v3's ViTs, from the checkpoint files their authors publish.

The file is a torch pickle whose ``state_dict`` holds the online encoder under ``module.base_encoder.`` and
the momentum encoder under ``module.momentum_encoder.``; ``head.*`` is the projection MLP. The position
embedding is a fixed 2-d sine-cosine table, stored like a weight.
"""

from __future__ import annotations

from pathlib import Path

from localign.backbones.weights import StateDict, read_state_dict
from localign.errors import UserError

_ENCODER = "base_encoder."


def read_moco_v3(path: str | Path) -> StateDict:
    """The encoder of a MoCo v3 checkpoint under timm's names, without its projection head.

    Raises:
        UserError: The file is unreadable or holds no MoCo v3 encoder.
    """
    state = read_state_dict(path)
    encoder = {k.removeprefix(_ENCODER): v for k, v in state.items() if k.startswith(_ENCODER)}
    if not encoder:
        raise UserError(f"{path} is no MoCo v3 checkpoint: it has no tensors under 'module.{_ENCODER}'")
    return {k: v for k, v in encoder.items() if not k.startswith("head.")}
