"""Builds timm models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

from localign.errors import UserError

REMOTE = ("hf-hub:", "hf_hub:", "local-dir:")
"""Prefixes of timm names that stand for a repository or folder."""
NORM_EPS_ARGUMENT = "norm_eps"
"""An argument beside timm's own: the epsilon of every LayerNorm. timm has no argument for it that JSON can hold."""


def build_vit(architecture: str, kwargs: Mapping[str, Any], *, pretrained: bool) -> Any:
    """Build a timm model without a classifier.

    Args:
        architecture: timm's name.
        kwargs: Arguments of timm's constructor, and ``norm_eps``.
        pretrained: Load timm's pre-trained weights.

    Raises:
        UserError: timm does not accept an argument, or the weights cannot be downloaded.
    """
    arguments = dict(kwargs)
    eps = arguments.pop(NORM_EPS_ARGUMENT, None)
    try:
        vit = timm.create_model(architecture, pretrained=pretrained, num_classes=0, **arguments)
    except TypeError as error:
        raise UserError(f"{architecture}: {error}") from error
    except AssertionError as error:
        raise UserError(f"{architecture} with {dict(kwargs)}: {error}") from error
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if architecture.startswith(REMOTE):
            raise UserError(f"{architecture} cannot be downloaded or built: {reason}") from error
        if not pretrained:
            raise
        raise UserError(
            f"the weights of {architecture} cannot be downloaded ({reason}); "
            "give a file with --weights FILE, or --weights none for random weights"
        ) from error
    if eps is not None:
        for module in vit.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = float(eps)
    return vit
