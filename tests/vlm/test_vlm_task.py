"""Training vision-language models: ranks, batching, micro-batches and interruptions do not change the result."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import kill_all
from safetensors.torch import load_file
from timm.layers.activations import QuickGELU
from tiny_vlm import tiny_llm, tiny_tokenizer
from vlm_models import picture

import localign
from localign.cli import main, parse
from localign.engine import BatchPlan
from localign.errors import UserError
from localign.vlm.model.build import build_vlm, load_vlm
from localign.vlm.model.modeling import LocalignVLM
from localign.vlm.task import VLMTask

STEPS = 6


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records with and without images, of one to three turns, and a language model, in one folder."""
    folder = tmp_path_factory.mktemp("conversations")
    records = []
    for number in range(30):
        record: dict[str, Any] = {"id": f"r{number}", "conversations": []}
        if number % 4:
            picture(number, (20 + number, 24)).save(folder / f"{number}.png")
            record["image"] = f"{number}.png"
        for turn in range(1 + number % 3):
            mark = "<image>\n" if not turn and number % 4 else ""
            record["conversations"] += [
                {"from": "human", "value": f"{mark}What is {number}{'?' * (number % 7 * 4)}"},
                {"from": "gpt", "value": f"It is {number + turn}."},
            ]
        records.append(record)
    (folder / "train.json").write_text(json.dumps(records))
    (folder / "val.json").write_text(json.dumps(records[:7]))
    for kind in ("llama", "qwen"):
        tiny_llm(kind).save_pretrained(folder / kind)
        tiny_tokenizer(bos=kind == "llama").save_pretrained(folder / kind)
    return folder


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    # With an eps above the rounding errors of gradients, Adam does not amplify them.
    return [
        "vlm", "train", "--data", str(data / "train.json"), "--val", str(data / "val.json"), "--llm",
        str(data / "llama"), "--batch-size", "8", "--steps", str(STEPS), "--max-length", "128", "--lr", "1e-3",
        "--eps", "1e-5", "--workers", "0", "--log-every", "1", "--device", "cpu", "--out", str(out), *more,
    ]  # fmt: skip


def trained(data: Path, out: Path, *more: str) -> dict[str, torch.Tensor]:
    assert main(arguments(data, out, *more)) == 0
    return load_file(out / "export" / "model.safetensors")


