"""Models of native resolution answer about images of any shape: alone, in batches, in chats and on benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_files import WRITERS
from native_models import MOST, SHAPES, native_vlm, pictures
from vlm_models import picture, tiny_processor

from localign.backbones.native import native_grid
from localign.cli import main
from localign.vlm.chat import Chat
from localign.vlm.data.prompts import prompt_format
from localign.vlm.evaluation import run
from localign.vlm.evaluation.generation import Query, greedy_answers
from localign.vlm.model.build import load_vlm, save_vlm


@pytest.mark.parametrize("kind", ["mlp", "decoder"])
def test_answers_do_not_depend_on_the_batch(kind: str) -> None:
    model, tokenizer = native_vlm(kind)
    processor = tiny_processor(model, tokenizer)
    images: list[Any] = [*pictures(), None]
    asked = [Query(f"What is {n}{'?' * n}", image) for n, image in enumerate(images)]
    together = list(greedy_answers(model, processor, asked, batch_size=7, max_new_tokens=8))
    assert together == list(greedy_answers(model, processor, asked, batch_size=1, max_new_tokens=8))
    assert len(set(together)) > 3


@torch.no_grad()
def test_generation_continues_from_the_images_as_a_pass_over_all_tokens_does() -> None:
    model, tokenizer = native_vlm("transformer")
    batch = tiny_processor(model, tokenizer)(text=["Why?", "Where?"], images=pictures()[1:3])
    generator: Any = model
    ids = generator.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=None)
    whole = torch.cat([batch["attention_mask"], torch.ones(2, 6, dtype=torch.int64)], dim=1)
    inputs = {"pixel_values": batch["pixel_values"], "image_grids": batch["image_grids"]}
    positions = whole.cumsum(dim=1).clamp(min=1) - 1
    logits = model(input_ids=ids, attention_mask=whole, position_ids=positions, **inputs).logits
    logits[..., model.config.image_token_id] = -torch.inf  # never answered
    start = batch["input_ids"].shape[1]
    assert torch.equal(logits[:, start - 1 : -1].argmax(dim=-1), ids[:, start:])


def test_the_processor_counts_the_tokens_of_each_image() -> None:
    model, tokenizer = native_vlm("transformer")
    batch = tiny_processor(model, tokenizer)(text=["?"] * len(SHAPES), images=pictures())
    expected = [native_grid(height, width, (8, 8), MOST) for width, height in SHAPES]
    assert batch["image_grids"].tolist() == [list(grid) for grid in expected]
    found = (batch["input_ids"] == model.config.image_token_id).sum(dim=1).tolist()
    assert found == [1 + rows * columns for rows, columns in expected]
    assert batch["pixel_values"].dtype == torch.uint8
    assert "image_grids" not in tiny_processor(model, tokenizer)(text="?")


def test_a_chat_keeps_its_image_and_its_turns() -> None:
    model, tokenizer = native_vlm()
    processor, image = tiny_processor(model, tokenizer), picture(3, (50, 14))
    chat = Chat(model, processor, image, max_new_tokens=5)
    answers = [chat.ask("What?"), chat.ask("Where?")]
    history = [("What?", answers[0])]
    prompt = prompt_format("in-out").question(tokenizer, "Where?", history)
    rows, columns = native_grid(14, 50, (8, 8), MOST)
    tokens = [model.config.image_token_id] * (rows * columns)
    ids = [*prompt.ids[:1], *tokens, *prompt.ids[1:]]
    again = processor.apply_chat_template(chat.messages[:-1], tokenize=True)
    assert again[0].tolist() == ids
    other = Chat(model, processor, picture(3, (14, 50)), max_new_tokens=5)
    assert [other.ask("What?"), other.ask("Where?")] != answers


def test_commands_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "MAX_NEW_TOKENS", 6)
    model, tokenizer = native_vlm("decoder")
    folder = save_vlm(model, tiny_processor(model, tokenizer), tmp_path / "model")
    assert "at most 7 tokens per image" in (folder / "README.md").read_text()
    again, tokenizer = load_vlm(folder)
    again.eval()  # type: ignore[no-untyped-call]
    processor = tiny_processor(again, tokenizer)
    assert (processor.max_patches, processor.patch_size) == (MOST, [8, 8])

    image = picture(5, (40, 12))
    image.save(tmp_path / "image.png")
    command = [
        "vlm",
        "chat",
        "--model",
        str(folder),
        "--image",
        str(tmp_path / "image.png"),
        "--device",
        "cpu",
    ]
    assert main([*command, "--question", "What?", "--max-new-tokens", "6"]) == 0
    expected = Chat(again, processor, image, 6).ask("What?")
    assert capsys.readouterr().out.splitlines()[0] == expected.splitlines()[0]

    WRITERS["gqa"](tmp_path / "data")
    command = ["vlm", "eval", "--model", str(folder), "--data", str(tmp_path / "data"), "--device", "cpu"]
    assert main([*command, "--benchmarks", "gqa", "--allow-partial", "--out", str(tmp_path / "eval")]) == 0
    assert json.loads((tmp_path / "eval" / "results.json").read_text())["benchmarks"]["gqa"]
