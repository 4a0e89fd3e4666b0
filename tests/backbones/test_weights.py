"""Weight files of other projects are read strictly, and no code in them runs."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from localign.backbones.moco import read_moco_v3
from localign.backbones.weights import read_file, read_state_dict, unwrapped
from localign.errors import UserError
from localign.weights import load_strict


class Payload:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("writer", ["zip", "legacy", "pickle"])
@pytest.mark.filterwarnings("ignore")
def test_a_pickle_with_code_is_refused_in_one_line_and_not_run(tmp_path: Path, writer: str) -> None:
    trace = tmp_path / "ran"
    content = {"state_dict": {"a": torch.zeros(2)}, "extra": Payload(f"touch {trace}")}
    file = tmp_path / "weights.pth"
    if writer == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=writer == "zip")
    with pytest.raises(UserError, match="could run code") as caught:
        read_file(file)
    assert "\n" not in str(caught.value)
    assert not trace.exists()
    if writer != "pickle":
        assert "system" in str(caught.value)


def test_a_namespace_is_let_in(tmp_path: Path) -> None:
    torch.save(
        {"args": argparse.Namespace(lr=0.1), "state_dict": {"a": torch.ones(1)}}, tmp_path / "w.pth.tar"
    )
    assert read_file(tmp_path / "w.pth.tar")["args"].lr == 0.1


def test_files_that_are_no_checkpoints_are_refused_in_one_line(tmp_path: Path) -> None:
    good = tmp_path / "good.pth"
    torch.save({"a": torch.arange(100.0)}, good)
    safe = tmp_path / "good.safetensors"
    save_file({"a": torch.arange(100.0)}, safe)
    files = {
        "empty.pth": b"",
        "text.pth": b"hello",
        "cut.pth": good.read_bytes()[:-200],
        "x.safetensors": b"{}",
    }
    files["cut.safetensors"] = safe.read_bytes()[:-10]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    torch.save(torch.zeros(2), tmp_path / "tensor.pth")
    torch.save({"epoch": 3}, tmp_path / "nothing.pth")
    for name in (*files, "tensor.pth", "nothing.pth", "absent.pth"):
        with pytest.raises(UserError) as caught:
            read_state_dict(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapper_prefixes_come_off(prefix: str) -> None:
    assert unwrapped(f"{prefix}blocks.0.module.weight") == "blocks.0.module.weight"


@pytest.mark.parametrize("section", ["", "state_dict", "model", "state_dict_ema", "model_ema", "teacher"])
def test_the_state_dict_is_found_in_its_section(tmp_path: Path, section: str) -> None:
    state = {"module.a": torch.ones(2), "_orig_mod.b": torch.zeros(1)}
    torch.save({section: state, "epoch": 1} if section else state, tmp_path / "w.pth")
    assert sorted(read_state_dict(tmp_path / "w.pth")) == ["a", "b"]


def test_averaged_weights_come_before_plain_ones(tmp_path: Path) -> None:
    states = {"state_dict": {"a": torch.zeros(1)}, "state_dict_ema": {"a": torch.ones(1)}}
    torch.save(states, tmp_path / "w.pth")
    assert read_state_dict(tmp_path / "w.pth")["a"].item() == 1
    torch.save({**states, "state_dict_ema": None}, tmp_path / "w.pth")
    assert read_state_dict(tmp_path / "w.pth")["a"].item() == 0


def test_every_tensor_must_be_there_and_fit() -> None:
    module = nn.Linear(3, 2)
    good = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    load_strict(module, good, "file")
    assert torch.equal(module.weight, torch.ones(2, 3))
    bad = {"weight": torch.ones(3, 3), "scale": torch.ones(1)}
    with pytest.raises(UserError) as caught:
        load_strict(module, bad, "file")
    message = str(caught.value)
    assert "missing 1 (bias)" in message
    assert "extra 1 (scale)" in message
    assert "weight (3, 3) for (2, 3)" in message
    assert torch.equal(module.weight, torch.ones(2, 3))
    load_strict(module, {**good, "head.weight": torch.ones(1)}, "file", ignore=("head.",))
    with pytest.raises(UserError, match=r"missing 1 \(weight\)"):  # `ignore` applies to extra tensors only
        load_strict(module, {"bias": torch.zeros(2)}, "file", ignore=("weight",))


def test_moco_v3_files_give_the_online_encoder_without_its_projection(tmp_path: Path) -> None:
    encoder = {"cls_token": torch.ones(1, 1, 4), "blocks.0.norm1.weight": torch.ones(4)}
    state = {f"module.base_encoder.{k}": v for k, v in encoder.items()}
    state |= {f"module.momentum_encoder.{k}": v * 2 for k, v in encoder.items()}
    state |= {f"module.base_encoder.head.{i}.weight": torch.ones(2) for i in (0, 1, 3)}
    state["module.predictor.0.weight"] = torch.ones(2)
    torch.save({"epoch": 300, "arch": "vit_base", "state_dict": state}, tmp_path / "vit-b-300ep.pth.tar")
    read = read_moco_v3(tmp_path / "vit-b-300ep.pth.tar")
    assert sorted(read) == sorted(encoder)
    assert all(torch.equal(read[k], encoder[k]) for k in encoder)
    torch.save({"state_dict": encoder}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="not a MoCo v3 checkpoint"):
        read_moco_v3(tmp_path / "other.pth")
