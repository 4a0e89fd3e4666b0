"""A resumed run notices that its data changed, and says which files; copies of the data are not changes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engine_runs import make_images, run, run_until, tiny

from localign.alignment import AlignConfig
from localign.data.sources import open_source
from localign.engine.checkpoints import data_files
from localign.engine.checkpoints.data_files import DATA_FILE, differences, load, read_states, save
from localign.errors import UserError


def write(folder: Path, files: int, size: int = 1000) -> Path:
    folder.mkdir(parents=True)
    for number in range(files):
        content = np.random.default_rng(number).integers(0, 256, size, dtype=np.uint8).tobytes()
        (folder / f"{number:02}.png").write_bytes(content)
    return folder


def listed(folder: Path) -> list[tuple[str, str]]:
    return [(path.name, str(path)) for path in sorted(folder.iterdir())]


def later(path: Path) -> None:
    """Give a file another modification time."""
    time = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(time, time))


def rewrite(path: Path) -> None:
    """Change one byte in the middle, and the time."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    later(path)


def touch_all(folder: Path) -> None:
    for path in folder.iterdir():
        later(path)


def rewrite_one_of_a_copy(folder: Path) -> None:
    touch_all(folder)
    rewrite(folder / "03.png")


def rewrite_five(folder: Path) -> None:
    for number in range(5):
        rewrite(folder / f"{number:02}.png")


