"""The VLM benchmark trains on the same conversations in every way, and counts what it says it counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from benchmarks import vlm as bench
from benchmarks.config import VLMBenchConfig
from benchmarks.conversations import (
    MIX,
    WORDS,
    WRAPPING,
    Drawn,
    drawn_conversations,
    drawn_tokenizer,
    write_conversations,
)
from benchmarks.flops import peak_flops, useful_flops
from benchmarks.run import main
from benchmarks.vlm import vlm_tables
from benchmarks.vlm_setup import training_options
from localign.bench.timing import Timing
from localign.engine.task import BatchPlan
from localign.errors import RunFailure
from localign.options.vlm.train import Batching
from localign.vlm.data.batching import VLMBatch
from localign.vlm.data.examples import ConversationTokenizer
from localign.vlm.data.prompts import IGNORE_INDEX, prompt_format
from localign.vlm.data.records import Conversations
from localign.vlm.data.vocabulary import add_special_tokens
from localign.vlm.model.build import build_vlm
from localign.vlm.task import VLMTask

WAY_NAMES = [way.name for way in bench.WAYS]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a language model's sizes and nothing else."""
    folder = tmp_path_factory.mktemp("llm")
    LlamaConfig(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    ).save_pretrained(folder)
    return folder


def command(llm: Path, out: Path) -> list[str]:
    sizes = "--image-tokens 16 --batch-size 4 --micro-batch 2 --repeats 1 --device cpu"
    return ["vlm", "--llm", str(llm), *sizes.split(), "--out", str(out)]


# -- the conversations ---------------------------------------------------------------------------------


def tokens(drawn: Drawn) -> int:
    return sum(question + answer + WRAPPING for question, answer in drawn.turns)


def test_drawn_conversations_have_the_lengths_of_the_mix() -> None:
    drawn = drawn_conversations(6240, 400, 1.0, seed=1)
    assert [sum(d.image == image for d in drawn) for image in (True, False)] == [6240, 400]
    for image in (True, False):
        parts = [part for part in MIX.values() if part.image == image]
        expected = [
            p.thousands * (p.turns[0] + p.turns[1]) / 2 * (p.question + p.answer + WRAPPING) for p in parts
        ]
        mean = np.mean([tokens(d) for d in drawn if d.image == image])
        assert mean == pytest.approx(sum(expected) / sum(p.thousands for p in parts), rel=0.1)
    assert drawn_conversations(6240, 400, 1.0, seed=1) == drawn
    assert drawn_conversations(6240, 400, 1.0, seed=2) != drawn


def test_a_ninth_of_the_scale_is_a_ninth_of_the_tokens() -> None:
    whole, ninth = (drawn_conversations(624, 40, scale, seed=0) for scale in (1.0, 1 / 9))
    ratio = sum(map(tokens, ninth)) / sum(map(tokens, whole))
    assert ratio == pytest.approx(1 / 9, rel=0.1)
    assert max(len(d.turns) for d in ninth) < max(len(d.turns) for d in whole)


def test_a_word_is_a_token_and_a_record_as_long_as_drawn(tmp_path: Path) -> None:
    tokenizer = drawn_tokenizer()
    for word in WORDS:
        for text in (word, " " + word):
            assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1, text
    add_special_tokens(tokenizer)
    assert len(tokenizer) <= 1024  # the tiny model's vocabulary
    drawn = drawn_conversations(24, 8, 0.3, seed=3)
    data = Conversations.open([write_conversations(drawn, tmp_path, (8, 6), seed=3)])
    encoder = ConversationTokenizer(prompt_format("in-out"), tokenizer, num_image_tokens=9, max_length=4096)
    for i, conversation in enumerate(drawn):
        example = encoder(data.record(i))
        assert len(example.input_ids) == 1 + tokens(conversation) + 9 * conversation.image
        answers = sum(answer + 1 for _, answer in conversation.turns)
        assert int((example.labels != IGNORE_INDEX).sum()) == answers
        assert bool(data.has_image[i]) == conversation.image


# -- the ways ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task(llm: Path, tmp_path_factory: pytest.TempPathFactory) -> VLMTask:
    config = VLMBenchConfig(llm=str(llm), image_tokens=16, batch_size=4)
    options = training_options(config, tmp_path_factory.mktemp("data"))
    return VLMTask(options, *build_vlm(options))


def first_batch(task: VLMTask, batching: Batching) -> VLMBatch:
    task = VLMTask(replace(task.config, batching=batching), task.model, task.tokenizer)
    return next(task.batches(BatchPlan(0, 4, 4, 0, 1, 0, 0, 1, False)))


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_whole_logits_give_the_loss_of_the_chunks(task: VLMTask, batching: Batching) -> None:
    batch = first_batch(task, batching)
    with torch.no_grad():
        ours, plain = task.step(task.model, batch), bench.whole_logits_loss(task.model, batch)
    assert float(plain.loss_sum) == pytest.approx(float(ours.loss_sum), rel=1e-5)
    assert int(plain.weight) == int(ours.weight) > 0


