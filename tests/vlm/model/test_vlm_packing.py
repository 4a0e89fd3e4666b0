"""Conversations packed into one row give the loss and gradients that they give one by one."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_vlm import TEXT_WIDTH
from torch import Tensor
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from vlm_models import Encoded, mixed_records, packed, padded, tiny_vlm

from localign.errors import UserError
from localign.vlm import LocalignVLM
from localign.vlm.model.attention import PACKED_SDPA, has_varlen_kernel, packed_sdpa

TOLERANCE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


def gradients(model: LocalignVLM, batches: list[dict[str, Tensor]]) -> tuple[float, int, dict[str, Tensor]]:
    """Loss per labelled token over all batches, number of labelled tokens, and the loss's gradients."""
    model.zero_grad()
    results = [model(**batch) for batch in batches]
    count = sum(int(r.label_count) for r in results)
    loss = sum(r.loss_sum for r in results) / count
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), count, grads


def alone(records: list[Encoded]) -> list[dict[str, Tensor]]:
    rows = [{"input_ids": r.ids[None], "labels": r.labels[None]} for r in records]
    return [
        row | ({"pixel_values": r.image} if len(r.image) else {})
        for row, r in zip(rows, records, strict=True)
    ]


def assert_same(one: Any, other: Any) -> None:
    assert one[1] == other[1]
    assert one[0] == pytest.approx(other[0], abs=1e-5)
    assert set(one[2]) == set(other[2])
    for name, grad in one[2].items():
        torch.testing.assert_close(other[2][name], grad, **TOLERANCE, msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.mark.parametrize("attention", [PACKED_SDPA, "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_a_packed_row_equals_its_sequences_one_by_one(kind: str, attention: str) -> None:
    model, tokenizer = tiny_vlm(kind)
    model.language_model.set_attn_implementation(attention)
    model.train()
    records = mixed_records(model, tokenizer)
    expected = gradients(model, alone(records))
    assert_same(expected, gradients(model, [packed(records)]))
    assert any(grad.abs().max() > 1e-3 for grad in expected[2].values())


def test_rows_padded_on_the_right_give_the_same() -> None:
    model, tokenizer = tiny_vlm()
    records = mixed_records(model, tokenizer)
    together = padded(records, tokenizer.pad_token_id)
    assert_same(gradients(model, alone(records)), gradients(model, [together]))


def test_the_order_in_a_row_and_the_number_of_rows_do_not_matter() -> None:
    model, tokenizer = tiny_vlm()
    records = mixed_records(model, tokenizer)
    expected = gradients(model, [packed(records)])
    assert_same(expected, gradients(model, [packed(records[::-1])]))
    assert_same(expected, gradients(model, [packed(records[:2]), packed(records[2:])]))


SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "sliding_window": 5,
}


def mistral() -> Any:
    return MistralForCausalLM(MistralConfig(**SIZES))


def qwen() -> Any:
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, use_sliding_window=True, max_window_layers=1))


def gpt_oss() -> Any:
    return GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))


@pytest.mark.parametrize(
    ("language_model", "attention"),
    [(mistral, PACKED_SDPA), (mistral, "eager"), (qwen, PACKED_SDPA), (qwen, "sdpa"), (gpt_oss, "eager")],
)
def test_a_sliding_window_stays_within_its_sequence(language_model: Any, attention: str) -> None:
    model, tokenizer = tiny_vlm(language_model().eval())
    model.language_model.set_attn_implementation(attention)
    records = mixed_records(model, tokenizer)
    assert_same(gradients(model, alone(records)), gradients(model, [packed(records)]))


def test_gradient_checkpointing_changes_nothing() -> None:
    model, tokenizer = tiny_vlm()
    model.train()
    records = mixed_records(model, tokenizer)
    expected = gradients(model, [packed(records)])
    runs: list[int] = []
    model.language_model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable()  # type: ignore[no-untyped-call]
    assert_same(expected, gradients(model, [packed(records)]))
    assert len(runs) == 2, "the first block runs again in the backward pass"


@torch.no_grad()
def test_no_token_is_predicted_across_a_border() -> None:
    model, _ = tiny_vlm()
    ids = torch.arange(10, 17)[None]
    row = {
        "input_ids": ids,
        "labels": ids,
        "position_ids": torch.tensor([[0, 1, 2, 0, 0, 1, 2]]),
        "cu_seqlens": torch.tensor([0, 3, 4, 7], dtype=torch.int32),
    }
    together = model(**row)
    assert int(together.label_count) == 2 + 0 + 2
    parts = [model(input_ids=part, labels=part) for part in (ids[:, :3], ids[:, 4:])]
    torch.testing.assert_close(together.loss_sum, parts[0].loss_sum + parts[1].loss_sum)
    torch.testing.assert_close(together.loss, together.loss_sum / 4)
    assert int(model(input_ids=ids, labels=ids).label_count) == 6


