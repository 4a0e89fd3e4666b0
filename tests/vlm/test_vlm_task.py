"""Training vision-language models: ranks, batching, micro-batches and interruptions do not change the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from timm.layers.activations import QuickGELU
from vlm_runs import STEPS, arguments, assert_close, forget_the_end, logged, trained, without_llm

from localign.cli import main, parse
from localign.engine import BatchPlan
from localign.vlm.model.build import build_vlm, load_vlm
from localign.vlm.model.configuration import LocalignVLMConfig
from localign.vlm.model.modeling import LocalignVLM
from localign.vlm.task import VLMTask


@pytest.mark.parametrize(
    "more",
    [
        ["--micro-batch", "2"],
        ["--batching", "padded"],
        ["--batching", "padded", "--micro-batch", "4"],
        ["--grad-checkpointing"],
        ["--llm-attention", "eager"],
        ["--llm-attention", "eager", "--batching", "padded"],
        ["--adapter-lr", "1e-3", "--micro-batch", "4"],
        ["--workers", "1"],
    ],
    ids=" ".join,
)
def test_how_a_step_is_computed_changes_nothing(
    data: Path, whole: Path, tmp_path: Path, more: list[str]
) -> None:
    weights = trained(data, tmp_path / "run", *more)
    assert_close(weights, load_file(whole / "export" / "model.safetensors"))
    assert logged(tmp_path / "run", "samples") == logged(whole, "samples")
    for field in ("loss", "val_loss", "grad_norm"):
        assert logged(tmp_path / "run", field) == pytest.approx(logged(whole, field), abs=1e-5)


def test_a_resumed_run_equals_the_uninterrupted_run(data: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(arguments(data, out, "--checkpoint-every", "2", "--keep-checkpoints", "9")) == 0
    forget_the_end(out, (5, 6))  # as if it had been killed after step 4
    assert main(arguments(data, out, "--checkpoint-every", "2", "--keep-checkpoints", "9", "--resume")) == 0
    ours, theirs = (load_file(f / "export" / "model.safetensors") for f in (out, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert logged(out, "samples") == logged(whole, "samples")


def test_checkpoints_hold_only_trained_parameters(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    trained(data, out, "--stage", "align")
    (file,) = out.glob("checkpoints/*/model.safetensors")
    assert {name.split(".")[0] for name in load_file(file)} == {"adapter"}


def part(name: str) -> str:
    """The part of the model that an exported weight belongs to."""
    return name.removeprefix("model.").split(".")[0]


@pytest.mark.parametrize(
    ("stage", "moves"),
    [
        ("align", {"adapter"}),
        ("finetune", {"adapter", "language_model", "lm_head"}),
        ("full-finetune", {"adapter", "language_model", "lm_head", "vision"}),
        ("lora", {"adapter", "language_model"}),
    ],
)
def test_a_stage_trains_its_parts(data: Path, tmp_path: Path, stage: str, moves: set[str]) -> None:
    first = trained(data, tmp_path / "first", "--stage", stage, "--lr", "1e-9")
    last = trained(data, tmp_path / "last", "--stage", stage)
    assert first.keys() == last.keys()
    moved = {part(name) for name in first if (first[name] - last[name]).abs().max() > 1e-6}
    assert moved == moves
    assert not any("lora" in name for name in last), "low-rank updates are merged"
    load_vlm(tmp_path / "last")


def test_the_adapter_has_a_learning_rate_of_its_own(data: Path, whole: Path, tmp_path: Path) -> None:
    start = trained(data, tmp_path / "start", "--lr", "1e-12")
    slow = trained(data, tmp_path / "slow", "--adapter-lr", "1e-12")
    moved = {part(name) for name in start if (slow[name] - start[name]).abs().max() > 1e-6}
    assert moved == {"language_model", "lm_head"}
    start, slow = (
        trained(data, tmp_path / name, "--adapter", "truncated", *more)
        for name, more in (("start2", ["--lr", "1e-12"]), ("slow2", ["--adapter-lr", "1e-12"]))
    )
    moved = {part(name) for name in start if (slow[name] - start[name]).abs().max() > 1e-6}
    assert moved == {"adapter", "language_model", "lm_head"}
    moved = {n for n in start if part(n) == "adapter" and (slow[n] - start[n]).abs().max() > 1e-6}
    assert moved == {"model.adapter.head.weight", "model.adapter.head.bias"}, (
        "its new output layer keeps --lr"
    )
    same = trained(data, tmp_path / "same", "--adapter-lr", "1e-3")
    theirs = load_file(whole / "export" / "model.safetensors")
    assert all(torch.equal(same[name], theirs[name]) for name in theirs)


def test_log_lines_have_the_ratio_of_image_to_text_embeddings(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    trained(data, tmp_path / "start", "--lr", "1e-12", "--adapter", "linear", "--steps", "2")
    assert logged(tmp_path / "start", "image_text_ratio")[1] < 1e-6, "all zero at the start"
    grown = logged(whole, "image_text_ratio")
    assert set(grown) == set(range(1, STEPS + 1))
    assert all(0.01 < ratio < 100 for ratio in grown.values())


def test_a_second_stage_starts_from_the_first(data: Path, tmp_path: Path) -> None:
    first = trained(data, tmp_path / "first", "--stage", "align")
    command = arguments(data, tmp_path / "second", "--init", str(tmp_path / "first"), "--lr", "1e-9")
    assert main(without_llm(command)) == 0
    second = load_file(tmp_path / "second" / "export" / "model.safetensors")
    assert_close(second, first, atol=1e-6)


def test_unknown_attention_is_refused(
    data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(data, tmp_path / "run", "--llm-attention", "nonsense")
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot load the language model" in line
    assert "nonsense" in line
    assert main([*without_llm(command), "--init", str(whole)]) == 2
    assert "--llm-attention needs --llm" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_export_has_the_trained_weights(data: Path, whole: Path) -> None:
    model, tokenizer = load_vlm(whole)
    assert isinstance(model, LocalignVLM)
    assert model.config.localign["run"]["llm"] == str(data / "llama")
    assert tokenizer.pad_token is not None
    (checkpoint,) = whole.glob("checkpoints/*/model.safetensors")
    trained_weights = load_file(checkpoint)
    state = model.state_dict()
    assert trained_weights
    assert all(torch.equal(state[name], tensor) for name, tensor in trained_weights.items())


@pytest.mark.parametrize("adapter", ["linear", "transformer", "truncated"])
@pytest.mark.parametrize("llm", ["llama", "qwen"])
def test_any_adapter_and_language_model(data: Path, tmp_path: Path, adapter: str, llm: str) -> None:
    trained(data, tmp_path / "run", "--adapter", adapter, "--llm", str(data / llm), "--steps", "2")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["adapter"] == adapter
    assert 0 < results["final"]["val_loss"] < 9


def test_unreadable_images_are_replaced_and_named(data: Path, tmp_path: Path) -> None:
    for file in data.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    broken = tmp_path / "5.png"
    broken.write_bytes(broken.read_bytes()[:60])
    command = arguments(data, tmp_path / "run", "--max-bad-share", "0.1")
    command[command.index("--data") + 1] = str(tmp_path / "train.json")
    assert main(command) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results["skipped_images"]["images"]) == ["5.png"]


def edited(data: Path, tmp_path: Path, **changes: Any) -> str:
    records = json.loads((data / "train.json").read_text())
    records[1] |= changes
    for file in data.glob("*.png"):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "edited.json").write_text(json.dumps(records))
    return str(tmp_path / "edited.json")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"image": "gone.png"}, "record 2 (id 'r1')"),
        (
            {"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]},
            "record 2 (id 'r1')",
        ),
        ({"conversations": []}, "record 2 (id 'r1')"),
    ],
)
def test_a_bad_record_is_one_line_and_leaves_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], line: str
) -> None:
    command = arguments(data, tmp_path / "run")
    command[command.index("--data") + 1] = edited(data, tmp_path, **changes)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert line in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--max-length", "20"], "leaves no room"),
        (["--adapter", "decoder"], "aligned backbone with its decoder"),
        (["--adapter", "fused-mlp"], "takes several backbones, not one"),
        (["--backbone", "scenes-vit,scenes-vit"], "takes one backbone, not"),
        (["--llm", "/nowhere/llm"], "cannot load the language model /nowhere/llm"),
        (["--stage", "frozen"], "--stage takes"),
        (["--prompt", "chat-template"], "chat template"),
        (["--features", "aligned"], "needs an export folder of `localign align`"),
        (["--adapter-lr", "0"], "--adapter-lr must be above 0"),
        (["--adapter-lr", "1e-3", "--lr", "null"], "needs --lr"),
        (["--turns", "independent", "--llm-attention", "flex_attention"], "independent turns need"),
    ],
)
def test_bad_options_are_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], line: str
) -> None:
    if more[0] == "--backbone":
        more = [*more, "--adapter", "truncated"]
    assert main(arguments(data, tmp_path / "run", *more)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert line in error


def test_automatic_micro_batches_are_measured_on_the_longest_conversations(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    """Conversations repeat if there are fewer than the micro-batch holds."""
    trained(data, tmp_path / "run", "--micro-batch", "auto")
    assert logged(tmp_path / "run", "micro_batch") == {0: 8}
    assert logged(tmp_path / "run", "loss") == logged(whole, "loss")
    task = VLMTask(parse("vlm train", arguments(data, tmp_path / "task")[2:]))
    for size in (1, 3, 40):
        batch = task.worst_case_batch(size)
        assert len(batch.positions) == size
    every = [int(b.input_ids.shape[1]) for b in task.batches(BatchPlan(0, 1, 1, 0, 1, 0, 0, 30, False))]
    assert task.worst_case_batch(1).input_ids.shape[1] > 0.9 * max(every)


def test_a_published_fusion_has_exact_gelu_in_clip(data: Path, tmp_path: Path) -> None:
    """Only CLIP towers, and only beside another backbone; the export rebuilds the same modules."""
    small = ["--weights", "none", "--model-kwargs", '{"depth": 2, "embed_dim": 24, "num_heads": 2}']
    clip, dino = "vit_base_patch16_clip_quickgelu_224", "vit_base_patch16_224.dino"
    published = ["--published-quirks"]
    for names, quirks, exact in (
        ([clip, dino], published, True),
        ([clip, dino], [], False),
        ([clip], published, False),
    ):
        adapter = "fused-mlp" if len(names) > 1 else "mlp"
        more = ["--backbone", ",".join(names), "--adapter", adapter, "--image-size", "32", *small, *quirks]
        model, _ = build_vlm(parse("vlm train", arguments(data, tmp_path / "run", *more)[2:]))
        first: Any = model.vision.towers[0]
        assert (type(first.vit.blocks[0].mlp.act) is not QuickGELU) == exact
        again = LocalignVLM(cast(LocalignVLMConfig, model.config))
        assert [type(m) for m in again.vision.modules()] == [type(m) for m in model.vision.modules()]
