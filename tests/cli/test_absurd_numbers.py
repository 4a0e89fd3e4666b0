"""Numbers that no run has are one line before anything is built."""

from __future__ import annotations

import pytest

from localign.cli.options import options_of
from localign.cli.table import COMMANDS
from localign.cli.values import converted
from localign.errors import UserError
from localign.options.names import LIMITS
from localign.options.train import TrainConfig

OPTIONS = {
    (command.name, option.name): option
    for command in COMMANDS.values()
    for option in options_of(command.config()).values()
}


NUMBERS = {int, float}


def is_count(name: str) -> bool:
    return any(int in option.members for (_, field), option in OPTIONS.items() if field == name)


@pytest.mark.parametrize("name", sorted(LIMITS))
@pytest.mark.parametrize("given", ["1000000000000", "1" + "0" * 400])
def test_a_number_beyond_its_limit_is_one_line(name: str, given: str) -> None:
    options = [
        option for (_, field), option in OPTIONS.items() if field == name and NUMBERS & {*option.members}
    ]
    assert options, f"no command has {name}"
    for option in options:
        with pytest.raises(UserError) as caught:
            converted(option, given)
        assert option.flag in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 200


def test_every_count_has_a_limit() -> None:
    free = {"seed", "lora_alpha", "quality"}
    assert {field for _, field in OPTIONS if is_count(field)} - LIMITS.keys() <= free


@pytest.mark.parametrize("given", ["1e12", "1e300", ".inf", ".nan", "inf", "nan"])
@pytest.mark.parametrize("name", ["epochs", "batch_size", "timeout", "lr"])
def test_floats_and_their_words_are_one_line_or_a_number(name: str, given: str) -> None:
    option = OPTIONS["align", name]
    if name == "lr" and given not in (".nan", "nan"):
        return  # the optimizer decides
    with pytest.raises(UserError):
        converted(option, given)


@pytest.mark.parametrize(
    "values",
    [
        {"batch_size": 10**12}, {"workers": 10**6}, {"micro_batch": 10**9}, {"epochs": 1e12},
        {"lr": float("nan")}, {"betas": (0.9, float("nan"))}, {"steps": 10**12},
    ],
)  # fmt: skip
def test_configs_made_in_python_are_checked_too(values: dict[str, object]) -> None:
    with pytest.raises(UserError):
        TrainConfig(**values)  # type: ignore[arg-type]


def test_what_people_use_is_below_the_limits() -> None:
    TrainConfig(batch_size=160_000, micro_batch=4096, steps=10**7, workers=128, timeout=10**6)
