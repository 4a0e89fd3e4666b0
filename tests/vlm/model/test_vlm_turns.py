"""Independent turns: each gives the loss of a record of its own, although they share the image tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_vlm import TEXT_WIDTH, tiny_tokenizer
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM
from vlm_models import picture, tiny_processor, tiny_vlm

from localign.errors import UserError
from localign.vlm import LocalignVLM
from localign.vlm.data.batching import packed_row, padded_rows
from localign.vlm.data.dialects import Record
from localign.vlm.data.examples import ConversationTokenizer, Example, NothingToLearn
from localign.vlm.data.prompts import IGNORE_INDEX, prompt_format
from localign.vlm.model.attention import PACKED_SDPA, check_independent_turns, turns_mask

TURNS = [("What is it?", "a cat"), ("Where?", "at the left, below the table"), ("How many?", "1")]
RECORDS = [
    Record("r", "images/0.png", tuple(TURNS)),
    Record("r", None, tuple(TURNS[:2])),
    Record("r", "images/1.png", (TURNS[1],)),
]


def encoder(
    tokenizer: Any, prompt: str = "in-out", max_length: int = 2000, **options: Any
) -> ConversationTokenizer:
    return ConversationTokenizer(prompt_format(prompt), tokenizer, 4, max_length, **options)


def tokenizer_with_image() -> Any:
    tokenizer = tiny_tokenizer(pad=True)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer


def single(record: Record) -> list[Record]:
    return [Record("r", record.image, (turn,)) for turn in record.turns]


def sums(model: LocalignVLM, batches: list[dict[str, Tensor]]) -> tuple[Tensor, int, dict[str, Tensor]]:
    model.zero_grad()
    outputs = [model(**batch) for batch in batches]
    loss = sum(output.loss_sum for output in outputs)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), sum(int(output.label_count) for output in outputs), grads


def batch(
    model: LocalignVLM, tokenizer: Any, records: list[Record], examples: list[Example], packed: bool
) -> Any:
    rows = packed_row(examples) if packed else padded_rows(examples, tokenizer.pad_token_id)
    transform = tiny_processor(model, tokenizer).image_transform()
    images = [transform(picture(int(r.image[7:-4]))) for r in records if r.image]
    return {**rows._asdict(), **({"pixel_values": torch.stack(images)} if images else {})}


@pytest.mark.parametrize("prompt", ["in-out", "vicuna"])
@pytest.mark.parametrize("attention", [PACKED_SDPA, "eager", "sdpa"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_loss_and_gradients_are_those_of_records_of_one_turn(
    kind: str, packed: bool, attention: str, prompt: str
) -> None:
    model, tokenizer = tiny_vlm(kind, pad=True, max_position_embeddings=2048)
    model.language_model.set_attn_implementation(attention)
    model.train()
    apart = encoder(tokenizer, prompt, independent=True)
    together = batch(model, tokenizer, RECORDS, [apart(r) for r in RECORDS], packed)
    if packed and attention != PACKED_SDPA:
        with pytest.raises(UserError, match="packed rows of independent turns need --llm-attention sdpa"):
            model(**together)
        return
    one_turn = encoder(tokenizer, prompt)
    alone = [
        batch(model, tokenizer, [r], [one_turn(r)], packed=False)
        for record in RECORDS
        for r in single(record)
    ]
    expected, ours = sums(model, alone), sums(model, [together])
    assert ours[1] == expected[1]
    torch.testing.assert_close(ours[0], expected[0], atol=1e-4, rtol=1e-6)
    assert ours[2].keys() == expected[2].keys()
    for name, grad in expected[2].items():
        torch.testing.assert_close(ours[2][name], grad, atol=1e-4, rtol=1e-4, msg=lambda m: f"{name}: {m}")  # noqa: B023
    conversation = batch(model, tokenizer, RECORDS, [one_turn(r) for r in RECORDS], packed)
    assert abs(float(sums(model, [conversation])[0] - expected[0])) > 1e-2, (
        "the test would notice visible turns"
    )


def test_tokens_labels_and_positions_are_those_of_single_turns() -> None:
    tokenizer = tokenizer_with_image()
    one_turn = encoder(tokenizer)
    example = encoder(tokenizer, independent=True)(RECORDS[0])
    alone = [one_turn(record) for record in single(RECORDS[0])]
    assert example.turns is not None
    assert all(part.turns is None for part in alone)
    shared = example.turns == 0
    assert int(shared.sum()) == 5, "beginning of sequence and image"
    for number, part in enumerate(alone, start=1):
        own = shared | (example.turns == number)
        assert torch.equal(example.input_ids[own], part.input_ids)
        assert torch.equal(example.labels[own], part.labels)
        assert torch.equal(example.position_ids[own], part.position_ids)
        assert part.position_ids.tolist() == list(range(len(part.input_ids)))


def test_the_mask_in_a_small_case() -> None:
    mask = turns_mask(torch.tensor([[0, 1, 1, 2, 0]]), torch.tensor([[1, 1, 1, 1, 0]]))
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [1, 0, 0, 0, 1],  # padding attends to itself, because a query without keys gives NaN
    ]


def test_independent_turns_are_truncated_at_the_limit() -> None:
    tokenizer = tokenizer_with_image()
    whole = encoder(tokenizer, independent=True)(RECORDS[0])
    cut = encoder(tokenizer, max_length=40, independent=True)(RECORDS[0])
    assert whole.turns is not None
    assert cut.turns is not None
    assert len(cut.input_ids) == 40
    for ours, theirs in ((cut.turns, whole.turns), (cut.position_ids, whole.position_ids)):
        assert torch.equal(ours, theirs[:40])
    assert not (cut.labels == IGNORE_INDEX).all()
    with pytest.raises(NothingToLearn):
        encoder(tokenizer, max_length=9, independent=True)(RECORDS[0])
    published = encoder(tokenizer, max_length=40, independent=True, text_limit=True)(RECORDS[0])
    assert len(published.input_ids) == 44


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda llm: llm.set_attn_implementation("flex_attention"), "not flex_attention"),
        (lambda llm: None, "MistralForCausalLM cannot keep turns apart"),
    ],
)
def test_models_that_cannot_keep_turns_apart(change: Any, message: str) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": TEXT_WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    llm = MistralForCausalLM(
        MistralConfig(**sizes, num_key_value_heads=2, intermediate_size=8, sliding_window=5)
    )
    change(llm)
    with pytest.raises(UserError, match=message):
        check_independent_turns(llm)
