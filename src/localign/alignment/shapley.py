"""The Shapley kernel: a distribution of masks for which the additive objective has a known solution.

Let ``v(S)`` be the teacher's output when only the set S of n patches is visible. The Shapley values of the patches are
the vectors ``g`` with ``sum_i g_i = v(all) - v(none)`` that minimise the squared error of ``sum_{i in S} g_i`` against
``v(S) - v(none)``, if S has k patches with probability proportional to 1 / (k (n - k)) and all sets of one size are
equally likely (Charnes et al., 1988). So with masks from this kernel, the additive objective (section 3.1, eq. 2 of the
paper) is solved by Shapley values.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kernel_cardinalities(players: int) -> Tensor:
    """Probability of each set size 0..players under the Shapley kernel: float64 ``(players + 1,)``.

    It is proportional to 1 / (k (n - k)), and 0 for the empty and the full set, which the solution meets exactly.
    """
    sizes = torch.arange(1, players, dtype=torch.float64)
    weights = 1 / (sizes * (players - sizes))
    return (
        torch.nn.functional.pad(weights / weights.sum(), (1, 1)) if players > 1 else torch.zeros(2).double()
    )
