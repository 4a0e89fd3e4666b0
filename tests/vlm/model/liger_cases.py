"""Tests of the loss by liger-kernel; `test_vlm_liger.py` runs them, without a GPU in Triton's interpreter."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import liger_kernel.ops.cross_entropy
import pytest
import torch
import torch.distributed as dist
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import CohereConfig, CohereForCausalLM
from vlm_models import mixed_records, packed, tiny_vlm

from localign.engine.sharding import shard
from localign.options.names import CrossEntropy
from localign.vlm.data.prompts import IGNORE_INDEX
from localign.vlm.model.losses import LMHead, next_token_loss

WIDTH, VOCABULARY = 12, 70
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAYS: tuple[CrossEntropy, ...] = ("chunked", "liger")


class Cap(float):
    """A float with a ``to`` method, as in a compiled kernel; Triton's interpreter passes plain floats."""

    def to(self, dtype: object) -> Cap:
        return self


if DEVICE == "cpu":
    # The interpreter lacks CUDA's library functions.
    liger_kernel.ops.cross_entropy.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1
CAP: float = Cap(2.0) if DEVICE == "cpu" else 2.0


class LossAndGradients(dict[str, Any]):
    """The loss, and the gradients by name; None for a tensor without gradient."""


def loss_and_gradients(
    cross_entropy: CrossEntropy,
    config: dict[str, Any],
    *,
    bias: bool = False,
    share: float = 0.6,
    factor: float = 3.0,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
    trained: tuple[str, ...] = ("hidden", "head"),
) -> LossAndGradients:
    """The loss of random hidden states, a ``share`` of which is learned, with a random output layer of ``dtype``."""
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, VOCABULARY, bias=bias).to(dtype).requires_grad_("head" in trained)
    hidden = torch.randn(2, 15, WIDTH, dtype=dtype)
    labels = torch.randint(VOCABULARY, (2, 15))
    labels[torch.rand(2, 15) >= share] = IGNORE_INDEX
    layer, labels = layer.to(DEVICE), labels.to(DEVICE)
    hidden = hidden.to(DEVICE).requires_grad_("hidden" in trained)
    head = LMHead(layer, SimpleNamespace(vocab_size=VOCABULARY, **config))
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        loss, count = next_token_loss(hidden, labels, head, cross_entropy=cross_entropy)
    assert int(count) == int((labels[:, 1:] != IGNORE_INDEX).sum())
    if loss.requires_grad:
        (factor * loss).backward()
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    return LossAndGradients(loss=loss.detach(), hidden=hidden.grad, **gradients)


def assert_close(ours: LossAndGradients, other: LossAndGradients, share: float) -> None:
    """Tensors differ at most by a share of their norm."""
    for name, tensor in ours.items():
        assert tensor.dtype == other[name].dtype, name
        difference = (tensor.float() - other[name].float()).norm()
        assert difference <= share * other[name].float().norm(), name


HEADS = {
    "plain": ({}, False),
    "bias": ({}, True),
    "soft-capped": ({"final_logit_softcapping": CAP}, False),
    "scaled": ({"logit_scale": 0.3}, False),
    "scaled, with a bias, soft-capped": ({"logits_scaling": 0.4, "final_logit_softcapping": CAP}, True),
}


@pytest.mark.parametrize(("config", "bias"), HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(("share", "factor"), [(0.6, 3.0), (0.6, 1.0), (1.1, 0.2)])
def test_loss_and_gradients_are_those_of_the_chunks(
    config: dict[str, Any], bias: bool, share: float, factor: float
) -> None:
    ours, other = (loss_and_gradients(way, config, bias=bias, share=share, factor=factor) for way in WAYS)
    assert ours["loss"] > 0
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("autocast", [False, True])
def test_without_tokens_loss_and_gradients_are_zero(autocast: bool) -> None:
    result = loss_and_gradients("liger", {}, bias=True, share=0.0, autocast=autocast)
    assert list(result) == ["loss", "hidden", "weight", "bias"]
    assert not any(tensor.any() for tensor in result.values())


@pytest.mark.parametrize(("config", "bias"), HEADS.values(), ids=HEADS)
def test_bfloat16_weights_give_a_float32_loss(config: dict[str, Any], bias: bool) -> None:
    ours, other = (loss_and_gradients(way, config, bias=bias, dtype=torch.bfloat16) for way in WAYS)
    assert ours["loss"].dtype == torch.float32
    assert_close(ours, other, 0.015)


@pytest.mark.parametrize(("config", "bias"), HEADS.values(), ids=HEADS)
def test_autocast_computes_in_bfloat16_and_gives_float32(config: dict[str, Any], bias: bool) -> None:
    ours, other = (loss_and_gradients(way, config, bias=bias, autocast=True) for way in WAYS)
    exact = loss_and_gradients("chunked", config, bias=bias)
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}
    for reference in (other, exact):
        assert_close(ours, reference, 0.015)
    with pytest.raises(AssertionError):
        assert_close(ours, exact, 1e-4)


