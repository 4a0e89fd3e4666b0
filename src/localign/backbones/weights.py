"""Reading weight files of other projects, without running code from them."""

from __future__ import annotations

import argparse
import pickle
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import scalar as numpy_scalar
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Parameter

from localign.backbones.formats import check_format
from localign.errors import UserError
from localign.text.printing import first_line, printable

StateDict = dict[str, Tensor]
_WRAPPERS = ("module.", "_orig_mod.")
_PLAIN_CLASSES: list[Any] = [
    argparse.Namespace,
    # numpy numbers, which training scripts store beside the tensors; also under their old name
    numpy_scalar,
    (numpy_scalar, "numpy.core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "bool")),
]
"""Classes besides tensors that a pickle may contain: plain data."""
_SECTIONS = ("state_dict_ema", "state_dict", "model_ema", "model", "teacher")


def read_file(path: str | Path) -> dict[str, Any]:
    """The content of a ``.safetensors`` or torch file. Pickles may contain tensors and plain data only.

    Raises:
        UserError: There is no such file, it is not a checkpoint, or its pickle could run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weight file at {printable(path)}")
    check_format(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_PLAIN_CLASSES):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{printable(path)} was refused: {_unpickling_cause(error)}") from error
    except Exception as error:  # readers raise errors of all kinds on damaged files
        raise UserError(f"{printable(path)} is not a readable checkpoint: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{printable(path)} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def _unpickling_cause(error: Exception) -> str:
    for line in str(error).splitlines():
        if "nsupported global" in line.replace("GLOBAL", "global") or "Unsupported class" in line:
            name = re.split(r"was not|whose|`", line.split("GLOBAL", 1)[-1])[0].strip(" :")
            return f"it holds a pickled object ({name}), and unpickling it could run code"
    return "it is not a plain file of tensors, and unpickling it could run code"


def read_state_dict(path: str | Path) -> StateDict:
    """The tensors of a weight file, without the wrapper prefixes ``module.`` and ``_orig_mod.``.

    Raises:
        UserError: As :func:`read_file`, or the file has no tensors.
    """
    return state_dict_of(read_file(path), path)


def state_dict_of(content: Mapping[str, Any], path: str | Path) -> StateDict:
    """Find the state dict in a file's content: the EMA weights if the file has them, else the plain weights.

    Raises:
        UserError: There are no tensors, or one has no numbers of its own, such as a sparse or an expanded tensor.
    """
    for section in _SECTIONS:
        if isinstance(content.get(section), Mapping):
            content = content[section]
            break
    for section in ("teacher", "student"):  # within another section, and without tensors beside it
        if isinstance(content.get(section), Mapping) and not _tensors(content):
            content = content[section]
            break
    state = {unwrapped(key): value for key, value in _tensors(content).items()}
    if not state:
        raise UserError(f"{printable(path)} holds no tensors")
    for name, tensor in state.items():
        if not _has_own_numbers(tensor):
            raise UserError(
                f"{printable(path)}: the tensor {printable(name)} is no plain tensor of numbers (sparse, quantised, "
                "without data, or larger than its data)"
            )
    return state


def _tensors(content: Mapping[str, Any]) -> StateDict:
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _has_own_numbers(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, Parameter)
        and tensor.layout is torch.strided
        and not (tensor.is_meta or tensor.is_quantized or tensor.is_nested)
        and tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()
    )


def common_prefixes(state: StateDict, least: int) -> list[str]:
    """Prefixes that end with a dot and that at least ``least`` names have, the shortest first."""
    counts = Counter(
        name[: dot + 1] for name in state for dot, letter in enumerate(name) if letter == "." and name[:dot]
    )
    return sorted((prefix for prefix, count in counts.items() if count >= least), key=lambda p: (len(p), p))


def unwrapped(key: str) -> str:
    """A parameter name without the prefixes of DDP and torch.compile."""
    while key.startswith(_WRAPPERS):
        key = key.split(".", 1)[1]
    return key
