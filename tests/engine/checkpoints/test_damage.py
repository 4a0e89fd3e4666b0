"""A damaged checkpoint is reported and set aside, and the previous one is used."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_runs import last_step, logged, run, run_until, same_bits, tiny, weights

from localign.alignment import AlignConfig
from localign.engine.checkpoints import replicated as checkpoints
from localign.engine.checkpoints.replicated import Checkpoints
from localign.engine.log import JsonLines
from localign.errors import RunFailure, UserError

STEPS = 8


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def add(file: Path) -> None:
    (file.parent / "shard-00007.safetensors").write_bytes(b"")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "flip": flip,
    "truncate": truncate,
    "remove": Path.unlink,
    "add": add,
}
FILES = ("model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json")


@pytest.fixture
def stopped(tmp_path: Path, images: Path) -> AlignConfig:
    """A run with checkpoints of steps 2, 4 and 6."""
    config = tiny(tmp_path / "run", images, keep_checkpoints=3, ema_decay=0.9)
    run_until(config, 7)
    return replace(config, resume="must")


def checkpoint(config: AlignConfig, step: int) -> Path:
    return Path(config.out) / "checkpoints" / f"step-{step:07d}"


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", DAMAGE)
def test_the_previous_checkpoint_is_used(
    stopped: AlignConfig, images: Path, capsys: pytest.CaptureFixture[str], file: str, how: str
) -> None:
    DAMAGE[how](checkpoint(stopped, 6) / file)
    run_until(stopped, 5)  # a run resumed at step 6 would not stop before step 5
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert f"{checkpoint(stopped, 6)} is damaged: " in lines[0]
    assert ("shard-00007" if how == "add" else file) in lines[0]
    assert lines[0].endswith("set aside as step-0000006.damaged")
    assert lines[1] == "resuming from the previous checkpoint: step 4"


def test_the_run_equals_an_undamaged_run(stopped: AlignConfig, tmp_path: Path) -> None:
    flip(checkpoint(stopped, 6) / "model.safetensors")
    truncate(checkpoint(stopped, 4) / "optimizer.safetensors")
    run(stopped)
    run(replace(stopped, out=str(tmp_path / "undamaged"), resume="never"))
    for file in ("model", "optimizer", "ema"):
        assert same_bits(*(weights(tmp_path / p, STEPS, f"{file}.safetensors") for p in ("run", "undamaged")))
    for field in ("samples", "loss"):
        assert logged(tmp_path / "run", field) == logged(tmp_path / "undamaged", field)
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-0000004", "step-0000006", "step-0000008"], "damaged ones are deleted later"


def test_an_intact_checkpoint_is_not_deleted_because_of_damaged_ones(stopped: AlignConfig) -> None:
    flip(checkpoint(stopped, 6) / "model.safetensors")
    flip(checkpoint(stopped, 4) / "model.safetensors")
    run_until(replace(stopped, keep_checkpoints=1, checkpoint_every=1), 4)
    assert Checkpoints(Path(stopped.out) / "checkpoints").steps() == [4]


@pytest.mark.parametrize("resume", ["must", "auto"])
def test_a_run_does_not_start_again_if_all_checkpoints_are_damaged(stopped: AlignConfig, resume: Any) -> None:
    for step in (2, 4, 6):
        flip(checkpoint(stopped, step) / "model.safetensors")
    with pytest.raises(UserError, match=r"step-0000006 is damaged: .*; so are the 2 before it") as caught:
        run(replace(stopped, resume=resume))
    assert "\n" not in str(caught.value)
    assert checkpoint(stopped, 6).is_dir(), "nothing was changed"
    assert last_step(Path(stopped.out)) == 7


def test_checkpoints_without_checksums_are_used(
    stopped: AlignConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    file = checkpoint(stopped, 6) / "state.json"
    state = json.loads(file.read_text())
    del state["files"], state["checksum"]
    file.write_text(json.dumps(state))
    assert run(stopped).results["steps"] == STEPS
    assert "step 6 has no checksums" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["files", "checksum"])
def test_a_checkpoint_with_only_one_kind_of_checksum_is_damaged(stopped: AlignConfig, field: str) -> None:
    file = checkpoint(stopped, 6) / "state.json"
    state = json.loads(file.read_text())
    del state[field]
    file.write_text(json.dumps(state))
    with pytest.raises(UserError, match="is damaged"):
        Checkpoints(Path(stopped.out) / "checkpoints").verify(6)


def test_a_state_with_missing_fields_is_refused(stopped: AlignConfig) -> None:
    (checkpoint(stopped, 6) / "state.json").write_text('{"step": 6, "task": {}}')
    with pytest.raises(UserError, match="step-0000006 lacks: bad_images, best, digest"):
        run(stopped)


def test_the_mark_of_a_damaged_best_checkpoint_is_deleted(tmp_path: Path, images: Path, val: Path) -> None:
    config = tiny(tmp_path, images, val=str(val), val_every=4, keep_checkpoints=3)
    run_until(config, 5)
    store = Checkpoints(tmp_path / "checkpoints")
    best = store.best()
    assert best is not None
    assert best["step"] == 4
    flip(store.path(4) / "model.safetensors")
    run_until(replace(config, resume="must"), 3)
    assert store.best() is None


def raising(number: int) -> Callable[..., None]:
    def call(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize(
    ("owner", "name"),
    [(checkpoints, "save_file"), (JsonLines, "write"), (Path, "mkdir"), (os, "fsync")],
)
def test_write_errors_end_the_run_with_one_line(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int
) -> None:
    config = tiny(tmp_path / "run", images)
    run_until(config, 5)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, raising(number))
        with pytest.raises(RunFailure, match=f"^cannot write .*{os.strerror(number)}") as caught:
            run(replace(config, resume="must"))
    assert "\n" not in str(caught.value)
    assert Checkpoints(tmp_path / "run" / "checkpoints").verify(4), "the last good checkpoint survives"
    run(replace(config, resume="must"))
    assert sorted(logged(tmp_path / "run", "samples")) == list(range(1, STEPS + 1))
    assert not list(tmp_path.rglob(".*.tmp"))


def test_the_line_says_how_to_resume(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(tmp_path / "run", images)
    run_until(config, 3)
    monkeypatch.setattr(checkpoints, "save_file", raising(errno.ENOSPC))
    with pytest.raises(RunFailure, match=r"No space left on device; --resume continues from step 2$"):
        run(replace(config, resume="must"))
    with pytest.raises(RunFailure, match=r"there is no checkpoint$"):
        run(replace(config, out=str(tmp_path / "other")))


def test_a_deleted_run_folder_is_not_created_again(tmp_path: Path, images: Path) -> None:
    config = tiny(tmp_path / "run", images)
    run_until(config, 3)
    write = JsonLines.write

    def moving(self: JsonLines, entry: dict[str, Any]) -> None:
        write(self, entry)
        if entry["step"] == 5:
            (tmp_path / "run").rename(tmp_path / "elsewhere")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JsonLines, "write", moving)
        with pytest.raises(RunFailure, match=r"cannot write .*run: the run folder is gone"):
            run(replace(config, resume="must"))
    assert not (tmp_path / "run").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    run(replace(config, resume="must"))
    assert sorted(logged(tmp_path / "run", "samples")) == list(range(1, STEPS + 1))


def test_an_out_that_cannot_be_created_ends_the_run(tmp_path: Path, images: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailure, match=r"cannot write .*Not a directory") as caught:
        run(tiny(tmp_path / "file" / "run", images))
    assert "\n" not in str(caught.value)
