"""Strict loading of weights: no tensor is missing, none is left over, and all numbers are finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from localign.errors import UserError
from localign.text.printing import printable


def load_strict(
    module: nn.Module, state: Mapping[str, Tensor], source: str | Path, ignore: Iterable[str] = ()
) -> None:
    """Load ``state`` into ``module``. All tensors must be present with the right shape, and none may be left over.

    Args:
        module: Gets the weights, in its own dtypes.
        state: Name -> tensor.
        source: Named in errors.
        ignore: Name prefixes of tensors in ``state`` that the module is known not to have.

    Raises:
        UserError: Tensors are missing, extra or of the wrong shape; the line names them.
    """
    given = without_ignored(module, state, ignore)
    check_fit(module, given, source)
    module.load_state_dict(given, strict=True)


def without_ignored(
    module: nn.Module, state: Mapping[str, Tensor], ignore: Iterable[str] = ()
) -> dict[str, Tensor]:
    """``state`` without the tensors of ignored prefixes that the module does not have."""
    wanted, ignored = module.state_dict(), tuple(ignore)
    return {k: v for k, v in state.items() if not (ignored and k.startswith(ignored) and k not in wanted)}


def check_fit(module: nn.Module, given: Mapping[str, Tensor], source: str | Path) -> None:
    """Compare names and shapes; nothing is copied, so the module may be on the meta device.

    Raises:
        UserError: Tensors are missing, extra or of the wrong shape; the line names them.
    """
    wanted = module.state_dict()
    problems = []
    if missing := [k for k in wanted if k not in given]:
        problems.append(f"missing {_listed(missing)}")
    if extra := [k for k in given if k not in wanted]:
        problems.append(f"extra {_listed(extra)}")
    shapes = [
        f"{k} {tuple(given[k].shape)} for {tuple(v.shape)}"
        for k, v in wanted.items()
        if k in given and given[k].shape != v.shape
    ]
    if shapes:
        problems.append(f"wrong shape {_listed(shapes)}")
    if problems:
        raise UserError(f"{printable(source)} does not fit: {'; '.join(problems)}")


def check_finite(state: Mapping[str, Tensor], source: str | Path) -> None:
    """Check that no weight is NaN or infinite.

    Args:
        state: Name -> tensor. Tensors of integers and tensors on the meta device are not looked at.
        source: Names the weights in the error.

    Raises:
        UserError: Some are; the line names the tensors.
    """
    bad = [name for name, tensor in state.items() if not _is_finite(tensor)]
    if bad:
        raise UserError(
            f"{printable(source)}: {len(bad)} of {len(state)} tensors hold NaN or infinity: {_listed(bad)}; "
            "these weights are useless, take an earlier checkpoint or another file"
        )


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    # torch.isfinite has no kernel for numbers of 8 bits.
    return bool(torch.isfinite(tensor if tensor.itemsize > 1 else tensor.float()).all())


def pixel_statistics(values: Any, name: str, source: object) -> tuple[float, ...]:
    """Check the mean or the standard deviation of pixels.

    Args:
        values: One number per RGB channel, perhaps from a file.
        name: ``mean`` or ``std``.
        source: Named in errors.

    Returns:
        Three finite numbers; those of ``std`` are above 0.

    Raises:
        UserError: The values are something else.
    """
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        numbers = ()
    good = len(numbers) == 3 and all(math.isfinite(n) and (name == "mean" or n > 0) for n in numbers)
    if not good:
        wanted = "three finite numbers" + (" above 0" if name == "std" else "")
        raise UserError(f"{printable(source)}: the pixels' {name} is {printable(values)!r:.80}, not {wanted}")
    return numbers


def _listed(names: list[str], shown: int = 6) -> str:
    tail = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} ({', '.join(map(printable, names[:shown]))}{tail})"
