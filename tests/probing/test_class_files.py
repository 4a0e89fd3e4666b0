"""Class tables from JSON files: every key is used or refused, and every problem is one line that names the file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from localign.errors import UserError
from localign.probing.classes import ade20k, class_table


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('["none", "cat"]', ("none", "cat")),
        ('{"0": "none", "1": "cat"}', ("none", "cat")),
        ('\ufeff{"0": "none", "1": {"name": "cat", "kind": "thing"}}', ("none", "cat")),
        ('{" 0": "none", "01": 7}', ("none", "7")),
    ],
)
def test_tables_that_are_read(text: str, names: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text(text, encoding="utf-8")
    assert class_table(tmp_path / "classes.json").names == names


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"0": "none", "1": "cat", "1": "dog"}', "the key '1' occurs twice"),
        ('{"1": "cat", "01": "dog"}', "has an id twice, such as 1 and 01"),
        ('{"0": {"name": "a", "colour": [1, 2, 3]}}', "not 'colour'"),
        ('{"0": {"name": "a", "ignore": true}}', "not 'ignore'"),
        ('{"0": ["a", "b"]}', "a class is its name, or an object"),
        ('{"0": null}', "a class is its name, or an object"),
        ('{"0": true}', "a class is its name, or an object"),
        ('{"0": "a", "classes": "b"}', "needs ids and names"),
        ('"cat"', "neither a mapping from ids to names nor a list"),
        ("12", "neither a mapping from ids to names nor a list"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a":' * 100_000, "not valid JSON"),
        ('{"0": {"name": ' + "[" * 50_000, "not valid JSON"),
        ('{"0": "a"', "not valid JSON"),
        ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ('{"%s": "a"}' % ("9" * 5000), "needs ids and names"),
    ],
)  # fmt: skip
def test_tables_that_are_refused(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        class_table(path)
    line = str(raised.value)
    assert says in line
    assert "classes.json" in line
    assert "\n" not in line
    assert len(line) < 600


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "classes.json")
    with pytest.raises(UserError, match="special file"):
        class_table(tmp_path / "classes.json")
    with pytest.raises(UserError, match="special file"):
        ade20k(tmp_path / "classes.json")
    with pytest.raises(UserError, match="cannot read the class table"):
        class_table(tmp_path)
