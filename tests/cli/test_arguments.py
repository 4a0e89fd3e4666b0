"""Which words belong to which option, and which of the places that give a value wins."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from localign.cli import main, parse
from localign.cli.options import options_of
from localign.cli.values import converted
from localign.errors import UserError
from localign.options.align import AlignConfig


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("align --step 1", "unknown option --step; did you mean '--steps'"),
        ("align --step 1 --backbo x", "unknown option --step"),
        ("align --backbo x", "unknown option --backbo; did you mean '--backbone'"),
        ("align --backbo=x", "unknown option --backbo; did you mean '--backbone'"),
        ("align --print", "unknown option --print; did you mean '--print-config'"),
        ("align --steps.x 1", "unknown option --steps.x"),
        ("align --", "unknown option --"),
        ("align -x", "unexpected argument '-x'"),
        ("align --config", "--config needs a value"),
        ("align --betas 1", "--betas takes [float, float], not '1'"),
        ("align --micro-batch half", "--micro-batch takes int, one of [auto], null, not 'half'"),
        ("align --model-kwargs depth=[", "--model-kwargs: the value of depth is not readable YAML"),
        ("align --print-config all the", "unexpected argument 'the'"),
        ("align --print-config some", "--print-config takes one of [all, skip_default, skip_unset]"),
        ("probe --heads [linear", "--heads takes a list of str, not '[linear'"),
    ],
)
def test_bad_words_are_refused(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(line)) == 2
    assert capsys.readouterr().err.startswith(f"localign: {said}")


def test_options_win_over_files_and_later_ones_over_earlier_ones(tmp_path: Path) -> None:
    for name, text in (
        ("a", "steps: 5\nlr: 0.01\nseed: 1"),
        ("b", "steps: 6\nmodel_kwargs: {depth: 3, a: 1}"),
    ):
        (tmp_path / f"{name}.yaml").write_text(text)
    line = f"--lr 0.02 --config {tmp_path / 'a.yaml'} --config {tmp_path / 'b.yaml'} --seed 2 --seed 3"
    config = parse("align", shlex.split(f"{line} --model-kwargs.depth 4"))
    assert (config.steps, config.lr, config.seed) == (6, 0.02, 3)
    assert config.model_kwargs == {"depth": 4, "a": 1}


def test_a_value_may_look_like_anything() -> None:
    config = parse(
        "align", ["--data", "-x", "--out=--y", "--wandb=null", "--model-kwargs", "a=1e-3,b=2021-10-05"]
    )
    assert (config.data, config.out, config.wandb) == ("-x", "--y", None)
    assert config.model_kwargs == {"a": 1e-3, "b": "2021-10-05"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: [1]", "--steps takes int, null, not '[1]'"),
        ("out: 5", "--out takes str, not '5'"),
        ("backbone: null", "--backbone takes no null"),
        ("config: other.yaml", "unknown key 'config' in the config file"),
        ("step: 5", "unknown key 'step' in the config file; did you mean '--steps'"),
        ("1: 5", "unknown key 1 in the config file"),
    ],
)
def test_bad_values_in_files_are_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        parse("align", ["--config", str(file)])
    assert str(error.value).startswith(said)


def test_the_options_are_printed_as_a_file_for_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse("align", ["--print-config", "--steps", "3", "--betas", "[0.9, 0.99]"])
    file = tmp_path / "run.yaml"
    file.write_text(capsys.readouterr().out)
    assert parse("align", ["--config", str(file)]) == parse(
        "align", ["--steps", "3", "--betas", "[0.9, 0.99]"]
    )
    with pytest.raises(SystemExit):
        parse("align", ["--steps", "3", "--print-config=skip_default"])
    assert yaml.safe_load(capsys.readouterr().out) == {"steps": 3}
    with pytest.raises(SystemExit):
        parse("align", ["--print-config", "skip_unset"])
    assert None not in yaml.safe_load(capsys.readouterr().out).values()


@pytest.mark.parametrize(
    ("given", "size"),
    [("224", 224), ("224x336", (224, 336)), ("[224, 336]", (224, 336)), ([224, 336], (224, 336)), (224, 224)],
)
def test_a_size_is_one_side_or_two(given: Any, size: Any) -> None:
    assert converted(options_of(AlignConfig)["image_size"], given) == size


@pytest.mark.parametrize(
    "given", ["224x", "x224", "224x224x3", "a x b", "224*224", "[224]", "[1, 2, 3]", 1.5]
)
def test_what_is_no_size_is_one_line(given: Any) -> None:
    with pytest.raises(UserError, match="--image-size takes int, two as in 224x336, null, not"):
        converted(options_of(AlignConfig)["image_size"], given)


def test_each_side_has_the_limit_of_the_option() -> None:
    with pytest.raises(UserError, match="--image-size takes at most 65,536"):
        converted(options_of(AlignConfig)["image_size"], "224x1000000")