def logged(out: Path, field: str) -> dict[int, Any]:
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {e["step"]: e[field] for e in entries if field in e}


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], atol: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=atol, msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference run: packed, one micro-batch."""
    out = tmp_path_factory.mktemp("whole") / "run"
    torch.set_num_threads(1)
    trained(data, out)
    return out


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
    for step in (5, 6):  # as if it had been killed after step 4
        for path in out.glob(f"checkpoints/step-*{step}"):
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    (out / "results.json").unlink()
    assert main(arguments(data, out, "--checkpoint-every", "2", "--keep-checkpoints", "9", "--resume")) == 0
    ours, theirs = (load_file(f / "export" / "model.safetensors") for f in (out, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert logged(out, "samples") == logged(whole, "samples")


def test_checkpoints_hold_only_trained_parameters(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    trained(data, out, "--stage", "align")
    (file,) = out.glob("checkpoints/*/model.safetensors")
    assert {name.split(".")[0] for name in load_file(file)} == {"adapter"}


@pytest.mark.parametrize(
    ("stage", "moves"),
    [
        ("align", {"adapter"}),
        ("finetune", {"adapter", "language_model"}),
        ("full-finetune", {"adapter", "language_model", "vision"}),
        ("lora", {"adapter", "language_model"}),
    ],
)
def test_a_stage_trains_its_parts(data: Path, tmp_path: Path, stage: str, moves: set[str]) -> None:
    first = trained(data, tmp_path / "first", "--stage", stage, "--lr", "1e-9")
    last = trained(data, tmp_path / "last", "--stage", stage)
    assert first.keys() == last.keys()
    moved = {name.split(".")[0] for name in first if (first[name] - last[name]).abs().max() > 1e-6}
    assert moved == moves
    assert not any("lora" in name for name in last), "low-rank updates are merged"
    load_vlm(tmp_path / "last")


def test_the_adapter_has_a_learning_rate_of_its_own(data: Path, whole: Path, tmp_path: Path) -> None:
    start = trained(data, tmp_path / "start", "--lr", "1e-12")
    slow = trained(data, tmp_path / "slow", "--adapter-lr", "1e-12")
    moved = {name.split(".")[0] for name in start if (slow[name] - start[name]).abs().max() > 1e-6}
    assert moved == {"language_model"}
    start, slow = (
        trained(data, tmp_path / name, "--adapter", "truncated", *more)
        for name, more in (("start2", ["--lr", "1e-12"]), ("slow2", ["--adapter-lr", "1e-12"]))
    )
    moved = {".".join(n.split(".")[:2]) for n in start if (slow[n] - start[n]).abs().max() > 1e-6}
    assert moved == {"adapter.head", "language_model.lm_head", "language_model.model"}, (
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


def launched(ranks: int, command: list[str]) -> subprocess.Popen[bytes]:
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    start = [*run, "-m", "localign"] if run else [sys.executable, "-m", "localign"]
    source = str(Path(localign.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source, "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([*start, *command], env=environment, start_new_session=True)


def finished(ranks: int, command: list[str]) -> None:
    process = launched(ranks, command)
    assert process.wait(timeout=300) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        (2, ["--micro-batch", "2"]),
        (2, ["--micro-batch", "2", "--sharding", "full"]),
        (4, ["--sharding", "full"]),
        (4, ["--sharding", "full", "--micro-batch", "1", "--reshard-after-forward", "false"]),
        (4, ["--sharding", "full", "--micro-batch", "auto"]),
    ],
    ids=str,
)
def test_several_ranks_equal_one(
    data: Path, whole: Path, tmp_path: Path, ranks: int, more: list[str]
) -> None:
    finished(ranks, arguments(data, tmp_path / "run", *more))
    ours, theirs = (load_file(f / "export" / "model.safetensors") for f in (tmp_path / "run", whole))
    assert_close(ours, theirs)
    assert logged(tmp_path / "run", "samples") == logged(whole, "samples")
    for field in ("loss", "val_loss", "grad_norm"):
        assert logged(tmp_path / "run", field) == pytest.approx(logged(whole, field), abs=1e-5)


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


@pytest.mark.slow
def test_ranks_with_and_without_images_stay_in_step(data: Path, tmp_path: Path) -> None:
    """A batch of two records on two ranks: often only one rank has an image."""
    more = ["--batch-size", "2", "--sharding", "full", "--steps", "12"]
    finished(2, arguments(data, tmp_path / "two", *more))
    single = trained(data, tmp_path / "one", *more[:2], *more[4:])
    assert_close(load_file(tmp_path / "two" / "export" / "model.safetensors"), single)


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
        again = LocalignVLM(model.config)
        assert [type(m) for m in again.vision.modules()] == [type(m) for m in model.vision.modules()]


def without_llm(command: list[str]) -> list[str]:
    at = command.index("--llm")
    return command[:at] + command[at + 2 :]


@pytest.mark.slow
@pytest.mark.parametrize("start", ["init", "tied, lora"])
def test_other_ranks_receive_the_first_ranks_weights(
    data: Path, whole: Path, tmp_path: Path, start: str
) -> None:
    """Only the first rank reads weight files."""
    if start == "init":
        one, two = (without_llm(arguments(data, tmp_path / n, "--init", str(whole))) for n in ("one", "two"))
    else:
        tiny_llm("qwen", tie_word_embeddings=True).save_pretrained(tmp_path / "llm")
        tiny_tokenizer(bos=False).save_pretrained(tmp_path / "llm")
        more = ["--llm", str(tmp_path / "llm"), "--stage", "lora"]
        one, two = (arguments(data, tmp_path / name, *more) for name in ("one", "two"))
    assert main(one) == 0
    finished(2, [*two, "--sharding", "full"])
    ours, theirs = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("two", "one"))
    assert_close(ours, theirs)


@pytest.mark.parametrize("start", ["llm", "init"])
def test_other_ranks_read_no_weights(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    shutil.copytree(data / "llama" if start == "llm" else whole / "export", tmp_path / "weightless")
    (tmp_path / "weightless" / "model.safetensors").unlink()
    command = arguments(
        data, tmp_path / "run", f"--{start}", str(tmp_path / "weightless"), "--sharding", "full"
    )
    config = parse("vlm train", (command if start == "llm" else without_llm(command))[2:])
    monkeypatch.setenv("RANK", "1")
    model, _ = build_vlm(config)
    assert all(p.is_meta for p in model.language_model.parameters())
    monkeypatch.setenv("RANK", "0")
    with pytest.raises((UserError, OSError)):
        build_vlm(config)


def last_step(out: Path) -> int:
    try:
        return max(logged(out, "loss"), default=0)
    except (FileNotFoundError, json.JSONDecodeError):  # no log yet, or its last line is incomplete
        return 0


@pytest.mark.slow
def test_resuming_after_kills_with_other_numbers_of_ranks(data: Path, tmp_path: Path) -> None:
    out, draw = tmp_path / "run", random.Random(3)
    more = ["--checkpoint-every", "1", "--sharding", "full", "--resume", "auto", "--steps", "60"]
    whole = trained(data, tmp_path / "whole", "--steps", "60")
    reached = []
    for ranks in (1, 2, 1, 2):
        process = launched(ranks, arguments(data, out, *more))
        began, deadline = last_step(out), time.monotonic() + 120
        while last_step(out) <= began and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.3))
        assert process.poll() is None, "the run ended before it could be killed"
        kill_all(process)
        reached.append(last_step(out))
    assert 0 < reached[0] < reached[-1] < 60
    finished(2, arguments(data, out, *more))
    assert_close(load_file(out / "export" / "model.safetensors"), whole, atol=2e-5)
    assert logged(out, "samples") == logged(tmp_path / "whole", "samples")
