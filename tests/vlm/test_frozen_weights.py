"""Frozen linear layers are held in bfloat16 in bfloat16 runs: the same numbers, half the memory, exact exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from vlm_runs import arguments, logged, trained, write_conversations

from localign.cli import parse
from localign.planning.vlm import _frozen_bytes
from localign.vlm import task as vlm_task
from localign.vlm.frozen import hold_in_bf16, holds_bf16, restore_float32, roundable
from localign.vlm.model.build import build_vlm
from localign.vlm.task import VLMTask

BF16 = ["--precision", "bf16", "--steps", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("stage", [["align"], ["lora", "--lora-rank", "2"]], ids=lambda s: s[0])
def test_a_run_is_the_same_bit_by_bit(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: list[str]
) -> None:
    if stage[0] == "lora":
        pytest.importorskip("peft")
    more = ["--stage", *stage, *BF16]
    rounded = trained(data, tmp_path / "rounded", *more)
    monkeypatch.setattr(vlm_task, "holds_bf16", lambda *_: False)
    exact = trained(data, tmp_path / "exact", *more)
    for field in ("loss", "grad_norm", "val_loss"):
        assert logged(tmp_path / "rounded", field) == logged(tmp_path / "exact", field), field
    assert all(torch.equal(rounded[name], exact[name]) for name in exact)
    assert {t.dtype for t in rounded.values()} == {torch.float32}


def test_which_weights_are_rounded(data: Path, tmp_path: Path) -> None:
    config = parse("vlm train", arguments(data, tmp_path / "run", "--stage", "align", *BF16)[2:])
    task = VLMTask(config)
    before = {n: p.detach().clone() for n, p in task.model.named_parameters()}
    task.to(torch.device("cpu"))
    rounded = {n for n, p in task.model.named_parameters() if p.dtype == torch.bfloat16}
    linear = {
        f"{n}.{kind}"
        for n, m in task.model.named_modules()
        if isinstance(m, nn.Linear)
        for kind, _ in m.named_parameters()
    }
    assert rounded <= linear
    assert any("vision." in name for name in rounded)
    assert any("language_model." in name for name in rounded)
    assert not any("embed" in name or "norm" in name or "adapter" in name for name in rounded)
    restore_float32(task.model, task._rounded)
    assert all(torch.equal(p, before[n]) for n, p in task.model.named_parameters())


def test_a_tied_output_layer_stays_in_float32() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
    model["head"].weight = model["embedding"].weight
    assert not roundable(model.requires_grad_(False))


def test_weights_that_bf16_represents_are_not_kept_twice() -> None:
    model = nn.Linear(4, 8).requires_grad_(False)
    model.weight.data = model.weight.data.bfloat16().float()
    assert set(hold_in_bf16(model)) == {"bias"}


@pytest.mark.parametrize(
    "more", [["--precision", "fp32"], ["--ema-decay", "0.9"], ["--sharding", "full"], ["--precision", "bf16"]]
)
def test_a_plan_counts_what_is_held(data: Path, tmp_path: Path, more: list[str]) -> None:
    config: Any = parse("vlm train", arguments(data, tmp_path / "run", "--stage", "align", *more)[2:])
    model, _ = build_vlm(config)
    planned = _frozen_bytes(model, config, share=1)
    if holds_bf16(config, "cuda"):
        hold_in_bf16(model)
    held = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    assert planned == held
    assert (more == ["--precision", "bf16"]) == holds_bf16(config, "cuda")


def test_an_export_of_a_rounded_run_holds_the_language_model_as_it_was(data: Path, tmp_path: Path) -> None:
    weights = trained(data, tmp_path / "run", "--stage", "align", *BF16)
    given = load_file(data / "llama" / "model.safetensors")
    name = "layers.0.mlp.down_proj.weight"
    ours = next(t for n, t in weights.items() if n.endswith(name))
    theirs = next(t for n, t in given.items() if n.endswith(name))
    assert torch.equal(ours, theirs)
