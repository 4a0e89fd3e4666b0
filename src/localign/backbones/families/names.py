"""Translates parameter names between transformers and timm, in both directions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from localign.backbones.weights import StateDict
from localign.errors import UserError


@dataclass(frozen=True)
class NameMap:
    """Parameter names of one family. ``{}`` stands for the number of a block."""

    plain: Mapping[str, str]
    """timm's name -> transformers' name, of tensors with equal values; the shapes may differ by axes of length 1."""
    joined: Mapping[str, tuple[str, ...]]
    """timm's name -> the transformers names of tensors that timm holds as one, joined along the first axis."""

    def to_timm(self, state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], depth: int) -> StateDict:
        """Tensors with timm's names and shapes.

        Args:
            state: Tensors with transformers' names.
            shapes: The model's timm names and their shapes. Names that ``state`` has no tensors for are left out.
            depth: Number of blocks.

        Returns:
            The tensors, and under their own names those of ``state`` that the map does not know.
        """
        rest, found = dict(state), StateDict()
        for timm_name, sources in self._expanded(depth):
            if timm_name in shapes and all(name in rest for name in sources):
                tensor = torch.cat([rest.pop(name) for name in sources])
                same_size = tensor.numel() == shapes[timm_name].numel()
                found[timm_name] = tensor.reshape(shapes[timm_name]) if same_size else tensor
        return {**found, **rest}

    def to_transformers(
        self, state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], depth: int
    ) -> StateDict:
        """Tensors with transformers' names and shapes; the inverse of :meth:`to_timm`.

        Args:
            state: Tensors with timm's names.
            shapes: Shapes of the tensors whose axes differ from timm's, by transformers' name.
            depth: Number of blocks.

        Raises:
            UserError: ``state`` has tensors that the family has no place for; the line names them.
        """
        rest, found = dict(state), StateDict()
        for timm_name, targets in self._expanded(depth):
            if timm_name in rest:
                parts = rest.pop(timm_name).chunk(len(targets))
                found.update(
                    {n: p.reshape(shapes.get(n, tuple(p.shape))) for n, p in zip(targets, parts, strict=True)}
                )
        if rest:
            raise UserError(f"the format has no place for {len(rest)} tensors: {', '.join(sorted(rest)[:6])}")
        return {name: tensor.clone().contiguous() for name, tensor in found.items()}

    def _expanded(self, depth: int) -> Iterator[tuple[str, tuple[str, ...]]]:
        pairs: list[tuple[str, tuple[str, ...]]] = [(t, (h,)) for t, h in self.plain.items()]
        for timm_name, names in [*pairs, *self.joined.items()]:
            for number in range(depth) if "{}" in timm_name else (0,):
                yield timm_name.format(number), tuple(name.format(number) for name in names)


def linear(timm_name: str, name: str) -> dict[str, str]:
    """Weight and bias of a layer."""
    return {f"{timm_name}.{part}": f"{name}.{part}" for part in ("weight", "bias")}


def joined_linear(timm_name: str, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Weight and bias of layers that timm holds as one."""
    return {f"{timm_name}.{part}": tuple(f"{name}.{part}" for name in names) for part in ("weight", "bias")}
