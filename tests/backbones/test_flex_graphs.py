"""On CUDA, FlexAttention is compiled once for all numbers of images. Seen on fake CUDA tensors."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import flex_attention

from localign.backbones import attention
from localign.backbones.attention import attention_flex


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Counts the graphs that are compiled from FlexAttention."""
    torch._dynamo.reset()
    counter: Any = CompileCounter()
    compiled = torch.compile(flex_attention, dynamic=False, backend=counter)
    monkeypatch.setattr(attention, "_compiled_flex", cache(lambda: compiled))
    with FakeTensorMode(), torch.no_grad(), torch.device("cuda"):
        yield counter
    torch._dynamo.reset()


def attend(images: int, cap: float, mask: Tensor | None = None) -> None:
    query = torch.empty(images, 2, 8, 16)
    attention_flex(query, query.clone(), query.clone(), cap, mask)


def test_more_numbers_of_images_than_torch_compiles_variants_give_one_graph(graphs: Any) -> None:
    for images in range(2, 2 + 2 * torch._dynamo.config.recompile_limit):
        attend(images, 30.0)
    assert graphs.frame_count == 1


def test_another_cap_is_another_constant_and_a_mask_another_graph(graphs: Any) -> None:
    for images in (2, 3, 4):
        for cap in (30.0, 50.0):
            attend(images, cap)
        attend(images, 30.0, torch.ones(images, 1, 1, 8, dtype=torch.bool))
    assert graphs.frame_count == 3
