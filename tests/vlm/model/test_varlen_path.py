"""Which attention packed rows take on CUDA: seen on fake CUDA tensors, through whole Llama and Qwen models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from localign.vlm.model import attention
from localign.vlm.model.attention import packed_arguments, packed_sdpa, use_packed_attention

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),  # norms of queries and keys in float32
}


@contextmanager
def autocast_of_fake_cuda() -> Iterator[None]:
    """bf16 autocast; ``torch.autocast`` turns itself off where there is no GPU."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


class Kernel:
    """Stands for torch's varlen attention, with the arguments of one of its versions."""

    def __init__(self, *lacking: str) -> None:
        names = {"window_size", "scale", "enable_gqa"} - set(lacking)
        self.arguments = frozenset(names)
        self.calls: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = []

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, borders: Tensor, _: Tensor, *longest: int, **options: Any
    ) -> Tensor:
        if unknown := options.keys() - self.arguments:
            raise TypeError(f"unexpected keyword arguments {sorted(unknown)}")
        if "enable_gqa" not in self.arguments and q.shape[1] != k.shape[1]:
            raise ValueError("queries, keys and values must have the same number of heads")
        self.calls.append(((q, k, v), options))
        return torch.empty_like(q)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Kernel:
        monkeypatch.setattr(attention, "VARLEN", self)
        monkeypatch.setattr(attention, "VARLEN_ARGUMENTS", self.arguments)
        return self


@pytest.mark.parametrize("lacking", [(), ("enable_gqa",)], ids=["torch 2.14", "torch 2.11"])
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_takes_the_kernel_in_bf16_under_autocast(
    name: str, lacking: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(*lacking).install(monkeypatch)
    monkeypatch.setattr(attention, "_by_sequence", None)  # calling it would fail
    with FakeTensorMode(), torch.device("cuda"):
        model: Any = MODELS[name]()
        use_packed_attention(model)
        embeddings = torch.empty(1, 12, SIZES["hidden_size"])
        positions = torch.zeros(1, 12, dtype=torch.int64)
        borders = torch.zeros(4, dtype=torch.int32)
        with autocast_of_fake_cuda():
            arguments = packed_arguments(model, embeddings, positions, borders, 6)
            model.get_decoder()(
                inputs_embeds=embeddings, position_ids=positions, use_cache=False, **arguments
            )
    assert len(kernel.calls) == SIZES["num_hidden_layers"]
    for tensors, _ in kernel.calls:
        assert {x.dtype for x in tensors} == {torch.bfloat16}
        assert {x.device.type for x in tensors} == {"cuda"}


def test_float32_without_autocast_takes_one_call_per_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel().install(monkeypatch)
    used: list[str] = []

    def by_sequence(layer: torch.nn.Module, query: Tensor, *_: Any) -> Tensor:
        used.append(query.device.type)
        return query

    monkeypatch.setattr(attention, "_by_sequence", by_sequence)
    with FakeTensorMode(), torch.device("cuda"):
        q = torch.empty(1, 4, 12, 8)
        packed_sdpa(
            torch.nn.Module(),
            q,
            q,
            q,
            None,
            cu_seq_lens_q=torch.zeros(3, dtype=torch.int32),
            max_length_q=7,
        )
    assert used == ["cuda"]
    assert not kernel.calls


@pytest.mark.parametrize("lacking", [(), ("enable_gqa",), ("scale",), ("scale", "enable_gqa")])
def test_an_argument_that_the_kernel_lacks_changes_nothing(
    lacking: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    borders = torch.tensor([0, 7, 8, 20], dtype=torch.int32)
    query, key, value = (torch.randn(1, heads, 20, 8) for heads in (4, 2, 2))
    layer = torch.nn.Module()
    layer.num_key_value_groups = 2  # type: ignore[assignment]
    options: dict[str, Any] = {"scaling": 0.3, "sliding_window": None, "cu_seq_lens_q": borders}
    expected, _ = packed_sdpa(layer, query, key, value, None, **options)
    kernel = Kernel(*lacking).install(monkeypatch)
    monkeypatch.setattr(attention, "has_varlen_kernel", lambda *_: True)
    packed_sdpa(layer, query, key, value, None, **options, max_length_q=12)
    ((q, k, v), given) = kernel.calls[0]
    for start, stop in ((0, 7), (7, 8), (8, 20)):
        one, two, three = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
        output = F.scaled_dot_product_attention(
            one,
            two,
            three,
            is_causal=True,
            scale=given.get("scale"),
            enable_gqa=given.get("enable_gqa", False),
        )
        torch.testing.assert_close(output[0].transpose(0, 1), expected[0, start:stop])


def whole_row(q: Tensor, k: Tensor, v: Tensor, *_: Any, scale: float, enable_gqa: bool, **__: Any) -> Tensor:
    """Stands for the kernel where only the graph matters: all sequences as one."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa)
    return output[0].transpose(0, 1)


@pytest.mark.parametrize("by_kernel", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_compiled_layers_are_one_graph_with_the_kernel(
    name: str, by_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `--compile` compiles them, in bf16 autocast, over rows of several lengths."""
    if by_kernel:
        monkeypatch.setattr(attention, "VARLEN", whole_row)
        monkeypatch.setattr(attention, "has_varlen_kernel", lambda *_: True)
    torch._dynamo.reset()
    model: Any = MODELS[name]()
    use_packed_attention(model)
    for layer in model.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        for tokens in (12, 20, 9):
            embeddings = torch.randn(1, tokens, SIZES["hidden_size"])
            positions = torch.arange(tokens)[None]
            borders = torch.tensor([0, tokens - 6, tokens], dtype=torch.int32)
            arguments = packed_arguments(model, embeddings, positions, borders, tokens - 6)
            arguments |= {"inputs_embeds": embeddings, "position_ids": positions, "use_cache": False}
            if by_kernel:
                model.model(**arguments)
            else:
                with pytest.raises(torch._dynamo.exc.TorchDynamoException):
                    model.model(**arguments)
                return
