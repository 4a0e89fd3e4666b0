"""A file or folder is complete or absent, even if writing fails."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from localign.files import fsync_path, refilling_folder, replace_text, replacing, replacing_folder, sweep


def test_a_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    with replacing(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
        assert temporary.parent == tmp_path
    assert target.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_failure_leaves_the_old_file_and_no_temporary_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    replace_text(target, "old")
    with pytest.raises(UnicodeEncodeError), replacing(target) as temporary:
        temporary.write_text("half \udc00", encoding="utf-8")
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    replace_text(target, "nëw")
    assert target.read_text(encoding="utf-8") == "nëw"


def test_a_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"
    target.parent.mkdir()
    with replacing_folder(target) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("1")
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "1"
    with replacing_folder(target) as temporary:
        (temporary / "b").write_text("2")
    assert sorted(p.name for p in target.iterdir()) == ["b"]
    assert [p.name for p in target.parent.iterdir()] == ["folder"]


def test_a_failure_leaves_the_old_folder_and_no_temporary_folder(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with replacing_folder(target) as temporary:
        (temporary / "a").write_text("1")
    with pytest.raises(FileNotFoundError), replacing_folder(target) as temporary:
        (temporary / "absent" / "a").write_text("2")
    assert (target / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_files_of_others_stay_in_a_refilled_folder(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for names in (
        ["model-1.safetensors", "model-2.safetensors", "config.json"],
        ["model.safetensors", "config.json"],
    ):
        with refilling_folder(target, ("model*.safetensors",), "config.json") as temporary:
            for name in names:
                (temporary / name).write_text("new")
        (target / "notes.md").write_text("mine")
    assert sorted(p.name for p in target.iterdir()) == ["config.json", "model.safetensors", "notes.md"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_folder_whose_refill_fails_stays(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "config.json").write_text("old")
    with pytest.raises(FileNotFoundError), refilling_folder(target, ("*",), "config.json") as temporary:
        (temporary / "absent" / "a").write_text("2")
    assert (target / "config.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("text", ["a\udcffb", "\ud800", "é 日本", "x" * 100_000])
def test_any_name_can_be_written(tmp_path: Path, text: str) -> None:
    replace_text(tmp_path / "a.html", text)
    assert (tmp_path / "a.html").read_text(encoding="utf-8").encode().isascii() == (text != "é 日本")


@pytest.mark.parametrize(
    ("name", "swept"),
    [
        (".a.json.12.tmp", True),
        (".a b\n.12.tmp", True),
        (".step-0000002.4711.tmp", True),
        (".mine.tmp", False),
        ("a.12.tmp", False),
        (".a.12.tmp.bak", False),
        (".a.x12.tmp", False),
    ],
)
@pytest.mark.parametrize("folder", [False, True])
def test_only_temporary_files_of_ours_are_swept(tmp_path: Path, name: str, swept: bool, folder: bool) -> None:
    path = tmp_path / name
    path.mkdir() if folder else path.write_text("")
    sweep(tmp_path, tmp_path / "missing")
    assert path.exists() != swept


def test_a_link_is_swept_but_not_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_text("")
    (tmp_path / ".x.1.tmp").symlink_to("real")
    sweep(tmp_path)
    assert [p.name for p in tmp_path.rglob("*")] == ["real", "a"]


def test_folders_are_not_opened_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened"))
    monkeypatch.setattr(os, "name", "nt")
    is_folder = SimpleNamespace(is_dir=lambda: True)
    fsync_path(is_folder)  # type: ignore[arg-type]
