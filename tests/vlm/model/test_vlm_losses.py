"""The next-token loss: the chunked loss equals the whole loss, for each language model's own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_vlm import TEXT_WIDTH, tiny_llm
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
)
from vlm_models import mixed_records, packed, padded, tiny_vlm

from localign.vlm.data.prompts import IGNORE_INDEX
from localign.vlm.model.losses import LMHead, next_token_loss, next_token_targets, summed_cross_entropy


def test_targets_are_the_next_tokens_labels_within_a_sequence() -> None:
    labels = torch.tensor([[1, 2, 3, 4, 5]])
    assert next_token_targets(labels).tolist() == [[2, 3, 4, 5, IGNORE_INDEX]]
    borders = torch.tensor([0, 2, 3, 5], dtype=torch.int32)
    assert next_token_targets(labels, borders).tolist() == [[2, IGNORE_INDEX, IGNORE_INDEX, 5, IGNORE_INDEX]]
    assert labels.tolist() == [[1, 2, 3, 4, 5]]


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_the_chunked_loss_is_the_whole_loss_and_so_are_its_gradients(chunk: int) -> None:
    head = torch.nn.Linear(8, 50)
    hidden, targets = torch.randn(7, 8), torch.randint(50, (7,))
    results = []
    for chunked in (True, False):
        x = hidden.clone().requires_grad_()
        head.zero_grad()
        if chunked:
            loss = summed_cross_entropy(x, targets, head, chunk=chunk)
        else:
            loss = F.cross_entropy(head(x), targets, reduction="sum")
        (3 * loss).backward()
        assert head.weight.grad is not None
        assert head.bias.grad is not None
        results.append([loss.detach(), x.grad, head.weight.grad.clone(), head.bias.grad.clone()])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)


def test_the_loss_over_zero_tokens_is_zero_and_reaches_every_parameter() -> None:
    head = torch.nn.Linear(8, 50)
    x = torch.randn(2, 8, requires_grad=True)
    loss = summed_cross_entropy(x[:0], torch.empty(0, dtype=torch.int64), head, chunk=4)
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


def test_the_sum_over_bfloat16_states_is_float32() -> None:
    head = torch.nn.Linear(8, 50).bfloat16()
    hidden, targets = torch.randn(3000, 8).bfloat16(), torch.randint(50, (3000,))
    loss = summed_cross_entropy(hidden, targets, head, chunk=64)
    expected = F.cross_entropy(head(hidden).float(), targets, reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-5)


def test_only_labelled_tokens_are_projected_and_never_more_than_a_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokenizer = tiny_vlm()
    batch = packed(mixed_records(model, tokenizer))
    monkeypatch.setattr("localign.vlm.model.losses.CHUNK_LOGITS", 4 * model.config.text_config.vocab_size)
    sizes: list[int] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    with torch.no_grad():
        result = model(**batch)
    assert result.logits is None
    assert max(sizes) == 4
    assert sum(sizes) == int(result.label_count) < batch["input_ids"].numel()


SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.5,
}


@pytest.mark.parametrize(
    "language_model",
    [
        lambda: tiny_llm("llama"),
        lambda: tiny_llm("qwen", tie_word_embeddings=True),
        lambda: Gemma2ForCausalLM(
            Gemma2Config(**SIZES, attn_logit_softcapping=None, final_logit_softcapping=3.0)
        ),
        lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
        lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=TEXT_WIDTH, n_layer=1, n_head=4)),
    ],
    ids=["llama", "qwen-tied", "gemma2", "cohere", "granite", "gpt2"],
)
def test_the_loss_equals_the_loss_of_the_language_models_logits(language_model: Any) -> None:
    model, tokenizer = tiny_vlm(language_model().eval())
    batch = padded(mixed_records(model, tokenizer), tokenizer.pad_token_id)
    labels = batch.pop("labels")
    with torch.no_grad():
        result = model(**batch, labels=labels)
        logits = model(**batch).logits
    targets = next_token_targets(labels)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert int(result.label_count) == int((targets != IGNORE_INDEX).sum()) > 0
    torch.testing.assert_close(result.loss_sum, expected, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(result.loss, expected / result.label_count, atol=1e-5, rtol=1e-5)


def test_the_head_reaches_the_loss_only_through_labelled_tokens() -> None:
    labels = torch.full((2, 5), IGNORE_INDEX)
    head = LMHead(torch.nn.Linear(8, 259), tiny_llm().config)
    loss, count = next_token_loss(torch.randn(2, 5, 8), labels, head)
    assert (loss.item(), count.item()) == (0, 0)
