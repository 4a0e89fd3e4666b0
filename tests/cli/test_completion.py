"""`localign completion`: scripts that shells take, and that know commands, options and choices."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from localign.cli import COMMANDS, main
from localign.cli.options import options_of

BASH = shutil.which("bash")
ASK = """
source "$1"
shift
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_shtab_localign localign "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
echo "${COMPREPLY[@]}"
"""


@pytest.fixture
def script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    file = tmp_path / "localign.bash"
    file.write_text(capsys.readouterr().out)
    return file


def test_the_script_knows_commands_and_options(script: Path) -> None:
    text = script.read_text()
    for name, command in COMMANDS.items():
        assert all(word in text for word in name.split())
        assert all(option.flag in text for option in options_of(command.config()).values())


@pytest.mark.skipif(BASH is None, reason="there is no bash")
def test_bash_takes_the_script(script: Path) -> None:
    assert BASH is not None
    subprocess.run([BASH, "-n", script], check=True)
    for words, completed in (
        (("al",), ["align"]),
        (("vlm", "tr"), ["train"]),
        (("align", "--keep"), ["--keep-checkpoints", "--keep-ratio"]),
        (("align", "--mask", ""), ["uniform", "bernoulli", "block", "shapley", "null"]),
        (("align", "--steps", "3", "--object"), ["--objective"]),
        (("vlm", "train", "--data", "a", "b", "--adapter-"), ["--adapter-lr"]),
        (("list", ""), ["backbones", "recipes"]),
        (("align", "--config", str(script.parent / "local")), [str(script)]),
    ):
        command = [BASH, "-c", ASK, "bash", script, "localign", *words]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert set(found.split()) == set(completed), words


@pytest.mark.parametrize("shell", ["zsh", "fish", "tcsh"])
def test_other_shells(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    assert "keep-ratio" in capsys.readouterr().out


def test_without_a_shell_or_shtab_one_line_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["completion"]) == 2
    assert "completion takes a shell: bash, zsh, fish, tcsh" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'localign[completion]'" in capsys.readouterr().err
