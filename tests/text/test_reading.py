"""Text files of others: read, or refused with one line that names the file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from localign.errors import UserError
from localign.text.reading import json_lines, read_json, read_json_object, read_text, read_yaml

READERS: dict[str, Callable[[Path], Any]] = {
    "text": read_text,
    "json": read_json,
    "object": read_json_object,
    "lines": lambda path: list(json_lines(path)),
    "yaml": read_yaml,
}


def refused(read: Callable[[Path], Any], path: Path) -> str:
    with pytest.raises(UserError) as raised:
        read(path)
    line = str(raised.value)
    assert "\n" not in line
    assert path.name in line
    return line


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff\xfe{\x00}\x00", "UTF-16"),
        (b"\x80\x81", "not UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    ],
)
def test_other_encodings_and_pointers_are_named(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert says in refused(READERS[name], path)


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_regular_file_is_named(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "special file" in refused(READERS[name], tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    refused(READERS[name], tmp_path / "folder")
    assert "no file" in refused(READERS[name], tmp_path / "missing")
    (tmp_path / "loop").symlink_to("loop")
    refused(READERS[name], tmp_path / "loop")
    refused(READERS[name], tmp_path / ("x" * 300))


@pytest.mark.parametrize("name", ["json", "object", "lines"])
@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 100_000, "[", "nul", '{"a": 1', "9" * 10_000 + "x"]
)
def test_broken_or_deep_json_is_one_line(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(content)
    assert "not valid JSON" in refused(READERS[name], path)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "a: !!binary x", "? {a: b}", "a: !!python/object:os.system x", "\t-"]
)
def test_broken_or_foreign_yaml_is_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(content)
    assert "not readable YAML" in refused(read_yaml, path)


@pytest.mark.parametrize("name", READERS)
def test_a_byte_order_mark_is_dropped(name: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert READERS[name](path) in ({"a": 1}, '{"a": 1}', [(1, {"a": 1})])


def test_size_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("[1, 2, 3]")
    assert read_json(path, limit=9) == [1, 2, 3]
    with pytest.raises(UserError, match="9 bytes; at most 8"):
        read_json(path, limit=8)


def test_an_object_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("[1]")
    assert "list instead of a JSON object" in refused(read_json_object, path)


def test_names_that_are_not_utf8_survive(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"caf\xe9.jpg\n")
    assert os.fsencode(read_text(path, errors="surrogateescape")) == b"caf\xe9.jpg\n"
