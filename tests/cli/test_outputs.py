"""Every command against outputs that cannot be written: one line, the right exit code, nothing changed."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from localign.cli import COMMANDS, main, parse
from localign.cli.outputs import OUTPUTS, claimed
from localign.errors import UserError
from localign.files import lock as locks

OUTPUT_OPTIONS = {"out", "cache_dir", "missing_list"}
"""Fields that name what a command writes."""
FOLDERS: dict[str, str] = {
    "demo": "demo --out {out}",
    "align": "align --steps 1 --out {out}",
    "pretrain": "pretrain --steps 200 --out {out}",
    "finetune": "finetune --data x --out {out}",
    "probe": "probe embedded --out {out}",
    "vlm train": "vlm train --data x --llm x --out {out}",
    "vlm export": "vlm export x --out {out}",
    "vlm swap": "vlm swap x --backbone y --out {out}",
    "vlm eval": "vlm eval x --benchmarks pope --data x --out {out}",
    "vlm score": "vlm score a=x b=y --out {out}",
    "vlm show": "vlm show x --out {out}",
    "vlm demo": "vlm demo --out {out}",
    "reproduce": "reproduce table1 --out {out}",
    "export": "export embedded --out {out}",
    "import": "import x --backbone embedded --out {out}",
    "data shard": "data shard x {out}",
    "data in21k-p": "data in21k-p x {out}",
}
FILES: dict[str, str] = {
    "plan": "plan --out {out}",
    "vlm plan": "vlm plan --data x --llm x --out {out}",
    "vlm check": "vlm check x --missing-list {out}",
    "vlm convert": "vlm convert strip-text-only --base x --out {out}",
    "embed": "embed x --backbone y --out {out}",
    "explore": "explore a=x b=y --images z --out {out}",
    "data verify": "data verify x --out {out}",
    "data stats": "data stats x --out {out}",
    "bench align": "bench align --out {out}",
    "bench loader": "bench loader --out {out}",
}
WITHOUT = {"vlm chat", "list", "doctor", "completion", "report", "verify-reference"}
"""Commands without such an option."""
TAKEN: dict[str, str] = {
    "demo": "config.yaml",
    "align": "results.json",
    "pretrain": "log.jsonl",
    "finetune": "checkpoints",
    "probe": "config.yaml",
    "vlm train": "export",
    "vlm export": "model.safetensors",
    "vlm swap": "processor_config.json",
    "vlm eval": "answers.jsonl",
    "vlm score": "comparison.csv",
    "vlm show": "cat.png",
    "vlm demo": "train",
    "reproduce": "scenes/table1/results.json",
    "export": "decoder.safetensors",
    "import": "config.json",
    "data shard": "../taken.partial/000000.tar",
    "data in21k-p": "../taken.partial/train/000000.tar",
}
"""A foreign file that the command would replace or delete, in its output folder."""


def line_of(command: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one line of a command that fails."""
    capsys.readouterr()
    assert main(command) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("localign: ")
    return lines[0]


def words(command: str, out: Path) -> list[str]:
    return [word.replace("{out}", str(out)) for word in command.split()]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of 16 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip("file systems cannot be mounted here")
        return folder

    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


