"""Runs with every objective: the loss falls, and runs resume, export and write a complete folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import localign
from localign.alignment import AlignConfig, AlignTask, load_student
from localign.alignment.setup import student_of_run
from localign.cli import main
from localign.data.loader import Batch
from localign.engine import StepResult, train
from localign.engine.distributed import DistributedContext
from localign.engine.run_folder import read_config
from localign.errors import UserError

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "maskembed": {"decoder_layer_scale": 0.1},
    "averaging": {"mask": "block", "block_min_patches": 2},
    "additive": {},
    "additive-shapley": {"objective": "additive", "mask": "shapley"},
    "clipself": {},
    "clipself-transformer": {"objective": "clipself", "decoder": "transformer", "decoder_layer_scale": 0.1},
    "mim": {},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for index in range(16):
        small = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((40, 40), Image.Resampling.BICUBIC).save(folder / f"{index:02d}.png")
    return folder


def config_of(variant: str, photos: Path, out: Path, **options: Any) -> AlignConfig:
    values: dict[str, Any] = {
        "backbone": "vit_tiny_patch16_224", "weights": "none", "model_kwargs": TINY, "data": str(photos),
        "val": str(photos), "out": str(out), "steps": 6, "batch_size": 8, "lr": 3e-3, "scale_images": 16,
        "workers": 0, "log_every": 1, "checkpoint_every": 2, "device": "cpu", "objective": variant,
    }  # fmt: skip
    return AlignConfig(**{**values, **VARIANTS[variant], **options})


class Stopping(AlignTask):
    """An alignment that is interrupted before a given step."""

    class Stopped(Exception):
        pass

    stop_before: int | None = None

    def step(self, model: nn.Module, batch: Batch) -> StepResult:
        if int(batch.positions[0]) // self.config.batch_size == self.stop_before:
            raise Stopping.Stopped
        return super().step(model, batch)


@every_variant
def test_the_loss_falls(variant: str, photos: Path, tmp_path: Path) -> None:
    config = config_of(variant, photos, tmp_path, steps=30, checkpoint_every=100)
    context = DistributedContext(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    task = AlignTask(config)
    final = train(task, config, "align").results["final"]["val_loss"]
    fresh = AlignTask(config)
    fresh.load_state_dict(task.state_dict())
    with torch.no_grad():
        first = fresh.validate(fresh.module.eval(), context)["val_loss"]
    assert final < 0.97 * first


@every_variant
def test_a_resumed_run_equals_an_uninterrupted_one(variant: str, photos: Path, tmp_path: Path) -> None:
    whole = config_of(variant, photos, tmp_path / "whole")
    expected = train(AlignTask(whole), whole, "align").results
    config = config_of(variant, photos, tmp_path / "cut")
    task = Stopping(config)
    task.stop_before = 5
    with pytest.raises(Stopping.Stopped):
        train(task, config, "align")
    config = replace(config, resume="must")
    results = train(AlignTask(config), config, "align").results
    for field in ("final", "target_scale", "samples_digest"):
        assert results[field] == expected[field]
    states = [
        load_file(tmp_path / name / "checkpoints/step-0000006/model.safetensors") for name in ("whole", "cut")
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@every_variant
@torch.no_grad()
def test_validation_is_the_same_for_any_micro_batch_and_number_of_ranks(
    variant: str, photos: Path, tmp_path: Path
) -> None:
    def sums(size: int, rank: int, micro: int) -> torch.Tensor:
        task = AlignTask(config_of(variant, photos, tmp_path, micro_batch=micro))
        found: list[torch.Tensor] = []

        class RecordingContext(DistributedContext):
            def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
                found.append(values.clone())
                return values

        context = RecordingContext(rank=rank, size=size, local_rank=rank, device=torch.device("cpu"))
        task.validate(task.module.eval(), context)
        return found[0]

    alone = sums(1, 0, 8)
    assert torch.equal(sums(1, 0, 8), alone)
    assert torch.allclose(sums(1, 0, 2), alone, rtol=1e-4)
    assert torch.allclose(sums(2, 0, 4) + sums(2, 1, 4), alone, rtol=1e-4)


@every_variant
def test_the_command_writes_a_complete_folder(
    variant: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    options = {
        "backbone": "vit_tiny_patch16_224", "weights": "none", "data": photos, "val": photos, "out": out,
        "steps": 2, "batch_size": 4, "workers": 0, "scale_images": 4, "device": "cpu", "objective": variant,
        "model_kwargs": json.dumps(TINY), **VARIANTS[variant],
    }  # fmt: skip
    assert main(["align", *(f"--{k.replace('_', '-')}={v}" for k, v in options.items())]) == 0
    assert (out / "report.html").stat().st_size > 1000
    with np.load(out / "pictures.npz") as pictures:
        assert "pca_aligned" in pictures
        assert ("reconstruction" in pictures) == (variant == "maskembed")
    saved = read_config(out)["config"]
    assert None not in (saved["target"], saved["loss"], saved["decoder"])
    assert saved["mask"] is not None or saved["objective"] == "clipself"

    decodes = saved["decoder"] == "transformer"
    backbone = localign.load(out)
    student, _ = student_of_run(out)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(backbone.tokens(images), student.encoder.backbone.tokens(images))
    assert main(["export", str(out), "--out", str(tmp_path / "again")]) == 0
    for folder in (out / "export", tmp_path / "again"):
        assert (folder / "decoder.safetensors").is_file() == decodes
        if decodes:
            assert load_student(folder).decoder is not None
        else:
            with pytest.raises(UserError, match="a backbone without a decoder"):
                localign.load(folder, decoder=True)


def test_an_export_names_its_method(photos: Path, tmp_path: Path) -> None:
    task = AlignTask(config_of("clipself", photos, tmp_path))
    task.export(task.module, tmp_path, {})
    provenance = json.loads((tmp_path / "config.json").read_text())["localign"]["provenance"]
    assert provenance["method"] == "CLIPSelf"


def test_contradictions_on_the_command_line_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["align", "--objective", "clipself", "--mask", "block"]) == 2
    assert (
        capsys.readouterr().err
        == "localign: --objective clipself has no masks: --mask would have no effect\n"
    )
    assert main(["align", "--objective", "clip"]) == 2
    assert "--objective takes one of [maskembed" in capsys.readouterr().err
