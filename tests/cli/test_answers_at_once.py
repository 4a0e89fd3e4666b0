"""Help and refusals of every command come at once: without torch, and within half a second of CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from localign.cli import COMMANDS

HEAVY = {"torch", "torchvision", "timm", "transformers", "numpy", "PIL", "rich", "matplotlib", "jsonargparse"}
WITH_VALUES = HEAVY - {"jsonargparse"}
"""What must not be imported where values are read, which takes jsonargparse."""

IN_ONE_PROCESS = """
import contextlib, io, json, sys
from localign.cli import main

found = {}
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = main(command)
        except SystemExit as stop:
            code = stop.code
    found[" ".join(command)] = [code, sorted(sys.modules)]
print(json.dumps(found))
"""


def imported_by(commands: list[list[str]]) -> dict[str, tuple[int, set[str]]]:
    """Command line -> its exit code, and the modules that it and the ones before it have imported."""
    arguments = [sys.executable, "-c", IN_ONE_PROCESS, json.dumps(commands)]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return {line: (code, set(modules)) for line, (code, modules) in json.loads(result.stdout).items()}


def test_help_of_every_command_imports_nothing_heavy() -> None:
    found = imported_by([["--help"], ["--version"], *([*name.split(), "--help"] for name in COMMANDS)])
    assert len(found) == len(COMMANDS) + 2
    for line, (code, modules) in found.items():
        assert code == 0, line
        assert not modules & HEAVY, line


def test_a_misspelt_option_of_every_command_imports_nothing_heavy() -> None:
    found = imported_by([[*name.split(), "--devise", "cpu"] for name in COMMANDS])
    for line, (code, modules) in found.items():
        assert code == 2, line
        assert not modules & HEAVY, line


@pytest.mark.parametrize(
    "line",
    [
        "alihn",
        "vlm trian",
        "align stray",
        "align --steps",
        "align --steps x",
        "align --crop square",
        "align --steps 3 --epochs 2",
        "align --keep-ratio 0.3",
        "align --objective mim --target cls",
        "align --config align/clip-vit-c",
        "align --config align/clip-vit-b --steps x",
        "plan --gpu H1000",
        "finetune --label-smoothing 2",
        "probe --heads linaer",
        "probe --steps 3 --epochs 2",
        "vlm train --data x.json",
        "vlm train --data x.json --llm tiny --adapter fused-mlp",
        "vlm eval",
        "vlm demo --kinds riddles",
        "data shard",
        "reproduce table2",
        "export",
        "list cats",
    ],
)
def test_refusals_import_nothing_heavy(line: str) -> None:
    code, modules = imported_by([line.split()])[line]
    assert code == 2
    assert not modules & WITH_VALUES


def seconds_of_cpu(*arguments: str) -> float:
    """User and system seconds of `localign` in a process of its own; the best of three."""
    seconds = []
    for _ in range(3):
        before = os.times()
        command = [sys.executable, "-m", "localign", *arguments]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        after = os.times()
        seconds.append(
            after.children_user - before.children_user + after.children_system - before.children_system
        )
    return min(seconds)


@pytest.mark.parametrize(
    "arguments", [("align", "--help"), ("vlm", "train", "--help"), ("align", "--devise", "cpu")], ids=" ".join
)
def test_an_answer_takes_less_than_half_a_second_of_cpu(arguments: tuple[str, ...]) -> None:
    assert seconds_of_cpu(*arguments) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_the_answers_of_every_command_take_less_than_half_a_second_of_cpu(name: str) -> None:
    for tail in ("--help", "--devise"):
        assert seconds_of_cpu(*name.split(), tail) < 0.5