@pytest.mark.parametrize("trained", [True, False])
def test_useful_flops_are_what_torch_counts(task: VLMTask, trained: bool) -> None:
    model, batch = task.model, first_batch(task, "packed")
    assert batch.cu_seqlens is not None
    lengths = torch.diff(batch.cu_seqlens).tolist()
    model.language_model.requires_grad_(trained)
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            bench.whole_logits_loss(model, batch).loss_sum.backward()
        # With whole logits every token counts as labelled.
        expected = useful_flops(model, lengths, sum(lengths), len(batch.images))
    finally:
        model.language_model.requires_grad_(True)
        model.zero_grad()
    masked = 6 * 2 * 32 * sum(length**2 for length in lengths)  # the half of attention that is not useful
    assert expected + masked == pytest.approx(counter.get_total_flops(), rel=0.015)
    assert 2 * masked > 0.03 * expected  # so it would show if attention were not counted


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA GeForce GT 710", None)],
)
def test_the_peak_of_a_gpu_is_by_its_name(
    name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(torch.device("cpu")) is None


def test_the_median_of_each_step_counts() -> None:
    timings = {(0, 0): 1.0, (1, 0): 9.0, (2, 0): 2.0, (0, 1): 30.0, (1, 1): 10.0, (2, 1): 20.0}
    measured = bench.VLMTimings({key: Timing(wall, 2 * wall) for key, wall in timings.items()})
    assert measured.cost() == Timing(22, 44)
    assert [t.wall for t in measured.repeats()] == [31, 19, 22]


def test_a_token_more_in_the_same_time_is_faster() -> None:
    faster = bench._times_faster((Timing(2, 3), 300), (Timing(4, 3), 200))
    assert faster == {"wall": 3, "cpu": 1.5}


def test_bench_vlm_measures_every_way(llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "bench.json"
    assert main(command(llm, out)) == 0
    content = json.loads(out.read_text())
    rows = {row["way"]: row for row in content["ways"]}
    assert list(rows) == WAY_NAMES
    assert (content["conversations"], content["text_only"]) == (64, 4)
    assert len({row["tokens"] for row in rows.values()}) == 1
    assert rows["packed"]["padding"] == 0
    assert 0 < rows["padded, grouped"]["padding"] < rows["padded"]["padding"]
    assert rows["padded"]["times_faster"]["padded"] == {"wall": 1, "cpu": 1}
    for row in rows.values():
        for clock, seconds in row["seconds"].items():
            assert row["tokens_per_second"][clock] == pytest.approx(row["tokens"] / seconds)
        assert row["seconds_of_repeats"] == [row["seconds"]]
        assert row["loading_seconds"]["wall"] > 0
        assert row["mfu"] is None
        assert row["peak_bytes"] is None
    # On a GPU its memory and the share of its peak are told too.
    gpu = {"mfu": 0.4321, "peak_bytes": 3 * 2**30}
    ways = [row | gpu for row in content["ways"][:-1]] + [{**content["ways"][-1], **gpu, "mfu": None}]
    (table,) = vlm_tables(content | {"ways": ways, "hardware": content["hardware"] | {"device": "cuda:0"}})
    *_, mfu, peak = table.columns
    assert (mfu.header, [*mfu.cells]) == ("MFU, %", [*["43"] * 5, "–"])
    assert (peak.header, [*peak.cells]) == ("peak, GiB", ["3.0"] * 6)
    shown = capsys.readouterr().out
    assert "64 conversations (4 text only), 2 per micro-batch" in shown
    assert str(out) in shown


def test_liger_is_a_way_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec, device, expected in (
        (object(), "cuda", (*bench.WAYS, bench.LIGER)),
        (object(), "cpu", bench.WAYS),
        (None, "cuda", bench.WAYS),
    ):
        monkeypatch.setattr(bench, "find_spec", lambda name, spec=spec: spec)
        assert bench.ways(torch.device(device)) == expected


def test_the_option_and_the_way_reach_the_loss(task: VLMTask, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = "localign.vlm.model.losses.fused_cross_entropy"
    monkeypatch.setattr(fused, lambda hidden, targets, head: 0 * hidden.sum() + 7)
    batch = first_batch(task, "packed")
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.0)
    sums, *_ = bench._timed_step(task, optimizer, bench.LIGER, [batch])
    assert sums.tolist() == [7, int((batch.labels != IGNORE_INDEX).sum())]
    assert task.step(task.model, batch).loss_sum.item() != 7
    monkeypatch.setattr(task, "config", replace(task.config, cross_entropy="liger"))
    assert task.step(task.model, batch).loss_sum.item() == 7


def test_a_way_that_does_not_fit_is_left_out(
    llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(bench, "whole_logits_loss", too_large)
    assert main(command(llm, tmp_path / "bench.json")) == 0
    rows = {row["way"]: row for row in json.loads((tmp_path / "bench.json").read_text())["ways"]}
    assert [name for name, row in rows.items() if not row["fits"]] == [n for n in WAY_NAMES if "whole" in n]
    assert list(rows["packed"]["times_faster"]) == ["padded"]
    assert "does not fit" in capsys.readouterr().out


def test_ways_that_disagree_are_a_failure(llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = bench.whole_logits_loss

    def wrong(*arguments: object) -> object:
        result = plain(*arguments)  # type: ignore[arg-type]
        result.loss_sum = result.loss_sum * 1.001
        return result

    monkeypatch.setattr(bench, "whole_logits_loss", wrong)
    config = VLMBenchConfig(llm=str(llm), image_tokens=16, batch_size=2, repeats=1, device="cpu")
    with pytest.raises(RunFailure, match="the ways disagree about the loss per token: packed "):
        bench.bench_vlm(config)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("vlm --images 3", "unknown option --images"),
        ("labels --llm tiny", "unknown option --llm"),
        ("probe --grad-checkpointing", "unknown option --grad-checkpointing"),
        ("vlm --image-tokens 60", "--image-tokens must be a square number, such as 64 or 576, not 60"),
        ("vlm --steps 20", "--steps must be a multiple of 16, not 20"),
        ("vlm --batch-size 0", "--batch-size must be above 0"),
        ("vlm --llm /nonexistent/llm", "cannot read the language model's config, /nonexistent/llm"),
    ],
)
def test_bad_use_is_one_line(command: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 2
    assert said in capsys.readouterr().err