def test_logits_of_a_packed_row_are_those_of_its_sequences() -> None:
    model, tokenizer = tiny_vlm()
    records = mixed_records(model, tokenizer)
    row = packed(records)
    row.pop("labels")
    logits = model(**row).logits[0]
    expected = [
        model(input_ids=r.ids[None], pixel_values=r.image if len(r.image) else None).logits[0]
        for r in records
    ]
    torch.testing.assert_close(logits, torch.cat(expected), **TOLERANCE)


def test_sequences_may_not_be_longer_than_the_positions_but_rows_may() -> None:
    model, tokenizer = tiny_vlm()
    records = mixed_records(model, tokenizer)
    model.config.text_config.max_position_embeddings = longest = max(len(r.ids) for r in records)
    row = packed(records)
    assert longest < row["input_ids"].shape[1]
    model(**row)
    model.config.text_config.max_position_embeddings = longest - 1
    message = f"sequence of {longest} tokens is longer than the language model's {longest - 1} positions"
    with pytest.raises(UserError, match=message):
        model(**row)
    with pytest.raises(UserError, match=message):
        model(**alone(records)[2])


def test_a_recurrent_language_model_refuses_packed_rows() -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 259,
        "hidden_size": TEXT_WIDTH,
        "state_size": 4,
        "num_hidden_layers": 1,
    }
    model, tokenizer = tiny_vlm(MambaForCausalLM(MambaConfig(**sizes)))
    row = packed(mixed_records(model, tokenizer))
    with pytest.raises(UserError, match="MambaForCausalLM cannot keep packed sequences apart"):
        model(**row)


def test_unsupported_layer_types_refuse_packed_rows() -> None:
    model, tokenizer = tiny_vlm("qwen")
    row = packed(mixed_records(model, tokenizer))
    model.language_model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(UserError, match="cannot keep packed sequences apart"):
        model(**row)


def test_a_packed_row_is_the_only_row_and_has_positions() -> None:
    model, tokenizer = tiny_vlm()
    row = packed(mixed_records(model, tokenizer))
    positions = row.pop("position_ids")
    with pytest.raises(ValueError, match="packed row"):
        model(**row)
    with pytest.raises(ValueError, match="packed row"):
        model(**row, position_ids=positions, past_key_values=object())


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, *_: Any, **options: Any
) -> Tensor:
    """A slow version of the varlen kernel, after its documentation."""
    assert options["enable_gqa"] == (query.shape[1] != key.shape[1])
    left, right = options["window_size"]
    outputs = []
    for start, stop in zip(borders.tolist(), borders[1:].tolist(), strict=False):
        q, k, v = (x[start:stop].transpose(0, 1)[None] for x in (query, key, value))
        distance = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        visible = (distance >= -right) & ((distance <= left) | (left < 0))
        grouped = query.shape[1] != key.shape[1]
        output = F.scaled_dot_product_attention(q, k, v, visible, scale=options["scale"], enable_gqa=grouped)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_kernel_is_called_as_documented(
    kv_heads: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    borders = torch.tensor([0, 7, 8, 20], dtype=torch.int32)
    query, key, value = (torch.randn(1, heads, 20, 8) for heads in (4, kv_heads, kv_heads))
    layer = torch.nn.Module()
    layer.num_key_value_groups = 4 // kv_heads  # type: ignore[assignment]
    options: dict[str, Any] = {"scaling": 0.3, "sliding_window": window, "cu_seq_lens_q": borders}
    expected, _ = packed_sdpa(layer, query, key, value, None, **options)
    monkeypatch.setattr("localign.vlm.model.attention.VARLEN", flash_attention)
    monkeypatch.setattr("localign.vlm.model.attention.has_varlen_kernel", lambda *_: True)
    output, _ = packed_sdpa(layer, query, key, value, None, **options, max_length_q=12)
    torch.testing.assert_close(output, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's varlen attention needs a CUDA device")
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_varlen_kernel_equals_one_call_per_sequence(kv_heads: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    cu_seqlens = torch.tensor([0, 70, 71, 200, 256], dtype=torch.int32, device="cuda")
    shapes = [(1, heads, 256, 64) for heads in (4, kv_heads, kv_heads)]
    layer = torch.nn.Module()
    layer.num_key_value_groups = 4 // kv_heads  # type: ignore[assignment]
    results = []
    for longest in (129, None):  # without max_length_q the kernel is not used
        inputs = [
            torch.randn(s, generator=generator.manual_seed(1)).to("cuda", torch.bfloat16) for s in shapes
        ]
        query, key, value = inputs = [x.requires_grad_() for x in inputs]
        assert has_varlen_kernel(query, value, 0.0)
        options: dict[str, Any] = {"sliding_window": window, "cu_seq_lens_q": cu_seqlens}
        output, _ = packed_sdpa(layer, query, key, value, None, **options, max_length_q=longest)
        output.float().square().sum().backward()
        results.append([output.float(), *(x.grad.float() for x in inputs if x.grad is not None)])
    for kernel, loop in zip(*results, strict=True):
        torch.testing.assert_close(kernel, loop, atol=3e-2, rtol=3e-2)
