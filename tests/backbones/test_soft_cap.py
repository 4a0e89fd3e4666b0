"""Soft-capped attention: the same weights and names, bounded logits, the same result from every back-end."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from timm.layers.attention import Attention
from torch import Tensor

from localign.backbones import SoftCapAttention, create_backbone
from localign.backbones.attention import attention_eager, attention_flex, padded_head_dim, soft_cap
from localign.errors import UserError

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}


def qkv(head_dim: int, tokens: int = 7, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(head_dim)
    shape = (2, 2, tokens, head_dim)
    query, key, value = ((torch.randn(shape, generator=generator) * scale).requires_grad_() for _ in range(3))
    return query, key, value


def test_logits_are_bounded_smoothly() -> None:
    logits = torch.tensor([-1e6, -30.0, 0.0, 1e-3, 30.0, 1e6])
    capped = soft_cap(logits, 30.0)
    assert capped.abs().max() <= 30
    assert torch.allclose(capped[1:5], torch.tensor([-30 * math.tanh(1), 0.0, 1e-3, 30 * math.tanh(1)]))


def test_one_query_by_hand() -> None:
    query = torch.tensor([[[[2.0, 0.0, 0.0, 0.0]]]])
    key = torch.tensor([[[[3.0, 0, 0, 0], [-1.0, 0, 0, 0]]]])
    value = torch.tensor([[[[1.0, 0, 0, 0], [0.0, 1, 0, 0]]]])
    a, b = 2 * math.tanh(6 / 2 / 2), 2 * math.tanh(-2 / 2 / 2)  # logits q.k / sqrt(4), cap 2
    share = math.exp(a) / (math.exp(a) + math.exp(b))
    out = attention_eager(query, key, value, cap=2.0)
    assert torch.allclose(out[0, 0, 0, :2], torch.tensor([share, 1 - share]))


def test_a_softmax_in_bfloat16_rounds_once_all_the_same() -> None:
    inputs = [x.detach().bfloat16().requires_grad_() for x in qkv(16)]
    query, key, value = inputs
    with torch.autocast("cpu", torch.bfloat16):
        ours = attention_eager(query, key, value, cap=5.0)
        logits = 5.0 * torch.tanh((query * (16**-0.5 / 5.0)) @ key.transpose(-2, -1))
        plain = logits.float().softmax(dim=-1) @ value  # autocast rounds the softmax before the product
    assert ours.dtype == plain.dtype == torch.bfloat16
    assert torch.equal(ours, plain)
    slope = torch.ones_like(ours) + ours.detach()
    gradients = [torch.autograd.grad(out, inputs, slope) for out in (ours, plain)]
    # Our gradients are of the rounded softmax, the plain ones of the exact softmax.
    for a, b in zip(*gradients, strict=True):
        assert (a - b).float().norm() < 0.01 * b.float().norm()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("head_dim", [8, 16, 72])
def test_flex_equals_eager(head_dim: int) -> None:
    query, key, value = (x.detach() for x in qkv(head_dim))
    eager = attention_eager(query, key, value, 5.0)
    assert torch.allclose(attention_flex(query, key, value, 5.0), eager, atol=1e-5)
    backbone = create_backbone("vit_tiny_patch16_224", weights="none", image_size=32, model_kwargs=SMALL)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        eager = backbone.copy(soft_cap=1.0, attention="eager").tokens(images)
        assert torch.allclose(backbone.copy(soft_cap=1.0, attention="flex").tokens(images), eager, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_flex_on_the_cpu_refuses_gradients() -> None:
    with pytest.raises(UserError, match="use eager"):
        attention_flex(*qkv(8), cap=5.0)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the fused kernel needs a CUDA device")
@pytest.mark.parametrize("head_dim", [8, 16, 72])
def test_flex_gradients_equal_eager_ones(head_dim: int) -> None:
    torch.set_float32_matmul_precision("highest")
    results = []
    for attend in (attention_eager, attention_flex):
        query, key, value = (x.detach().cuda().requires_grad_() for x in qkv(head_dim, tokens=197, scale=1.5))
        out = attend(query, key, value, 5.0)
        assert out.shape == query.shape
        weight = torch.linspace(-1, 1, out.numel()).view_as(out)
        results.append([out, *torch.autograd.grad((out * weight).sum(), (query, key, value))])
    for ours, other in zip(*results, strict=True):
        assert torch.allclose(ours, other, atol=2e-3)


def test_head_dimensions_are_padded_to_powers_of_two() -> None:
    assert [padded_head_dim(d) for d in (8, 16, 48, 64, 72, 96)] == [16, 16, 64, 64, 128, 128]


@torch.no_grad()
def test_an_infinite_cap_is_ordinary_attention() -> None:
    query, key, value = (x.detach() for x in qkv(8))
    ordinary = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert torch.allclose(attention_eager(query, key, value, 1e5), ordinary, atol=1e-5)
    assert not torch.allclose(attention_eager(query, key, value, 1.0), ordinary, atol=1e-2)
    backbone = create_backbone("vit_tiny_patch16_224", weights="none", image_size=32, model_kwargs=SMALL)
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(backbone.copy(soft_cap=1e5).tokens(images), backbone.tokens(images), atol=1e-5)


def test_names_and_weights_stay_and_the_original_is_untouched() -> None:
    plain = create_backbone("vit_tiny_patch16_224", weights="none", image_size=32, model_kwargs=SMALL)
    capped = plain.copy(soft_cap=30.0)
    before, after = plain.vit.state_dict(), capped.vit.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(type(b.attn) is Attention for b in plain.vit.blocks)
    assert all(isinstance(b.attn, SoftCapAttention) for b in capped.vit.blocks)
    assert (plain.soft_cap, capped.soft_cap) == (None, 30.0)


def test_a_capped_copy_keeps_its_cap_or_takes_a_new_one_and_follows_the_back_end() -> None:
    plain = create_backbone("vit_tiny_patch16_224", weights="none", image_size=32, model_kwargs=SMALL)
    capped = plain.copy(soft_cap=30.0, attention="flex")
    same = capped.copy(attention="eager")
    assert same.soft_cap == 30.0
    assert {(b.attn.cap, b.attn.backend) for b in same.vit.blocks} == {(30.0, "eager")}
    other = capped.copy(soft_cap=5.0)
    assert {(b.attn.cap, b.attn.backend) for b in other.vit.blocks} == {(5.0, "flex")}
    assert {b.attn.cap for b in capped.vit.blocks} == {30.0}


@torch.no_grad()
def test_normed_queries_and_keys_are_respected() -> None:
    kwargs = {**SMALL, "qk_norm": True}
    backbone = create_backbone("vit_tiny_patch16_224", weights="none", image_size=32, model_kwargs=kwargs)
    for block in backbone.vit.blocks:
        block.attn.q_norm.weight.mul_(3)
    images = torch.randn(1, 3, 32, 32)
    assert torch.allclose(backbone.copy(soft_cap=1e5).tokens(images), backbone.tokens(images), atol=1e-5)


@pytest.mark.parametrize("name", ["eva02_base_patch16_clip_224", "beit_base_patch16_224"])
def test_families_with_positions_in_their_logits_refuse_the_cap(name: str) -> None:
    backbone = create_backbone(name, weights="none", image_size=32, model_kwargs=SMALL)
    with pytest.raises(UserError, match="--soft-cap none"):
        backbone.copy(soft_cap=30.0)


def test_bad_arguments_are_named() -> None:
    def attention(**kwargs: Any) -> Attention:
        return Attention(8, num_heads=2, **kwargs)

    with pytest.raises(UserError, match="above 0"):
        SoftCapAttention(attention(), 0.0)
    with pytest.raises(UserError, match="flash"):
        SoftCapAttention(attention(), 30.0, "flash")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="dropout"):
        SoftCapAttention(attention(attn_drop=0.1), 30.0)
    with pytest.raises(NotImplementedError):
        SoftCapAttention(attention(), 30.0)(torch.zeros(1, 2, 8), is_causal=True)
