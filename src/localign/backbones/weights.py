"""Reading weight files that others wrote: strictly, and without running code from them."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import scalar as numpy_scalar
from safetensors.torch import load_file
from torch import Tensor

from localign.errors import UserError

StateDict = dict[str, Tensor]
_WRAPPERS = ("module.", "_orig_mod.")
_PLAIN_CLASSES: list[Any] = [
    argparse.Namespace,
    # numpy numbers, as training scripts leave them beside the tensors; under their old name too
    numpy_scalar,
    (numpy_scalar, "numpy.core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "bool")),
]
"""What a file of tensors may hold besides: data without behaviour."""
_SECTIONS = ("state_dict_ema", "state_dict", "model_ema", "model", "teacher")


def read_file(path: str | Path) -> dict[str, Any]:
    """The content of a ``.safetensors`` or torch file; ``argparse.Namespace`` is the one class let in.

    Raises:
        UserError: No such file, not a checkpoint, or a pickle that asks for code to be run.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weight file at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_PLAIN_CLASSES):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} refused: {_unpickling_cause(error)}") from error
    except Exception as error:  # damaged bytes make the readers raise nearly anything
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is not a readable checkpoint: {cause}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def _unpickling_cause(error: Exception) -> str:
    for line in str(error).splitlines():
        if "nsupported global" in line.replace("GLOBAL", "global") or "Unsupported class" in line:
            name = re.split(r"was not|whose|`", line.split("GLOBAL", 1)[-1])[0].strip(" :")
            return f"it holds a pickled object ({name}), and unpickling it could run code"
    return "it is not a plain file of tensors, and unpickling it could run code"


def read_state_dict(path: str | Path) -> StateDict:
    """The tensors of a weight file, with wrapper prefixes (``module.``, ``_orig_mod.``) taken off.

    Raises:
        UserError: As :func:`read_file`, or there are no tensors in it.
    """
    return state_dict_of(read_file(path), path)


def state_dict_of(content: Mapping[str, Any], path: str | Path) -> StateDict:
    """Find the state dict in a file's content: the EMA weights where there are any, else the plain ones."""
    for section in _SECTIONS:
        if isinstance(content.get(section), Mapping):
            content = content[section]
            break
    state = {unwrapped(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise UserError(f"{path} holds no tensors")
    return state


def unwrapped(key: str) -> str:
    """A parameter name without the prefixes that DDP and torch.compile put before it."""
    while key.startswith(_WRAPPERS):
        key = key.split(".", 1)[1]
    return key