def test_every_command_that_writes_is_tried_here_and_claims_its_outputs() -> None:
    assert {*FOLDERS, *FILES, *WITHOUT} == set(COMMANDS)
    assert {*FOLDERS} == {*TAKEN}
    for name, command in COMMANDS.items():
        fields = {field.name for field in dataclasses.fields(command.config())}
        assert bool(fields & OUTPUT_OPTIONS) == (name not in WITHOUT), name
        claims = any(base in OUTPUTS for base in command.config().__mro__)
        assert claims or name in WITHOUT, name


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_a_file_in_place_of_the_folder(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / ("out.partial" if name.startswith("data") else "out")
    out.write_text("mine")
    line = line_of(words(FOLDERS[name], tmp_path / "out"), capsys)
    assert "is a file, not a folder" in line
    assert snapshot(tmp_path) == {out.name: b"mine"}


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_folder_in_place_of_the_file(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    assert "is a folder, not a file" in line_of(words(FILES[name], tmp_path / "out"), capsys)
    assert snapshot(tmp_path) == {"out": None}


@pytest.mark.parametrize("name", sorted({**FOLDERS, **FILES}))
@pytest.mark.parametrize("fault", ["read-only", "full", "parent is a file", "name too long", "no inode"])
def test_an_output_that_cannot_be_written(
    name: str,
    fault: str,
    tmp_path: Path,
    small_disk: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    if fault == "read-only":
        out, said = small_disk("ro") / "out", "Read-only file system"
    elif fault == "full":
        disk = small_disk("size=4k")
        (disk / "ballast").write_bytes(b"x" * 4096)
        out, said = disk / "out", "No space left on device"
    elif fault == "no inode":
        out, said = small_disk("nr_inodes=1") / "out", "No space left on device"
    elif fault == "parent is a file":
        (tmp_path / "file").write_text("")
        out, said = tmp_path / "file" / "out", "is a file, not a folder"
    else:
        out, said = tmp_path / ("x" * 260), "File name too long"
    before = snapshot(tmp_path)
    assert said in line_of(words({**FOLDERS, **FILES}[name], out), capsys)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_a_foreign_file_is_not_replaced(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "taken"
    out.mkdir()
    file = (out / TAKEN[name]).resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine")
    before = snapshot(tmp_path)
    assert f"holds {file.name}, and nothing there says" in line_of(words(FOLDERS[name], out), capsys)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize(
    "content",
    [b"", b"import torch\n", b'{"a": 1}\n', b"\xff\xd8\xff\xe0", b'[{"id": "1", "conversations": []}]\n'],
)
def test_a_foreign_file_is_not_the_output(
    name: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.write_bytes(content)
    if not content and name in ("vlm check", "data verify"):
        pytest.skip("an empty list is what these commands write")
    assert "did not write it" in line_of(words(FILES[name], out), capsys)
    assert snapshot(tmp_path) == {"out": content}


OURS: dict[str, dict[str, str]] = {
    "demo": {"config.yaml": "command: demo\nconfig: {}\n"},
    "align": {"config.yaml": "command: align\nconfig: {}\n", "log.jsonl": ""},
    "probe": {"config.yaml": "command: probe\nconfig: {}\n", "results.json": "{}"},
    "vlm eval": {"results.json": '{"command": "vlm eval", "versions": {}}', "answers.jsonl": ""},
    "vlm score": {"comparison.json": '{"benchmarks": {}, "panels": []}', "bars.png": ""},
    "vlm export": {"config.json": '{"model_type": "localign_vlm"}', "model.safetensors": ""},
    "export": {"config.json": '{"localign": {}}', "model.safetensors": "", "decoder.safetensors": ""},
    "import": {"config.json": '{"localign": {}}', "model.safetensors": ""},
    "vlm show": {".lock": "process 1 on host\nlocalign vlm show\n", "pope-1.png": ""},
    "data shard": {
        "../out.partial/about.json": '{"source": "x", "shard_images": 1}',
        "../out.partial/000000.tar": "",
    },
}


@pytest.mark.parametrize("name", sorted(OURS))
def test_what_the_same_command_wrote_is_accepted_and_swept(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for file, content in OURS[name].items():
        path = (out / file).resolve()
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    leftover = path.parent / ".x.json.4711.tmp"
    leftover.write_text("half")
    other = path.parent / ".mine.tmp"
    other.write_text("not ours")
    arguments = words(FOLDERS[name].replace(f"{name} ", "", 1), out)
    with claimed(name, parse(name, arguments)):
        assert not leftover.exists()
    assert other.exists()
    assert all((out / file).exists() for file in OURS[name])


@pytest.mark.parametrize("name", sorted({*FOLDERS} & {"align", "probe", "export", "vlm eval", "demo"}))
def test_a_run_of_another_command_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.yaml").write_text("command: pretrain\nconfig: {}\n")
    (out / "results.json").write_text('{"command": "pretrain", "versions": {}}')
    (out / "config.json").write_text("{}")
    before = snapshot(tmp_path)
    line = line_of(words(FOLDERS[name], out), capsys)
    assert "is a run of `localign pretrain`, not of" in line
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", sorted({**FOLDERS, **FILES}))
def test_a_second_writer_is_refused_while_the_first_one_works(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.0)
    out = tmp_path / "scenes" / "table1" if name == "reproduce" else tmp_path / "out"
    beside = name in FILES or name.startswith("data")
    lock = out.with_name(f".{out.name}.lock") if beside else out / ".lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    code = (
        "import sys, pathlib; from localign.files.lock import take\n"
        "held = take(pathlib.Path(sys.argv[1]), pathlib.Path('x')); print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"locked\n"
            target = tmp_path if name == "reproduce" else out
            line = line_of(words({**FOLDERS, **FILES}[name], target), capsys)
            assert f"another process is writing to {out} (process {holder.pid} on" in line
        finally:
            holder.kill()


def test_a_claim_leaves_nothing_behind(tmp_path: Path) -> None:
    for name, command in {**FOLDERS, **FILES}.items():
        arguments = words(command.replace(f"{name} ", "", 1), tmp_path / "a" / "b")
        with claimed(name, parse(name, arguments)):
            pass
        assert snapshot(tmp_path) == {}, name


def test_the_marks_of_several_commands_are_kept(tmp_path: Path) -> None:
    for name, file in (("vlm show", "a.png"), ("vlm score", "bars.csv"), ("vlm show", "b.png")):
        arguments = words(FOLDERS[name].replace(f"{name} ", "", 1), tmp_path)
        with claimed(name, parse(name, arguments)):
            (tmp_path / file).write_text("")
    assert (tmp_path / ".lock").read_text().splitlines()[1:] == ["localign vlm score", "localign vlm show"]
    (tmp_path / "comparison.json").write_text('{"benchmarks": {}, "panels": []}')
    with claimed("vlm score", parse("vlm score", ["a=x", "b=y", "--out", str(tmp_path)])):
        pass
    assert (tmp_path / ".lock").read_text().splitlines()[1:] == ["localign vlm show"]


def test_only_the_main_rank_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").write_text("")
    config = parse("probe", ["embedded", "--out", str(tmp_path / "out")])
    with pytest.raises(UserError), claimed("probe", config):
        pass
    monkeypatch.setenv("RANK", "1")
    with claimed("probe", config):
        pass


def test_a_report_of_a_foreign_folder_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text('{"accuracy": 1}')
    (tmp_path / "report.html").write_text("mine")
    assert "did not write it" in line_of(["report", str(tmp_path)], capsys)
    assert (tmp_path / "report.html").read_text() == "mine"


# -- standard output ---------------------------------------------------------------------------------------


def localign(*arguments: str, stdout: int | IO[bytes]) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "localign", *arguments]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, timeout=120, check=False)


SHOWN = [["--help"], ["--version"], ["vlm", "--help"], ["list"], ["list", "recipes", "--json"], ["align", "--help"],
         ["align", "--print-config"], ["completion", "bash"]]  # fmt: skip


@pytest.mark.parametrize("arguments", SHOWN, ids=" ".join)
def test_a_full_standard_output_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = localign(*arguments, stdout=full)
    assert done.stderr == b"localign: not everything was printed: standard output: No space left on device\n"
    assert done.returncode == 1


@pytest.mark.parametrize("arguments", SHOWN, ids=" ".join)
def test_a_broken_pipe_is_one_line(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = localign(*arguments, stdout=writer)
    os.close(writer)
    assert done.stderr == b"localign: not everything was printed: standard output: Broken pipe\n"
    assert done.returncode == 1


@pytest.mark.parametrize("arguments", [*SHOWN, ["probe", "embedded"]], ids=" ".join)
def test_a_closed_standard_output_is_refused_before_the_work(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-m", "localign", *arguments],
        stderr=subprocess.PIPE, cwd=tmp_path, timeout=120, check=False,
    )  # fmt: skip
    assert done.stderr == b"localign: standard output is closed; redirect it to a file or to /dev/null\n"
    assert done.returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_a_closed_standard_error_does_not_end_the_command() -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-m", "localign", "list"],
        stdout=subprocess.PIPE, timeout=120, check=False,
    )  # fmt: skip
    assert b"clip-vit-b" in done.stdout
    assert done.returncode == 0


def test_an_output_that_fails_loses_none_of_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows the print is done."""
    code = (
        "import sys, pathlib\nfrom localign.cli import exit_code\n"
        "def work():\n for i in range(3): print('x' * 9000)\n pathlib.Path(sys.argv[1]).touch()\n"
        "sys.exit(exit_code(work))"
    )
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "done")],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (tmp_path / "done").exists()
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_names_of_any_bytes_can_be_printed(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = io.BytesIO()
    strict = io.TextIOWrapper(memory, encoding=encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", strict)
    from localign.cli import exit_code

    assert exit_code(lambda: print("a\udcffb ∞ ok")) == 0
    strict.flush()
    shown = memory.getvalue()
    assert b"a\\udcffb" in shown
    assert b" ok" in shown
    assert strict.errors == "strict"


# -- errors of the disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "/a/b"), "/a/b: No space left on device; free some space"),
        (OSError(30, "Read-only file system", "/a/b"), "/a/b: Read-only file system; choose a folder"),
        (PermissionError(13, "Permission denied", "/a"), "/a: Permission denied; check its permissions"),
        (FileNotFoundError(2, "No such file or directory", "gone"), "gone: No such file or directory"),
        (IsADirectoryError(21, "Is a directory", "d"), "d: Is a directory"),
        (OSError(36, "File name too long", "x"), "x: File name too long; choose a shorter name"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (BrokenPipeError(32, "Broken pipe"), "Broken pipe"),
        (OSError(28, "No space left on device", "a\n\x1b[31mb"), "a\\n\\x1b[31mb: No space left"),
        (
            OSError(
                "Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
                "  File x\nOSError: [Errno 28] No space left on device: '/a/b'\n"
            ),
            "No space left on device: '/a/b'; free some space",
        ),
        (ConnectionResetError("the other side is gone\nTraceback"), "the other side is gone"),
    ],
)
def test_any_error_of_the_disk_is_one_line(
    error: OSError, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(config: object) -> None:
        raise error

    monkeypatch.setattr("localign.cli.listing.run_list", work)
    assert f"localign: {said}" in line_of(["list"], capsys, code=1)


def test_an_error_of_safetensors_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    safetensors = pytest.importorskip("safetensors")

    def work(config: object) -> None:
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left (os error 28)")

    monkeypatch.setattr("localign.cli.listing.run_list", work)
    assert "No space left on device; free some space" in line_of(["list"], capsys, code=1)


def test_a_bug_still_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(config: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr("localign.cli.listing.run_list", work)
    with pytest.raises(KeyError):
        main(["list"])


def test_align_without_options_asks_for_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "`localign demo`" in line_of(["align"], capsys)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_twice_ends_without_a_traceback() -> None:
    code = (
        "import os, signal, sys, time\nfrom localign.cli import exit_code\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where the tests run in the background
        "def work():\n"
        " try:\n  os.kill(os.getpid(), signal.SIGINT)\n  time.sleep(60)\n"
        " finally:\n  os.kill(os.getpid(), signal.SIGINT)\n  time.sleep(60)\n"
        "sys.exit(exit_code(work))"
    )
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, timeout=30, check=False)
    assert done.stderr == b"localign: interrupted again; ended at once\n"
    assert done.returncode == 1


@pytest.mark.parametrize("kind", ["vlm show", "vlm chat"])
def test_pictures_say_who_drew_them(kind: str, tmp_path: Path) -> None:
    from PIL import Image

    from localign.files.output import is_marked_png, kinds_of, png_mark

    path = tmp_path / "a.png"
    Image.new("RGB", (300, 300)).save(path)
    assert not is_marked_png(path, kind)
    assert kinds_of(tmp_path) == set()
    Image.new("RGB", (300, 300)).save(path, format="PNG", pnginfo=png_mark(kind))
    assert is_marked_png(path, kind)
    assert kinds_of(tmp_path) == ({kind} if kind == "vlm show" else set())


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("align-finished", "align"),
        ("align-stopped", "align"),
        ("align-finished/export", "export"),
        ("start", "export"),
        ("demo", "demo"),
        ("eval", "vlm eval"),
        ("finetune-stopped", "finetune"),
        ("pretrain-finished", "pretrain"),
        ("probe", "probe"),
        ("reproduce/scenes/fig7-quick", "reproduce"),
        ("vlm-demo", "vlm demo"),
        ("vlm-export", "vlm export"),
        ("vlm-finished", "vlm train"),
    ],
)
def test_folders_of_earlier_versions_say_whose_they_are(folder: str, kind: str) -> None:
    from localign.files.output import kinds_of

    assert kinds_of(Path(__file__).parents[1] / "compat" / "v0.1.0" / folder) == {kind}


def test_results_say_whose_they_are(tmp_path: Path) -> None:
    """A results.json without the command is foreign, however it looks."""
    from localign.files.output import kinds_of

    (tmp_path / "results.json").write_text(json.dumps({"versions": {}}))
    assert kinds_of(tmp_path) == set()
