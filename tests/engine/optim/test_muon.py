"""Our Muon has the updates of torch's, independent of the other matrices in the batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

from localign.engine.optim import muon
from localign.engine.optim.muon import Muon, orthogonalise

SHAPES = [(8, 8), (6, 16), (16, 6), (8, 8), (6, 16), (1, 5)]
RATE, DECAY = 0.1, 0.2


def matrices(seed: int = 0) -> list[nn.Parameter]:
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def stepped(
    parameters: Sequence[nn.Parameter], optimizer: Callable[..., torch.optim.Optimizer], steps: int = 3
) -> list[torch.Tensor]:
    """The parameters after some steps, with gradients of very unequal singular values."""
    made = optimizer([{"params": parameters, "weight_decay": DECAY}], lr=RATE)
    for step in range(steps):
        for number, parameter in enumerate(parameters):
            torch.manual_seed(100 * step + number)
            rows, columns = parameter.shape
            parameter.grad = torch.randn(rows, 1) * torch.randn(1, columns) + 0.1 * torch.randn(rows, columns)
        made.step()
    return [p.detach() for p in parameters]


def torch_muon(groups: Sequence[dict[str, object]], lr: float) -> torch.optim.Muon:
    return torch.optim.Muon(groups, lr=lr, adjust_lr_fn="match_rms_adamw")


def test_updates_are_close_to_those_of_torchs_muon() -> None:
    start = [p.detach() for p in matrices()]
    ours = stepped(matrices(), Muon)
    theirs = stepped(matrices(), torch_muon)
    for before, our, their in zip(start, ours, theirs, strict=True):
        moved, expected = our - before, their - before
        assert float((moved - expected).norm() / expected.norm()) < 0.02


def test_updates_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    batched = stepped(matrices(), Muon)
    alone = [stepped([p], Muon)[0] for p in matrices()[:1]]
    assert torch.allclose(batched[0], alone[0], atol=1e-6)
    monkeypatch.setattr(muon, "_MAX_BATCH", 1)
    for single, expected in zip(stepped(matrices(), Muon), batched, strict=True):
        assert torch.allclose(single, expected, atol=1e-6)


def test_a_parameter_without_gradient_is_not_changed() -> None:
    parameters = matrices()
    before = copy.deepcopy(parameters)
    made = Muon([{"params": parameters, "weight_decay": DECAY}], lr=RATE)
    parameters[1].grad = torch.ones_like(parameters[1])
    made.step()
    moved = [not torch.equal(a, b) for a, b in zip(parameters, before, strict=True)]
    assert moved == [False, True, False, False, False, False]
    assert set(made.state) == {parameters[1]}


@pytest.mark.parametrize("shape", [(3, 12, 12), (12, 40), (40, 12)], ids=str)
def test_singular_vectors_stay_and_values_become_about_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    given = torch.randn(shape)
    result = orthogonalise(given)
    assert result.dtype == torch.float32
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.6
    assert values.max() < 1.3
    u, _, vh = torch.linalg.svd(given, full_matrices=False)
    core = u.mT @ result @ vh.mT
    off = core - torch.diag_embed(core.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-4, "the same singular vectors"
    assert not orthogonalise(torch.zeros(4, 4)).any()
