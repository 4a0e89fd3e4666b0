"""Old names of options work for one release: on the command line, in files, in run folders of before."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from localign.cli import COMMANDS, parse
from localign.deprecated import RENAMED, with_old_names
from localign.engine.run_folder import check_same_config, read_config, save_config
from localign.errors import UserError
from localign.options.align import AlignConfig
from localign.recipes import read_recipe

OLD = ["--warmup-share", "0.1", "--warmup-start=0.2", "--ema", "0.9"]


def test_old_names_are_taken_with_a_line_that_says_the_new_one(capsys: pytest.CaptureFixture[str]) -> None:
    config = parse("align", OLD)
    assert (config.warmup_ratio, config.warmup_init_ratio, config.ema_decay) == (0.1, 0.2, 0.9)
    assert capsys.readouterr().err.splitlines() == [
        f"deprecated {old} is now {new}; the next release will not know the old name"
        for old, new in (
            ("--warmup-share", "--warmup-ratio"),
            ("--warmup-start", "--warmup-init-ratio"),
            ("--ema", "--ema-decay"),
        )
    ]
    assert parse("plan", ["--save", "plan.json"]).out == "plan.json"
    assert "--save is now --out" in capsys.readouterr().err


def test_other_commands_have_no_old_names() -> None:
    for name, option in (("align", "--save"), ("export", "--ema"), ("vlm show", "--save")):
        with pytest.raises(UserError, match=f"unknown option {option}"):
            parse(name, [option, "1"])


def test_old_names_in_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, file = tmp_path / "base.yaml", tmp_path / "run.yaml"
    base.write_text("warmup_share: 0.1\nema: 0.5\n")
    file.write_text("base: base.yaml\nema_decay: 0.9\n")
    config = parse("align", ["--config", str(file)])
    assert (config.warmup_ratio, config.ema_decay) == (0.1, 0.9)
    assert capsys.readouterr().err.count("\n") == 2
    assert read_recipe(file).values == {"warmup_ratio": 0.1, "ema_decay": 0.9}
    assert parse("align", ["--config", str(base), "--warmup-ratio", "0.2"]).warmup_ratio == 0.2


def test_both_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--ema and --ema-decay are names of the same option"):
        parse("align", ["--ema", "0.9", "--ema-decay", "0.9"])
    file = tmp_path / "run.yaml"
    file.write_text("ema: 0.5\nema_decay: 0.5\n")
    with pytest.raises(UserError, match="ema is the old name of ema_decay; give one of them"):
        parse("align", ["--config", str(file)])


def test_a_run_folder_with_old_names_is_continued(tmp_path: Path) -> None:
    config = AlignConfig(steps=10, warmup_ratio=0.1, ema_decay=0.9)
    save_config(tmp_path, "align", config)
    content = yaml.safe_load((tmp_path / "config.yaml").read_text())
    content["config"] = with_old_names(content["config"])
    assert content["config"]["warmup_share"] == 0.1
    assert "ema_decay" not in content["config"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    check_same_config(tmp_path, "align", config)
    assert read_config(tmp_path)["config"]["ema_decay"] == 0.9
    with pytest.raises(UserError, match=r"ema_decay: 0\.9 before, 0\.5 now"):
        check_same_config(tmp_path, "align", dataclasses.replace(config, ema_decay=0.5))


def test_every_renamed_option_exists_under_its_new_name_alone() -> None:
    for renamed in RENAMED:
        commands = [COMMANDS[renamed.command]] if renamed.command else COMMANDS.values()
        fields = [{field.name for field in dataclasses.fields(command.config())} for command in commands]
        assert any(renamed.new in names for names in fields)
        assert not any(renamed.old in names for names in fields)


def test_a_plan_ignores_the_run_folder_of_the_run_it_plans(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("base: align/in1k-vit-t\nout: runs/mine\n")
    assert parse("plan", ["--config", str(file)]).out == ""
    assert parse("plan", ["--config", str(file), "--out", "plan.json"]).out == "plan.json"
