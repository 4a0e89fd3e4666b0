"""A file or folder is complete or absent, even if writing fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from localign.files import replace_text, replacing, replacing_folder


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
