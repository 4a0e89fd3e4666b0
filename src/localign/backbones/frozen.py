"""Linear layers of a model that is not trained, as a CPU computes them best in bfloat16."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

_PRODUCT = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
"""oneDNN's product that adds the bias and applies the activation to what it still has in registers."""


@cache
def fuses_here() -> bool:
    """Whether there is such a product, and in bfloat16 on this processor; those without AVX-512 refuse it."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return _PRODUCT is not None and torch.backends.mkldnn.is_available() and bool(supported and supported())


class FrozenLinear(nn.Module):
    """A linear layer, and GELU after it where asked for, in one operation under bfloat16 autocast on a CPU.

    Elsewhere it does what the layer does. It has the layer's parameters under their names.

    Args:
        linear: Not trained any more.
        gelu: The activation that follows.
    """

    def __init__(self, linear: nn.Linear, gelu: nn.GELU | None = None) -> None:
        super().__init__()
        self.weight, self.bias, self.gelu = linear.weight, linear.bias, gelu
        # Autocast would cast them anew for every call: it remembers what is trained.
        self._cast: tuple[Tensor, Tensor | None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        if not _fuses(x):
            out = F.linear(x, self.weight, self.bias)
            return out if self.gelu is None else self.gelu(out)
        if self._cast is None:
            bias = None if self.bias is None else self.bias.bfloat16()
            self._cast = self.weight.bfloat16(), bias
        assert _PRODUCT is not None
        activation: tuple[Any, ...] = ("none", [], "")
        if self.gelu is not None:
            activation = ("gelu", [], self.gelu.approximate)
        return _PRODUCT(x.bfloat16(), *self._cast, *activation)


def _fuses(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()  # which fuses by itself, and does not take this operation
    )


def fuse_frozen(vit: nn.Module) -> None:
    """Replace, in place, the linear layers of timm's attention and MLPs, where :func:`fuses_here`.

    Args:
        vit: Loaded with its last weights, which :class:`FrozenLinear` keeps a copy of.
    """
    if not fuses_here():
        return
    for module in list(vit.modules()):
        if isinstance(module, FrozenLinear):
            continue
        gelu = module.act if type(module) is Mlp and type(module.act) is nn.GELU else None
        for name, part in list(module.named_children()):
            if type(part) is nn.Linear:
                setattr(module, name, FrozenLinear(part, gelu if name == "fc1" else None))
        if gelu is not None:
            module.act = nn.Identity()
