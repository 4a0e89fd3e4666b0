"""Arbitrary command lines and config files give a config or one error line."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import bounded, json_values
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from localign.cli import COMMANDS, EXIT_BAD_INPUT, EXIT_OK, exit_code, main, parse

quick = settings(bounded, phases=[Phase.explicit, Phase.generate])
"""A parser takes tens of milliseconds to build, too many to try hundreds of smaller examples of a failure."""

NAMES = ("align", "pretrain", "finetune", "probe", "vlm train", "vlm eval", "export", "list")
FIELDS = {name: [f.name for f in dataclasses.fields(COMMANDS[name].config())] for name in NAMES}

words = st.text(max_size=12) | st.sampled_from(
    [
        "0",
        "-1",
        "1e-3",
        "nan",
        "inf",
        "null",
        "true",
        "[]",
        "{}",
        "a=1",
        "[1, 2]",
        "{a: 1}",
        "cpu",
        "8",
        "auto",
        "=",
    ]
)


def spelt(field: str) -> str:
    return "--" + field.replace("_", "-")


def settles(name: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The arguments are taken, or refused in one line."""
    code = exit_code(lambda: parse(name, arguments) and None)
    error = capsys.readouterr().err
    assert code in (EXIT_OK, EXIT_BAD_INPUT)
    if code == EXIT_BAD_INPUT:
        assert error.startswith("localign: ")
        assert error.count("\n") == 1, error


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A command, with options of its own and others."""
    name = draw(st.sampled_from(NAMES))
    option = st.sampled_from(FIELDS[name]).map(spelt) | words.map(lambda w: f"--{w}")
    parts = st.tuples(option, words).map(list) | st.tuples(option).map(list)
    parts |= st.tuples(option, words).map(lambda p: [f"{p[0]}={p[1]}"]) | words.map(lambda w: [w])
    tokens = [token for part in draw(st.lists(parts, max_size=4)) for token in part]
    return name, [t for t in tokens if not t.startswith(("-h", "--h", "--print", "--config"))]


@quick
@given(command_lines())
def test_any_command_line(capsys: pytest.CaptureFixture[str], line: tuple[str, list[str]]) -> None:
    settles(*line, capsys)


@st.composite
def option_files(draw: st.DrawFn) -> tuple[str, dict[Any, Any]]:
    """A command, and options with values of any kind."""
    name = draw(st.sampled_from(NAMES))
    keys = st.sampled_from(FIELDS[name]) | st.sampled_from(["base", "command", "about"]) | st.text(max_size=8)
    return name, draw(st.dictionaries(keys, json_values, max_size=4))


@quick
@given(option_files())
def test_any_options_in_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: tuple[str, dict[Any, Any]]
) -> None:
    name, values = content
    file = tmp_path / "options.yaml"
    file.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    settles(name, ["--config", str(file)], capsys)


@quick
@given(st.binary(max_size=80) | st.text(alphabet="[]{}:,&*!|>-?'\"#\n ab1%@`\t", max_size=60).map(str.encode))
def test_any_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    file = tmp_path / "options.yaml"
    file.write_bytes(content)
    settles("align", ["--config", str(file)], capsys)


LETTERS = "abcdefghijklmnopqrst"
BOMB = "\n".join(["a: &a [x, x]", *(f"{b}: &{b} [*{a}, *{a}]" for a, b in pairwise(LETTERS))])
"""A million values in twenty lines."""


@pytest.mark.parametrize(
    "text",
    [
        "data: !!python/object/apply:os.system ['touch ran']",
        "data: !!python/name:os.system x",
        "[" * 100_000,
        "- " * 5000 + "x",
        "a: &a [*a]",
        "a: &a {b: *a}",
        BOMB,
        "lr: 2021-13-45",
        "lr: 2021-10-05",
        "data: " + "x" * 2**21,
        "{[a]: 1}",
        "base: {a: 1}",
    ],
    ids=range(12),
)
def test_hostile_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("options.yaml").write_text(text)
    assert exit_code(lambda: parse("align", ["--config", "options.yaml"]) and None) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert len(error) < 500
    assert not Path("ran").exists()


@quick
@given(st.lists(st.text(max_size=10), min_size=1, max_size=3))
def test_any_command(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    if arguments[0] in COMMANDS or " ".join(arguments[:2]) in COMMANDS:
        return
    assert main(arguments) in (EXIT_OK, EXIT_BAD_INPUT)
    assert json.dumps(capsys.readouterr().err)
