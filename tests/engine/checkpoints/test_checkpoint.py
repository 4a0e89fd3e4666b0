"""Checkpoints are complete or absent, even if the process dies while saving."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_runs import run, run_until, same_bits, tiny
from safetensors.torch import save_file
from torch import nn

from localign import files
from localign.engine.checkpoints import replicated as checkpoints_module
from localign.engine.checkpoints.replicated import (
    Checkpoints,
    load_optimizer_tensors,
    optimizer_tensors,
)
from localign.errors import UserError
from localign.files import sweep


def small() -> tuple[nn.Module, torch.optim.AdamW]:
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()
    return module, optimizer


class Killed(BaseException):
    """Not an Exception, so that no handler catches it."""


@pytest.mark.parametrize("file", [1, 2, 3])
def test_a_death_while_saving_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: int
) -> None:
    module, optimizer = small()
    store = Checkpoints(tmp_path)
    store.save(1, module, optimizer, {"x": 1}, ema=module)
    written: list[Path] = []

    def dying(tensors: dict[str, torch.Tensor], path: Path) -> None:
        written.append(path)
        if len(written) == file:
            path.write_bytes(b"half")
            raise Killed
        save_file(tensors, path)

    monkeypatch.setattr(checkpoints_module, "save_file", dying)
    with pytest.raises(Killed):
        store.save(2, module, optimizer, {"x": 2}, ema=module)
    assert store.steps() == [1]
    assert store.load(1).state.items() >= {"step": 1, "x": 1}.items()


@pytest.mark.parametrize("call", ["fsync_path", "replace"])
def test_a_death_before_the_rename_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    module, optimizer = small()
    store = Checkpoints(tmp_path)
    store.save(1, module, optimizer, {})

    def dying(*_: object) -> None:
        raise Killed

    monkeypatch.setattr(os if call == "replace" else files, call, dying)
    with pytest.raises(Killed):
        store.save(2, module, optimizer, {})
    assert store.steps() == [1]


def test_only_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    module, optimizer = small()
    store = Checkpoints(tmp_path / "checkpoints")
    store.save(1, module, optimizer, {})
    half = store.folder / ".step-0000002.4711.tmp"
    half.mkdir()
    (half / "state.json").write_text("{}")
    (store.folder / ".best.json.4711.tmp").write_text("{")
    (tmp_path / ".results.json.4711.tmp").write_text("{")
    assert store.steps() == [1]
    sweep(tmp_path, store.folder, tmp_path / "missing")
    assert sorted(p.name for p in tmp_path.rglob(".*")) == []
    assert store.load(1).step == 1


def test_a_resumed_run_removes_leftovers(tmp_path: Path, images: Path) -> None:
    config = tiny(tmp_path, images)
    run_until(config, 3)
    half = tmp_path / "checkpoints" / ".step-0000004.4711.tmp"
    half.mkdir()
    (tmp_path / ".config.yaml.4711.tmp").write_text("x")
    run(replace(config, resume="must"))
    assert not list(tmp_path.rglob(".*.tmp"))


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    module, optimizer = small()
    store = Checkpoints(tmp_path, keep=2)
    for step in range(1, 6):
        store.save(step, module, optimizer, {})
        if step == 2:
            store.mark_best(2, 0.5)
    assert store.steps() == [2, 4, 5]
    assert store.best() == {"step": 2, "val_loss": 0.5}
    store.mark_best(5, 0.4)
    assert store.steps() == [4, 5]


def test_a_step_is_not_written_twice(
    tmp_path: Path, images: Path, val: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Replacing a checkpoint leaves a moment without it, and if only one is kept, a moment without any.
    saved: list[int] = []
    save = Checkpoints.save

    def recording(self: Checkpoints, step: int, *args: object) -> Path:
        assert not self.path(step).exists()
        saved.append(step)
        return save(self, step, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Checkpoints, "save", recording)
    run(tiny(tmp_path, images, steps=6, val=str(val), val_every=1, keep_checkpoints=1))
    assert len(saved) == len(set(saved))
    assert saved[-1] == 6


def test_a_death_between_saving_and_marking_the_best_is_repaired(
    tmp_path: Path, images: Path, val: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path, images, steps=4, val=str(val), val_every=2)

    def dying(self: Checkpoints, step: int, val_loss: float) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "mark_best", dying)
        with pytest.raises(Killed):
            run(config)
    assert Checkpoints(tmp_path / "checkpoints").best() is None
    run_until(replace(config, resume="must"), 3)
    best = Checkpoints(tmp_path / "checkpoints").best()
    assert best is not None
    assert best["step"] == 2


def test_optimizer_state_is_stored_by_parameter_name(tmp_path: Path) -> None:
    module, optimizer = small()
    tensors = optimizer_tensors(module, optimizer)
    assert {k for k in tensors if k.endswith("0.weight")} == {
        "step.0.weight",
        "exp_avg.0.weight",
        "exp_avg_sq.0.weight",
    }
    other, fresh = small()
    load_optimizer_tensors(other, fresh, tensors, "x")
    assert same_bits(optimizer_tensors(other, fresh), tensors)
    with pytest.raises(UserError, match=r"lacks the optimizer state of 0\.weight: exp_avg_sq"):
        load_optimizer_tensors(
            other, fresh, {k: v for k, v in tensors.items() if k != "exp_avg_sq.0.weight"}, "x"
        )
    with pytest.raises(UserError, match=r"lacks the optimizer state of 1\.bias: exp_avg, exp_avg_sq, step"):
        load_optimizer_tensors(
            other, fresh, {k: v for k, v in tensors.items() if not k.endswith("1.bias")}, "x"
        )
    with pytest.raises(UserError, match=r"unknown parameters: exp_avg\.7\.weight"):
        load_optimizer_tensors(other, fresh, {**tensors, "exp_avg.7.weight": torch.ones(1)}, "x")


def test_loaded_tensors_are_copies_of_the_file(tmp_path: Path) -> None:
    module, optimizer = small()
    store = Checkpoints(tmp_path)
    store.save(1, module, optimizer, {})
    other, fresh = small()
    content = store.load(1)
    load_optimizer_tensors(other, fresh, content.optimizer, "x")
    fresh.state[other[0].weight]["exp_avg"].fill_(7)  # type: ignore[index]
    assert same_bits(store.load(1).optimizer, optimizer_tensors(module, optimizer))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["truncated", "missing"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, name: str, how: str) -> None:
    module, optimizer = small()
    store = Checkpoints(tmp_path)
    path = store.save(1, module, optimizer, {}) / name
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        path.unlink()
    with pytest.raises(UserError, match=r"step-0000001 is damaged") as caught:
        store.load(1)
    assert "\n" not in str(caught.value)


def test_state_is_readable_json(tmp_path: Path) -> None:
    module, optimizer = small()
    path = Checkpoints(tmp_path).save(3, module, optimizer, {"digest": "00ff"})
    state = json.loads((path / "state.json").read_text())
    assert (state["step"], state["digest"]) == (3, "00ff")
    assert state["files"]["model.safetensors"]["bytes"] == (path / "model.safetensors").stat().st_size
    assert sorted(p.name for p in path.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
