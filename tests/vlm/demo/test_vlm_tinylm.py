"""A small language model and its tokenizer, trained from scratch by the engine's loop."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from localign.engine import BatchPlan
from localign.engine.distributed import DistributedContext
from localign.errors import UserError
from localign.vlm.data.prompts import prompt_format
from localign.vlm.data.scene_dataset import write_dataset
from localign.vlm.demo.tinylm import TinyLMConfig, TinyLMTask, read_turns, train_tiny_lm
from localign.vlm.demo.tinytokenizer import train_tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_dataset(tmp_path_factory.mktemp("questions"), "train", 60, 2))


@pytest.fixture(scope="module")
def task(data: str) -> TinyLMTask:
    return TinyLMTask(config(data))


def config(data: str, **changes: object) -> TinyLMConfig:
    small = {"layers": 2, "width": 32, "heads": 2, "mlp_width": 48, "batch_size": 8, "steps": 4}
    return TinyLMConfig(data=data, **{"warmup_steps": 0, "device": "cpu", **small, **changes})  # type: ignore[arg-type]


def plan(start: int, end: int, rank: int = 0, ranks: int = 1, micro: int = 4) -> BatchPlan:
    return BatchPlan(
        seed=0, global_batch=8, micro_batch=micro, rank=rank, world_size=ranks, workers=0,
        start_step=start, end_step=end, pin_memory=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "text", ["[0.12, 0.30]", 'What is "this"?\n\tIn:  a', "grün 你好 🙂", "<image>", "a\r\nb", "¹²³ ½"]
)
def test_the_tokenizer_loses_nothing(task: TinyLMTask, text: str) -> None:
    ids = task.tokenizer(text)["input_ids"]
    assert ids[0] == task.tokenizer.bos_token_id
    assert task.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_coordinate_is_one_token_and_other_digits_are_single_tokens() -> None:
    box = "[0.12, 0.30, 1.00, 0.5]"
    tokenizer = train_tokenizer([box] * 20, 1024)
    assert tokenizer.tokenize(box) == ["[", "0.12", ",Ġ", "0.30", ",Ġ", "1.00", ",Ġ", "0.5", "]"]
    assert tokenizer.tokenize("12345") == list("12345")
    # These only resemble coordinates.
    assert tokenizer.tokenize("10.12") == ["1", "0", ".", "1", "2"]
    assert tokenizer.tokenize("0.123") == ["0", ".", "1", "2", "3"]


def test_merges_go_across_words(task: TinyLMTask) -> None:
    tokenizer = task.tokenizer
    question = "What is at [0.50, 0.25]?\nAnswer the question using a single word or phrase."
    beginning, x, comma, y, rest = tokenizer.tokenize(prompt_format("in-out").text(tokenizer, question))[-5:]
    assert (beginning[-1], x, comma, y) == ("[", "0.50", ",Ġ", "0.25")
    assert rest == "]?ĊAnswerĠtheĠquestionĠusingĠaĠsingleĠwordĠorĠphrase.ĊOut:"


def test_choices_are_tokens(task: TinyLMTask) -> None:
    tokenizer = task.tokenizer
    # Benchmarks compare choices by the probability of their single token.
    for choice in ("True", "False", "Yes", "No", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"):
        assert len(tokenizer(choice, add_special_tokens=False)["input_ids"]) == 1


def test_special_tokens_have_their_roles(task: TinyLMTask) -> None:
    tokenizer = task.tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert (tokenizer.unk_token, tokenizer.pad_token) == ("<unk>", "<PAD>")
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1]
    assert task.model.config.vocab_size == len(tokenizer) <= 1024


def test_a_tokenizer_is_a_function_of_its_texts() -> None:
    texts = ["red circle", "blue circle", "red square"] * 5
    first, again = (train_tokenizer(texts, 300).backend_tokenizer.to_str() for _ in range(2))
    assert first == again
    assert isinstance(train_tokenizer((), 260), PreTrainedTokenizerFast)


def test_the_models_input_is_in_the_prompt_format(task: TinyLMTask, data: str) -> None:
    turns = read_turns(data)[0]
    expected = prompt_format("in-out").conversation(task.tokenizer, turns)
    assert task.ids[0].tolist() == expected.ids


def test_padding_changes_neither_loss_nor_count(task: TinyLMTask) -> None:
    (batch,) = task.batches(plan(0, 1, micro=8))
    assert len(set(batch.lengths.tolist())) > 1
    together = task.step(task.model, batch)
    alone = []
    for row, length in enumerate(batch.lengths.tolist()):
        ids = batch.input_ids[row : row + 1, :length]
        # transformers' loss is the mean over all tokens but the first
        alone.append(task.model(input_ids=ids, labels=ids).loss * (length - 1))
    assert together.loss_sum.item() == pytest.approx(torch.stack(alone).sum().item(), rel=1e-5)
    assert float(together.weight) == int(batch.lengths.sum()) - len(batch.lengths)
    assert task.throughput(batch) == {"tokens": int(batch.lengths.sum())}


def test_batches_do_not_depend_on_ranks_micro_batches_or_the_first_step(task: TinyLMTask) -> None:
    whole = [i for batch in task.batches(plan(0, 9, micro=8)) for i in batch.indices.tolist()]
    small = [i for batch in task.batches(plan(0, 9, micro=2)) for i in batch.indices.tolist()]
    late = [i for batch in task.batches(plan(3, 9)) for i in batch.indices.tolist()]
    ranks = [[b.indices.tolist() for b in task.batches(plan(0, 9, rank, 2))] for rank in (0, 1)]
    both = [i for parts in zip(*ranks, strict=True) for part in parts for i in part]
    assert whole == small == both
    assert whole[24:] == late
    assert sorted(whole[:60]) == list(range(60))  # an epoch has every conversation once


def test_a_trained_model_is_a_transformers_folder(tmp_path: Path) -> None:
    data = str(write_dataset(tmp_path / "train", "train", 400, 2))
    val = str(write_dataset(tmp_path / "val", "val", 10, 2))
    trained = config(data, val=val, steps=100, lr=1e-2, out=str(tmp_path / "run"), log_every=1)
    outcome = train_tiny_lm(trained)
    first = json.loads((outcome.folder / "log.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(outcome.results["vocabulary"]), abs=0.2)
    assert outcome.results["final"]["val_loss"] < first["loss"] - 2
    model = AutoModelForCausalLM.from_pretrained(outcome.folder / "export")
    tokenizer = AutoTokenizer.from_pretrained(outcome.folder / "export")
    assert outcome.results["parameters"] == sum(p.numel() for p in model.parameters())
    assert outcome.results["vocabulary"] == len(tokenizer)
    # The export alone gives the same validation loss.
    task = TinyLMTask(trained)
    assert [tokenizer.decode(ids) for ids in task.val_ids] == [task.tokenizer.decode(i) for i in task.val_ids]
    again = task.validate(model, DistributedContext(0, 1, 0, torch.device("cpu")))
    assert again["val_loss"] == pytest.approx(outcome.results["final"]["val_loss"], rel=1e-5)


def test_other_data_is_another_run(task: TinyLMTask, data: str, tmp_path: Path) -> None:
    assert TinyLMTask(config(data)).fingerprint() == task.fingerprint()
    other = str(write_dataset(tmp_path, "train", 60, 2, seed=1))
    assert TinyLMTask(config(other)).fingerprint() != task.fingerprint()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": ""}, "give --data"),
        ({"vocab_size": 259}, "--vocab-size must be at least 260"),
        ({"layers": 0}, "--layers must be at least 1"),
        ({"heads": 3}, "--width 32 does not divide into 3 heads"),
        ({"workers": 1}, "--workers has no effect"),
    ],
)
def test_bad_options_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        replace(config("questions.json"), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"there is no file .*data\.json"),
        ("hello", r"data\.json is neither a JSON list of records nor JSON lines"),
        ('[{"id": "7", "conversations": [{"from": "gpt", "value": "a"}]}]', r"data\.json.*7.* turn 1 "),
        ("[]", r"data\.json holds no conversation"),
    ],
)
def test_bad_data_is_named(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "data.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words):
        TinyLMTask(config(str(path)))
