"""Heads read what the benchmark says they read, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from localign.errors import UserError
from localign.probing.heads import Geometry, TransformerHead, block_at, build_head

CLS = Geometry(width=16, num_heads=2, num_patches=6, num_prefix_tokens=1)
REGISTERS = Geometry(16, 2, 6, 5)
PLAIN = Geometry(16, 2, 6, 0)


def tokens_of(geometry: Geometry) -> Tensor:
    count = geometry.num_patches + geometry.num_prefix_tokens
    return torch.randn(3, count, geometry.width, generator=torch.Generator().manual_seed(0))


def reads(head: nn.Module, tokens: Tensor) -> list[bool]:
    """Which token positions the output of the first image depends on."""
    tokens = tokens.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(head(tokens)[0].square().sum(), tokens)
    return [bool(g.abs().sum() > 0) for g in gradient[0]]


@pytest.mark.parametrize("geometry", [CLS, REGISTERS, PLAIN])
@pytest.mark.parametrize("name", ["linear", "mlp", "transformer"])
def test_one_prediction_per_patch_or_per_image(name: str, geometry: Geometry) -> None:
    tokens = tokens_of(geometry)
    for task in ("local", "majority"):
        assert build_head(name, geometry, 4, task)(tokens).shape == (3, 6, 4)
    assert build_head(name, geometry, 4, "global")(tokens).shape == (3, 4)


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_token_heads_see_one_token(name: str) -> None:
    for geometry in (CLS, REGISTERS):
        prefix = geometry.num_prefix_tokens
        seen = reads(build_head(name, geometry, 4, "global"), tokens_of(geometry))
        assert seen == [True] + [False] * (prefix + 5)
        local = build_head(name, geometry, 4, "local")
        tokens = tokens_of(geometry)
        alone = local(torch.cat([tokens[:, :prefix], tokens[:, prefix : prefix + 1].expand(-1, 6, -1)], 1))
        assert torch.allclose(alone[:, 3], local(tokens)[:, 0])
    tokens = tokens_of(PLAIN)
    head = build_head(name, PLAIN, 4, "global")
    assert torch.allclose(head(tokens), head(tokens.mean(1, keepdim=True).expand(-1, 6, -1)), atol=1e-6)


def test_transformer_is_built_as_published() -> None:
    head = build_head("transformer", CLS, 4, "local")
    assert isinstance(head, TransformerHead)
    assert head.positions.shape == (7, 16)
    assert len(head.blocks) == 2
    block: Any
    for block in head.blocks:
        assert block.attn.qkv.bias is None
        assert block.attn.num_heads == 2
        assert block.mlp.fc1.out_features == 64
        assert isinstance(block.mlp.act, nn.GELU)
        assert torch.all(block.ls1.gamma == 0.01)
        assert block.norm1.eps == 1e-5
    mlp: Any = build_head("mlp", CLS, 4, "local")
    assert mlp.function[0].out_features == 1024


def test_transformer_global_is_the_mean_of_the_outputs_it_reads() -> None:
    for geometry, count in ((CLS, 1), (REGISTERS, 5), (PLAIN, 6)):
        head: Any = build_head("transformer", geometry, 4, "global")
        tokens = tokens_of(geometry)
        outputs = head.linear(head.norm(head.blocks(head.norm_pre(tokens + head.positions))))
        assert torch.allclose(head(tokens), outputs[:, :count].mean(1), atol=1e-6)


@pytest.mark.parametrize("read", [slice(0, 1), slice(1, 7), slice(0, 7)])
def test_a_block_read_at_some_positions_is_the_block(read: slice) -> None:
    head = build_head("transformer", CLS, 4, "local")
    assert isinstance(head, TransformerHead)
    tokens = tokens_of(CLS)
    block: Any
    for block in head.blocks:
        block.ls1.gamma.data.fill_(0.7)
        block.ls2.gamma.data.fill_(0.7)
        whole, part = block(tokens)[:, read], block_at(block, tokens, read)
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-6)
        ours, theirs = (
            torch.autograd.grad(out.square().sum(), list(block.parameters())) for out in (part, whole)
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_cls_only_sees_the_class_token_alone() -> None:
    for geometry in (CLS, REGISTERS):
        head = build_head("transformer", geometry, 4, "local", "cls-only")
        tokens = tokens_of(geometry)
        assert head(tokens).shape == (3, 6, 4)
        assert reads(head, tokens) == [True] + [False] * (tokens.shape[1] - 1)
    head = build_head("transformer", PLAIN, 4, "local", "cls-only")
    tokens = tokens_of(PLAIN)
    assert torch.allclose(head(tokens), head(tokens[:, [3, 1, 2, 0, 5, 4]]), atol=1e-5)


def test_anonymous_sees_all_tokens_but_not_where_they_are() -> None:
    head = build_head("transformer", CLS, 4, "local", "anonymous")
    tokens = tokens_of(CLS)
    assert all(reads(head, tokens))
    shuffled = tokens[:, [0, 4, 2, 6, 1, 3, 5]]
    assert torch.allclose(head(tokens), head(shuffled), atol=1e-5)
    ordinary = build_head("transformer", CLS, 4, "local")
    assert not torch.allclose(ordinary(tokens), ordinary(shuffled), atol=1e-3)


def test_misuse_is_refused_with_the_known_names() -> None:
    with pytest.raises(UserError, match="known: linear, mlp, transformer; did you mean 'linear'"):
        build_head("linaer", CLS, 4, "local")
    with pytest.raises(UserError, match="unknown probing task"):
        build_head("linear", CLS, 4, "lokal")
    with pytest.raises(UserError, match="not to mlp"):
        build_head("mlp", CLS, 4, "local", "anonymous")
    with pytest.raises(UserError, match="no global task"):
        build_head("transformer", CLS, 4, "global", "cls-only")
    with pytest.raises(UserError, match="unknown intervention"):
        build_head("transformer", CLS, 4, "local", "clsonly")
