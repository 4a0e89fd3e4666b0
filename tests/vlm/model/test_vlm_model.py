"""The model: its parts and generation."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from tiny_vlm import TEXT_WIDTH, tiny_llm, tiny_tokenizer
from torch import Tensor
from transformers import (
    PreTrainedModel,
)
from vlm_models import QUESTIONS, mixed_records, packed, picture, tiny_processor, tiny_tower, tiny_vlm

from localign.errors import UserError
from localign.vlm import LocalignVLM, LocalignVLMConfig
from localign.vlm.model.adapters import fresh_adapter

NEW = 7


# Parts


def test_parts_are_joined_with_a_padding_and_an_image_token() -> None:
    model, tokenizer = tiny_vlm()
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<PAD>", 259)
    assert tokenizer.convert_ids_to_tokens(model.config.image_token_id) == "<image>"
    assert model.config.text_config.vocab_size == 320
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert layer.weight.shape == (320, TEXT_WIDTH)
    assert model.config.text_config.pad_token_id == model.generation_config.pad_token_id == 259
    assert model.generation_config.eos_token_id == [1]


@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_growing_the_vocabulary_leaves_the_known_rows(kind: str) -> None:
    before = tiny_llm(kind, tie_word_embeddings=kind == "qwen")
    old = {name: value.clone() for name, value in before.state_dict().items()}
    model, _ = tiny_vlm(before)
    for name, value in model.language_model.state_dict().items():
        rows = len(old[name])
        assert torch.equal(value[:rows], old[name]), name
        if len(value) > rows:
            torch.testing.assert_close(value[rows:], old[name].mean(0).expand(len(value) - rows, -1))
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (kind == "qwen")


def test_an_existing_padding_token_and_enough_rows_are_kept() -> None:
    tokenizer = tiny_tokenizer(pad=True)
    llm = tiny_llm(vocab_size=384)
    tower = tiny_tower()
    model = LocalignVLM.from_parts(tower, fresh_adapter("mlp", tower, TEXT_WIDTH), llm, tokenizer)
    assert tokenizer.pad_token_id == 3
    assert model.config.text_config.pad_token_id == 3
    assert model.language_model.get_input_embeddings().weight.shape[0] == 384


def test_a_language_model_without_a_padding_token_cannot_be_built_from_a_config() -> None:
    model, _ = tiny_vlm()
    config: Any = LocalignVLMConfig.from_dict(model.config.to_dict())
    config.text_config.pad_token_id = None
    with pytest.raises(UserError, match="no padding token"):
        LocalignVLM(config)


def test_an_adapter_of_another_width_is_refused_with_both_names() -> None:
    tower = tiny_tower()
    adapter = fresh_adapter("mlp", tower, 48)
    with pytest.raises(UserError, match=r"mlp adapter .* 48 channels.*llama.* takes 32"):
        LocalignVLM.from_parts(tower, adapter, tiny_llm(), tiny_tokenizer())
    narrow = fresh_adapter("mlp", tiny_tower(width=8), TEXT_WIDTH)
    with pytest.raises(UserError, match=r"mlp adapter .* does not fit tiny"):
        LocalignVLM.from_parts(tower, narrow, tiny_llm(), tiny_tokenizer())


def test_a_damaged_config_is_one_line() -> None:
    model, _ = tiny_vlm()
    fields = model.config.to_dict()
    with pytest.raises(UserError, match="describes no adapter"):
        LocalignVLM(LocalignVLMConfig.from_dict(fields | {"adapter": {"kind": "mlp"}}))
    with pytest.raises(UserError, match="describes no vision tower"):
        LocalignVLM(LocalignVLMConfig.from_dict(fields | {"towers": [{"name": "x"}]}))


def test_the_whole_model_builds_on_the_meta_device() -> None:
    model, _ = tiny_vlm()
    with torch.device("meta"):
        twin = LocalignVLM(cast(LocalignVLMConfig, model.config))
    assert {n: p.shape for n, p in twin.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    assert all(p.is_meta for p in twin.parameters())


def test_a_model_from_a_config_has_initialised_parts() -> None:
    model = LocalignVLM(cast(LocalignVLMConfig, tiny_vlm(adapter="linear")[0].config))
    assert not any(p.any() for p in model.adapter.parameters())
    assert all(p.isfinite().all() for p in model.parameters())
    assert model.vision.backbones[0].vit.blocks[0].norm1.weight.eq(1).all()


def test_the_tower_is_frozen_and_stays_in_eval_mode() -> None:
    model, tokenizer = tiny_vlm()
    model.train()
    assert model.adapter.training
    assert not any(module.training for module in model.vision.modules())
    model(**packed(mixed_records(model, tokenizer))).loss.backward()
    assert all(p.grad is None for p in model.vision.parameters())
    assert all(p.grad is not None for n, p in model.named_parameters() if not n.startswith("vision."))


def test_a_trainable_tower_learns() -> None:
    model, tokenizer = tiny_vlm()
    model.vision.set_trainable(True)
    model.train()
    model(**packed(mixed_records(model, tokenizer))).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.vision.parameters())


def test_low_rank_updates_can_be_trained_alone() -> None:
    peft = pytest.importorskip("peft", reason="needs the extra localign[lora]")
    model, tokenizer = tiny_vlm()
    batch = packed(mixed_records(model, tokenizer))
    with torch.no_grad():
        before = model(**batch).loss
    lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model.language_model = peft.get_peft_model(model.language_model, lora)
    result = model(**batch)
    torch.testing.assert_close(result.loss, before)
    result.loss.backward()
    learning = {n for n, p in model.language_model.named_parameters() if p.grad is not None}
    assert learning
    assert all("lora_" in name for name in learning)


# Images


def test_image_tokens_are_replaced_in_order() -> None:
    model, _ = tiny_vlm()
    image = model.config.image_token_id
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    ids = torch.tensor([[0, *[image] * 4, 9], [0, 8, 8, 8, 8, 9], [0, *[image] * 4, 7]])
    given = model.get_input_embeddings()(ids).detach()
    given[0, 1:5], given[2, 1:5] = model.get_image_features(pixels)
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels).logits
        torch.testing.assert_close(logits, model(inputs_embeds=given).logits)


def test_images_and_image_tokens_must_agree() -> None:
    model, _ = tiny_vlm()
    image = model.config.image_token_id
    pixels = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="1 images need 4 image tokens, but the text has 3"):
        model(input_ids=torch.tensor([[0, image, image, image]]), pixel_values=pixels)
    with pytest.raises(ValueError, match="0 images need 0 image tokens, but the text has 1"):
        model(input_ids=torch.tensor([[0, image]]))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


@pytest.mark.parametrize("images", [None, torch.zeros(0, 3, 16, 16, dtype=torch.uint8)])
def test_text_only_batches_run_tower_and_adapter_in_training_without_effect(images: Tensor | None) -> None:
    model, _ = tiny_vlm()
    ids = torch.arange(10, 20)[None]
    expected = model(input_ids=ids, labels=ids).loss
    runs: list[int] = []
    model.vision.register_forward_hook(lambda *_: runs.append(1))
    model(input_ids=ids, labels=ids, pixel_values=images)
    assert not runs
    model.train()
    loss = model(input_ids=ids, labels=ids, pixel_values=images).loss
    assert runs == [1]
    assert torch.equal(loss, expected)
    loss.backward()
    for name, parameter in model.adapter.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


# Generation


def answers(model: LocalignVLM, batch: Any, **options: Any) -> list[list[int]]:
    """The generated tokens of each row, up to the end token."""
    output = model.generate(**batch, max_new_tokens=NEW, do_sample=False, **options)
    rows = output[:, batch["input_ids"].shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    return [row[: next((i for i, t in enumerate(row) if t in ends), len(row))] for row in rows]


@torch.no_grad()
def by_hand(model: LocalignVLM, batch: Any) -> list[list[int]]:
    """Greedy decoding of one row without a cache."""
    ids, new = batch["input_ids"], []
    for _ in range(NEW):
        logits = model(input_ids=ids, pixel_values=batch.get("pixel_values")).logits[0, -1]
        logits[model.config.image_token_id] = -torch.inf
        new.append(int(logits.argmax()))
        ids = torch.cat([ids, torch.tensor([[new[-1]]])], dim=1)
        if new[-1] in model.generation_config.eos_token_id:
            return [new[:-1]]
    return [new]


@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_batched_generation_equals_one_by_one_and_decoding_by_hand(kind: str) -> None:
    model, tokenizer = tiny_vlm(kind)
    processor = tiny_processor(model, tokenizer)
    images = [picture(1), None, picture(2), None]
    together = answers(model, processor(text=QUESTIONS, images=images))
    one_by_one = [processor(text=q, images=i) for q, i in zip(QUESTIONS, images, strict=True)]
    assert together == [answers(model, batch)[0] for batch in one_by_one]
    assert together == [by_hand(model, batch)[0] for batch in one_by_one]
    assert together == answers(model, processor(text=QUESTIONS, images=images), use_cache=False)
    assert len({tuple(answer) for answer in together}) > 1
    other = answers(model, processor(text=QUESTIONS[0], images=picture(5)))
    assert other != together[:1], "the image matters"


def test_a_batch_without_images_and_beams() -> None:
    model, tokenizer = tiny_vlm()
    processor = tiny_processor(model, tokenizer)
    assert answers(model, processor(text=QUESTIONS)) == [
        answers(model, processor(text=q))[0] for q in QUESTIONS
    ]
    images = [picture(1), None, picture(2), None]
    beams = answers(model, processor(text=QUESTIONS, images=images), num_beams=2)
    for question, image, answer in zip(QUESTIONS, images, beams, strict=True):
        assert answers(model, processor(text=question, images=image), num_beams=2) == [answer]


def test_images_are_encoded_once() -> None:
    model, tokenizer = tiny_vlm()
    seen: list[int] = []
    model.vision.register_forward_hook(lambda *_: seen.append(1))
    batch = tiny_processor(model, tokenizer)(text=QUESTIONS[0], images=picture(1))
    model.generate(**batch, max_new_tokens=NEW, min_new_tokens=NEW)
    assert seen == [1]


def test_the_image_token_is_never_an_answer() -> None:
    model, tokenizer = tiny_vlm()
    batch = tiny_processor(model, tokenizer)(text=QUESTIONS[0])
    with torch.no_grad():
        last = model.language_model.get_decoder()(input_ids=batch["input_ids"]).last_hidden_state[0, -1]
        model.language_model.get_output_embeddings().weight[model.config.image_token_id] = 100 * last
    likeliest = model.generate(**batch, max_new_tokens=1, suppress_tokens=[])[0, -1]
    assert likeliest == model.config.image_token_id
    assert model.generate(**batch, max_new_tokens=1)[0, -1] != likeliest


def test_a_question_longer_than_the_positions_is_refused() -> None:
    model, tokenizer = tiny_vlm()
    model.config.text_config.max_position_embeddings = 20
    batch = tiny_processor(model, tokenizer)(text=QUESTIONS[2])
    with pytest.raises(UserError, match=r"\d+ tokens is longer than the language model's 20 positions"):
        model.generate(**batch, max_new_tokens=1)


def test_bfloat16_reaches_every_part_and_pixels_stay_bytes() -> None:
    model, tokenizer = tiny_vlm()
    model.to(torch.bfloat16)  # type: ignore[arg-type]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    batch = tiny_processor(model, tokenizer)(text=QUESTIONS, images=[picture(1), None, None, None])
    batch = batch.to(torch.bfloat16)
    assert batch["pixel_values"].dtype == torch.uint8
    assert model.get_image_features(batch["pixel_values"]).dtype == torch.bfloat16
    assert len(answers(model, batch)) == len(QUESTIONS)
    records = packed(mixed_records(model, tokenizer))
    result = model(**records)
    result.loss.backward()
    assert result.loss_sum.dtype == torch.float32


def test_the_models_dtype_is_the_language_models() -> None:
    model, _ = tiny_vlm()
    model.vision.to(torch.bfloat16)
    assert model.dtype == torch.float32
    assert isinstance(model.language_model, PreTrainedModel)
    assert model.get_image_features(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)).dtype == torch.float32
