"""A start that fails leaves nothing that blocks the next one; runs of one name stay apart in the cloud."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from localign.engine import log
from localign.engine.log import WandB, check_sinks, say, wandb_id
from localign.engine.run_folder import check_resume
from localign.errors import UserError


@pytest.mark.parametrize(
    ("files", "refused"),
    [
        ({"config.yaml": "command: align"}, False),
        ({"config.yaml": "command: align", "log.jsonl": ""}, False),
        ({"config.yaml": "command: align", "log.jsonl": '{"st'}, False),
        ({"config.yaml": "command: align", "log.jsonl": '{"step": 1}\n'}, True),
        ({"config.yaml": "command: align", "results.json": "{}"}, True),
    ],
)
def test_a_start_that_did_nothing_is_no_run(tmp_path: Path, files: dict[str, str], refused: bool) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    if refused:
        with pytest.raises(UserError, match="already holds a run"):
            check_resume(tmp_path, "never", [])
    else:
        assert not check_resume(tmp_path, "never", [])
        assert check_resume(tmp_path, "auto", [])
    with pytest.raises(UserError, match="already holds a run"):
        check_resume(tmp_path, "never", [5])


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_missing_package_is_known_before_the_folder_is_made(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "find_spec", lambda name: None if name == package else name)
    with pytest.raises(UserError, match=rf"localign\[{package}\]"):
        check_sinks(tensorboard=True, wandb=True)
    check_sinks(tensorboard=False, wandb=False)


def test_runs_of_one_name_have_different_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [
        tmp_path / "a" / "run",
        tmp_path / "b" / "run",
        tmp_path / "a" / "run 2",
        tmp_path / ("x" * 200),
    ]
    ids = [wandb_id(folder, False) for folder in folders]
    assert len(set(ids)) == 4
    assert all(set(i) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_.") and len(i) <= 64 for i in ids)
    monkeypatch.chdir(tmp_path / "..")
    assert wandb_id(Path(tmp_path.name, "a", "run"), False) == ids[0], "however the path is written"


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        (["run-20260101_000000-run"], "run"),
        (["offline-run-20260101_000000-my-run"], "my-run"),
        (["run-20260301_000000-new", "run-20260101_000000-old"], "new"),
        (["run-20260101_000000-run-7-ab"], "run-7-ab"),
    ],
)
def test_a_resumed_run_keeps_its_id(tmp_path: Path, kept: list[str], expected: str) -> None:
    for name in kept:
        (tmp_path / "wandb" / name).mkdir(parents=True)
    assert wandb_id(tmp_path, True) == expected
    assert wandb_id(tmp_path, False) != expected


def test_the_id_reaches_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}
    fake = SimpleNamespace(init=lambda **options: given.update(options))
    monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
    WandB(tmp_path, "project", {})
    assert given["id"] == wandb_id(tmp_path, False)


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\nb", "a\\nb"), ("\x1b[31mred", "\\x1b[31mred"), ("n\udcff.jpg", "n\\xff.jpg"), ("é 日本", "é 日本")],
)
def test_lines_for_the_user_are_lines(text: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    say(text)
    assert capsys.readouterr().err == shown + "\n"
