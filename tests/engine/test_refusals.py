"""What may not change on resume, and the error lines if it does."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from engine_runs import COMMAND, DisturbedAlignment, make_images, reseal, run, run_until, tiny
from safetensors.torch import load_file, save_file

from localign.alignment import AlignConfig
from localign.engine import train
from localign.errors import UserError


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, images: Path) -> AlignConfig:
    """A run with checkpoints of steps 2 and 4. Tests copy it."""
    config = tiny(tmp_path_factory.mktemp("started") / "run", images, ema_decay=0.9)
    run_until(config, 5)
    return config


@pytest.fixture
def resumed(started: AlignConfig, tmp_path: Path) -> AlignConfig:
    shutil.copytree(started.out, tmp_path / "run")
    return replace(started, out=str(tmp_path / "run"), resume="must")


def refusal(config: AlignConfig) -> str:
    """The error line with which a run is refused."""
    with pytest.raises(UserError) as caught:
        run(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_changed_options_are_named_with_both_values(resumed: AlignConfig) -> None:
    line = refusal(replace(resumed, lr=0.5, seed=3))
    assert "lr: 0.001 before, 0.5 now" in line
    assert "seed: 0 before, 3 now" in line
    assert "workers" not in refusal(replace(resumed, lr=0.5, workers=1))


@pytest.mark.parametrize(
    "field", ["steps", "batch_size", "loss", "mask", "ema_decay", "precision", "optimizer"]
)
def test_options_that_change_results_may_not_change(resumed: AlignConfig, field: str) -> None:
    other = {"steps": 9, "batch_size": 4, "loss": "l1", "mask": "bernoulli", "ema_decay": None, "precision": "bf16",
             "optimizer": "muon"}  # fmt: skip
    assert f"{field}: " in refusal(replace(resumed, **{field: other[field]}))  # type: ignore[arg-type]


def test_missing_state_of_another_optimizer_is_named(resumed: AlignConfig) -> None:
    config = Path(resumed.out) / "config.yaml"
    config.write_text(config.read_text().replace("optimizer: adamw", "optimizer: muon"))
    assert "lacks the optimizer state of" in refusal(replace(resumed, optimizer="muon"))


def test_an_option_added_later_has_its_default(resumed: AlignConfig) -> None:
    path = Path(resumed.out) / "config.yaml"
    saved = yaml.safe_load(path.read_text())
    left_out: Any = AlignConfig.__dataclass_fields__["clip_grad"].default
    assert saved["config"].pop("clip_grad") == left_out
    path.write_text(yaml.safe_dump(saved))
    assert "clip_grad" in refusal(replace(resumed, clip_grad=left_out + 1))
    assert run(resumed).results["steps"] == resumed.steps


def test_options_that_do_not_change_results_may_change(resumed: AlignConfig) -> None:
    changed = replace(resumed, workers=1, micro_batch=4, checkpoint_every=3, log_every=5, keep_checkpoints=1)
    assert run(changed).results["steps"] == 8


def test_other_images_are_refused(resumed: AlignConfig, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    make_images(folder, 20)
    assert "data: " in refusal(replace(resumed, data=str(folder)))  # another name means other data


def test_a_folder_of_images_may_have_moved(resumed: AlignConfig, images: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "another" / "disk" / images.name
    shutil.copytree(images, elsewhere)
    assert run(replace(resumed, data=str(elsewhere))).results["steps"] == 8


def test_a_folder_that_has_changed_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    make_images(folder, 20)
    config = tiny(tmp_path / "run", folder)
    run_until(config, 3)
    (folder / "0007.png").rename(folder / "moved.png")
    assert refusal(replace(config, resume="must")).endswith("changed since the run started: data")


def test_other_starting_weights_are_refused(resumed: AlignConfig) -> None:
    task = DisturbedAlignment(resumed)
    task.start_hash = DisturbedAlignment(replace(resumed, seed=99)).start_hash
    with pytest.raises(UserError, match=r"changed since the run started: starting weights$"):
        train(task, resumed, COMMAND)


@pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors"])
def test_tensors_that_are_missing_or_extra_are_named(resumed: AlignConfig, file: str) -> None:
    path = Path(resumed.out) / "checkpoints" / "step-0000004" / file
    tensors = load_file(path)
    tensors["decoder.surplus"] = tensors.pop("decoder.norm.weight")
    save_file(tensors, path)
    reseal(path.parent)
    line = refusal(resumed)
    assert "missing 1 (decoder.norm.weight)" in line
    assert "extra 1 (decoder.surplus)" in line
    assert file in line


def test_a_missing_average_is_refused(resumed: AlignConfig) -> None:
    checkpoint = Path(resumed.out) / "checkpoints" / "step-0000004"
    (checkpoint / "ema.safetensors").unlink()
    reseal(checkpoint)
    assert "ema.safetensors does not fit: missing" in refusal(resumed)


def test_a_run_is_not_overwritten(resumed: AlignConfig) -> None:
    before = sorted(p.name for p in Path(resumed.out).rglob("*"))
    assert "already holds a run (at step 4)" in refusal(replace(resumed, resume="never"))
    assert sorted(p.name for p in Path(resumed.out).rglob("*")) == before


def test_nothing_to_resume(tmp_path: Path, images: Path) -> None:
    assert "nothing to resume" in refusal(tiny(tmp_path / "none", images, resume="must"))
    assert not (tmp_path / "none").exists()


def test_a_run_of_another_command_is_refused(resumed: AlignConfig) -> None:
    with pytest.raises(UserError, match="is a run of `localign align`, not of `localign pretrain`"):
        train(DisturbedAlignment(resumed), resumed, "pretrain")


@pytest.mark.parametrize("text", ["a: [", "7", "config: 3\n"])
def test_an_invalid_config_is_refused(resumed: AlignConfig, text: str) -> None:
    (Path(resumed.out) / "config.yaml").write_text(text)
    assert "config.yaml" in refusal(resumed)