def test_gradients_of_bfloat16_weights_are_summed_in_float32() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 256, bias=False, dtype=torch.bfloat16, device=DEVICE)
    hidden = torch.randn(1, 257, 4, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    labels = torch.randint(256, (1, 257), device=DEVICE)
    results = []
    for way in WAYS:
        output = layer if way == "liger" else copy.deepcopy(layer).double()
        head = LMHead(output, SimpleNamespace(vocab_size=256))
        loss, _ = next_token_loss(hidden.to(output.weight.dtype), labels, head, cross_entropy=way)
        loss.backward()
        assert output.weight.grad is not None
        results.append(output.weight.grad.double())
    # liger computes chunks of 4 tokens here; 64 sums in bfloat16 would have an error of 0.009.
    exact, rounded = results
    assert (rounded - exact).norm() < 0.006 * exact.norm()


def test_a_frozen_output_layer_gets_no_gradient() -> None:
    ours, other = (loss_and_gradients(way, {}, bias=True, trained=("hidden",)) for way in WAYS)
    assert ours["weight"] is None
    assert ours["bias"] is None
    torch.testing.assert_close(ours["hidden"], other["hidden"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_an_output_layer_trained_on_frozen_states_gets_its_gradient(autocast: bool) -> None:
    ours, other = (
        loss_and_gradients(way, {}, bias=True, trained=("head",), autocast=autocast) for way in WAYS
    )
    assert ours.pop("hidden") is other.pop("hidden") is None
    assert_close(ours, other, 0.015 if autocast else 1e-5)


def test_without_gradients_the_loss_is_the_same() -> None:
    with torch.no_grad():
        ours, other = (loss_and_gradients(way, {}, bias=True) for way in WAYS)
    torch.testing.assert_close(ours["loss"], other["loss"], atol=1e-5, rtol=1e-5)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}


@pytest.mark.parametrize("kind", ["llama", "qwen", "cohere"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_models_gradients_are_those_of_the_chunks(kind: str, sharded: bool) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    cohere = CohereConfig(vocab_size=259, logit_scale=0.25, **sizes, **heads)
    if kind == "cohere":
        torch.manual_seed(0)
        model, tokenizer = tiny_vlm(CohereForCausalLM(cohere).eval())
    else:
        model, tokenizer = tiny_vlm(kind, tie_word_embeddings=kind == "qwen")
    batch = {name: value.to(DEVICE) for name, value in packed(mixed_records(model, tokenizer)).items()}
    results = []
    for way in WAYS:
        copied: Any = copy.deepcopy(model)
        copied.to(DEVICE).train()
        if sharded:
            if not dist.is_initialized():
                dist.init_process_group(
                    "nccl" if DEVICE == "cuda" else "gloo",
                    rank=0,
                    world_size=1,
                    store=dist.HashStore(),  # type: ignore[attr-defined]
                )
            shard(
                copied,
                list(copied.language_model.get_decoder().layers),
                (copied.vision,),
                mesh=init_device_mesh(DEVICE, (1,)),
                compute_dtype=None,
                reduce_dtype=torch.float32,
            )
        # The second micro-batch has no labels.
        losses = [
            copied(**batch | labels, cross_entropy=way).loss_sum
            for labels in ({}, {"labels": torch.full_like(batch["labels"], IGNORE_INDEX)})
        ]
        for loss in losses:
            loss.backward()
        results.append({"loss": sum(losses), **gradients(copied)})
    ours, other = results
    assert ours.keys() == other.keys()
    assert "language_model.model.embed_tokens.weight" in ours
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, other[name], atol=2e-5, rtol=1e-4, msg=name)
