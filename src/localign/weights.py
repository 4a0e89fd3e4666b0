"""Strict loading of weights: no tensor is missing and none is left over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from localign.errors import UserError


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
    ignored = tuple(ignore)
    wanted = module.state_dict()
    given = {k: v for k, v in state.items() if not (ignored and k.startswith(ignored) and k not in wanted)}
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
        raise UserError(f"{source} does not fit: {'; '.join(problems)}")
    module.load_state_dict(given, strict=True)


def _listed(names: list[str], shown: int = 6) -> str:
    tail = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} ({', '.join(names[:shown])}{tail})"