def make_a_folder(folder: Path) -> None:
    (folder / "00.png").unlink()
    (folder / "00.png").mkdir()


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda f: None, ""),
    "times of all files": (touch_all, ""),
    "times of one file": (lambda f: later(f / "03.png"), ""),
    "another size": (
        lambda f: (f / "03.png").write_bytes(b"x"),
        "1 of 20 files changed (03.png: 1,000 bytes before, 1 now)",
    ),
    "other content": (lambda f: rewrite(f / "03.png"), "1 of 20 files changed (03.png: other content)"),
    "other content in a copy": (rewrite_one_of_a_copy, "1 of 20 files changed (03.png: other content)"),
    "a file is gone": (lambda f: (f / "00.png").unlink(), "1 of 20 files gone (00.png)"),
    "a file is new": (lambda f: (f / "zz.png").write_bytes(b"x"), "1 new (zz.png)"),
    "a file has another name": (
        lambda f: (f / "00.png").rename(f / "zz.png"),
        "1 of 20 files gone (00.png); 1 new (zz.png)",
    ),
    "many files": (
        rewrite_five,
        "5 of 20 files changed (00.png: other content; 01.png: other content; 02.png: other content; ...)",
    ),
    "a file is a folder now": (
        make_a_folder,
        "1 of 20 files changed (00.png: 1,000 bytes before",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_files_are_named(tmp_path: Path, change: str) -> None:
    folder = write(tmp_path / "data", 20)
    save(tmp_path, read_states(listed(folder)))
    spoil, expected = CHANGES[change]
    spoil(folder)
    saved = load(tmp_path)
    assert saved is not None
    found = "; ".join(differences(saved, listed(folder)))
    assert found.startswith(expected) if expected else found == ""


@pytest.mark.parametrize("change", ["nothing", "other content", "another size"])
def test_a_copy_without_times_is_the_same_data(tmp_path: Path, change: str) -> None:
    folder = write(tmp_path / "data", 20)
    saved = read_states(listed(folder))
    copied = tmp_path / "far" / "data"
    shutil.copytree(folder, copied, copy_function=shutil.copyfile)
    touch_all(copied)
    CHANGES[change][0](copied)
    found = differences(saved, listed(copied))
    assert len(found) == (0 if change == "nothing" else 1)


def test_files_that_are_not_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A touched file that nobody can compare has changed, unless all files were touched: then they are a copy."""
    monkeypatch.setattr(data_files, "MAX_HASHED", 4)
    folder = write(tmp_path / "data", 20)
    saved = read_states(listed(folder))
    assert saved.hashed.tolist() == [0, 5, 10, 15]
    later(folder / "05.png")
    assert differences(saved, listed(folder)) == []
    later(folder / "06.png")
    assert differences(saved, listed(folder)) == ["1 of 20 files changed (06.png: other content)"]
    touch_all(folder)
    assert differences(saved, listed(folder)) == []
    rewrite(folder / "10.png")
    assert len(differences(saved, listed(folder))) == 1


def test_large_files_are_hashed_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_files, "HASHED_BYTES", 2**18)
    folder = write(tmp_path / "data", 1, size=2**21)
    saved = read_states(listed(folder))
    touch_all(folder)
    assert differences(saved, listed(folder)) == []
    rewrite(folder / "00.png")  # in the middle, which is in a block
    assert len(differences(saved, listed(folder))) == 1


def test_unusual_names_and_no_files(tmp_path: Path) -> None:
    names = ["a\nb.png", b"\xe4.png".decode("utf-8", "surrogateescape"), "ü.png", "x" * 200]
    (tmp_path / "data").mkdir()
    for name in names:
        (tmp_path / "data" / name).write_bytes(b"x")
    files = [(name, f"{tmp_path}/data/{name}") for name in names]
    save(tmp_path, read_states(files))
    saved = load(tmp_path)
    assert saved is not None
    assert list(saved.names) == names
    (tmp_path / "data" / names[0]).write_bytes(b"xy")
    assert differences(saved, files) == [r"1 of 4 files changed (a\nb.png: 1 bytes before, 2 now)"]
    assert load(tmp_path / "data") is None
    assert read_states([]).sizes.shape == (0,)


@pytest.mark.parametrize("content", [b"", b"rubbish", b"PK\x03\x04", "cut"])
def test_a_damaged_state_is_one_line(tmp_path: Path, content: bytes | str) -> None:
    folder = write(tmp_path / "data", 3)
    save(tmp_path, read_states(listed(folder)))
    whole = (tmp_path / DATA_FILE).read_bytes()
    (tmp_path / DATA_FILE).write_bytes(whole[:-200] if isinstance(content, str) else content)
    with pytest.raises(UserError, match=r"data\.npz is damaged, .* delete it to go on"):
        load(tmp_path)


def test_sources_name_the_files_that_hold_their_images(tmp_path: Path) -> None:
    make_images(write(tmp_path / "photos", 0), 3)
    folder = tmp_path / "photos"
    assert [name for name, _ in open_source(str(folder)).data_files()] == ["0000.png", "0001.png", "0002.png"]
    (tmp_path / "bad.txt").write_text("0001.png\n")
    kept = open_source(str(folder), exclude=str(tmp_path / "bad.txt")).data_files()
    assert [name for name, _ in kept] == ["0000.png", "0002.png"]
    (tmp_path / "m.yaml").write_text(f"mixture: [{{data: {folder}}}, {{data: scenes}}]\n")
    mixed = list(open_source(str(tmp_path / "m.yaml")).data_files())
    assert mixed[0] == (f"{folder}: 0000.png", f"{folder}/0000.png")
    assert len(mixed) == 3


# -- whole runs -------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(tmp_path: Path) -> AlignConfig:
    """A run of three steps on twenty images."""
    (tmp_path / "images").mkdir()
    make_images(tmp_path / "images", 20)
    config = tiny(tmp_path / "run", tmp_path / "images", max_bad_share=0.1)
    run_until(config, 3)
    return replace(config, resume="must")


def test_a_changed_image_is_refused_and_accepted_on_request(
    stopped: AlignConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(Path(stopped.data) / "0007.png")
    with pytest.raises(UserError) as caught:
        run(stopped)
    line = str(caught.value)
    assert "1 of 20 files changed (0007.png: other content)" in line
    assert "--accept-changed-data goes on" in line
    assert line.endswith("changed since the run started: data")
    assert run(replace(stopped, accept_changed_data=True)).results["steps"] == 8
    assert "0007.png: other content" in capsys.readouterr().err
    run(stopped)  # the changed data are the run's data now


def test_a_new_image_is_accepted_on_request(stopped: AlignConfig) -> None:
    shutil.copy(Path(stopped.data) / "0007.png", Path(stopped.data) / "new.png")
    with pytest.raises(UserError, match=r"1 new \(new\.png\).*changed since the run started: data$"):
        run(stopped)
    assert run(replace(stopped, accept_changed_data=True)).results["steps"] == 8


def test_other_weights_are_not_accepted(tmp_path: Path) -> None:
    old, new = {"data": "a", "starting weights": "x"}, {"data": "b", "starting weights": "y"}
    with pytest.raises(UserError, match=r"changed since the run started: starting weights$"):
        data_files._check(tmp_path, old, new, [], accept=True)
    with pytest.raises(UserError, match=r"changed since the run started: data, starting weights$"):
        data_files._check(tmp_path, old, new, [], accept=False)


def test_accepting_needs_a_resume(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--accept-changed-data applies to --resume only"):
        tiny(tmp_path, tmp_path, accept_changed_data=True)


def test_a_run_of_an_older_version_resumes_and_is_watched_from_then_on(stopped: AlignConfig) -> None:
    (Path(stopped.out) / DATA_FILE).unlink()
    rewrite(Path(stopped.data) / "0007.png")  # nobody can know
    assert run(stopped).results["steps"] == 8
    assert (Path(stopped.out) / DATA_FILE).is_file()


@pytest.mark.parametrize("resume", ["must", "auto", "never"])
def test_a_lost_config_beside_checkpoints_is_no_new_start(stopped: AlignConfig, resume: str) -> None:
    (Path(stopped.out) / "config.yaml").unlink()
    before = sorted(Path(stopped.out).rglob("*"))
    with pytest.raises(UserError, match=r"holds checkpoints but no config\.yaml.*restore"):
        run(replace(stopped, resume=resume))  # type: ignore[arg-type]
    assert sorted(Path(stopped.out).rglob("*")) == before
