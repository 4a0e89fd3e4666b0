"""Training vision-language models on several ranks gives the result of one rank."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from engine_runs import kill_all
from safetensors.torch import load_file
from tiny_vlm import tiny_llm, tiny_tokenizer
from vlm_runs import arguments, assert_close, logged, trained, without_llm

import localign
from localign.cli import main, parse
from localign.errors import UserError
from localign.vlm.model.build import build_vlm


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


@pytest.mark.slow
def test_ranks_with_and_without_images_stay_in_step(data: Path, tmp_path: Path) -> None:
    """A batch of two records on two ranks: often only one rank has an image."""
    more = ["--batch-size", "2", "--sharding", "full", "--steps", "12"]
    finished(2, arguments(data, tmp_path / "two", *more))
    single = trained(data, tmp_path / "one", *more[:2], *more[4:])
    assert_close(load_file(tmp_path / "two" / "export" / "model.safetensors"), single)


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
