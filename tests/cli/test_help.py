"""The help: every option in one group, and what a user sets first on top."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any, Literal

import pytest

from localign.cli import COMMANDS, build_parser, main
from localign.cli.options import Option, groups_of, options_of


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_one_group_and_no_group_is_empty(name: str) -> None:
    config = COMMANDS[name].config()
    groups = groups_of(config)
    assert all(groups.values())
    assert Counter(field for names in groups.values() for field in names) == Counter(
        field.name for field in dataclasses.fields(config)
    )


@pytest.mark.parametrize("name", ["align", "vlm train"])
def test_the_groups_of_a_training_begin_with_what_is_set_first(name: str) -> None:
    groups = groups_of(COMMANDS[name].config())
    assert list(groups) == ["Model", "Data", "Objective", "Optimisation", "Run", "Logging"]
    assert "backbone" in groups["Model"][:2]
    assert groups["Data"][0] == "data"
    assert groups["Run"][:2] == ["out", "resume"]


def test_the_help_names_groups_positionals_values_and_defaults() -> None:
    text = build_parser("vlm show").format_help()
    assert text.startswith("usage: localign vlm show [ANSWERS] [--config FILE] [--option value ...]\n")
    text = " ".join(build_parser("align").format_help().split())
    assert text.index("Model:") < text.index("--backbone") < text.index("Data:") < text.index("--data")
    assert "--steps INT|null Optimizer steps" in text
    assert "--crop {published,rkrc,rrc,none,null}" in text
    assert "--model-kwargs [NAME=VALUE ...]" in text
    assert "--betas [FLOAT,FLOAT]" in text
    assert "(default: [0.9, 0.95])" in text
    assert "(default: scenes-vit)" in text


def test_the_help_of_a_first_word_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--help"]) == 0
    text = capsys.readouterr().out
    assert "data shard" in text
    assert "vlm train" not in text
    assert main(["data"]) == 2


@dataclasses.dataclass(frozen=True)
class Base:
    """A config class."""

    steps: int | None = None
    """Of the base."""
    rate: float = 1e-3
    """Of the
    base."""


@dataclasses.dataclass(frozen=True)
class Derived(Base):
    """Another."""

    steps: int | None = 3
    """Of the derived class."""
    names: tuple[str, ...] = ("a", "b")
    kind: Literal["x", "y"] | int | None = None
    further: dict[str, Any] = dataclasses.field(default_factory=lambda: {"depth": 2})


def test_options_are_read_from_fields_and_the_docstrings_below_them() -> None:
    options = options_of(Derived)
    assert list(options) == ["steps", "rate", "names", "kind", "further"]
    assert options["steps"] == Option("steps", int | None, 3, "Of the derived class.")
    assert [options[name].help for name in ("rate", "names")] == ["Of the base.", ""]
    assert [option.shown_default for option in options.values()] == ["3", "0.001", "a b", "", "depth=2"]
    assert [option.metavar for option in options.values()] == [
        "INT|null", "FLOAT", "TEXT", "x|y|INT|null", "NAME=VALUE",
    ]  # fmt: skip
    assert [option.accepted for option in options.values()] == [
        "int, null", "float", "a list of str", "one of [x, y], int, null", "name=value pairs",
    ]  # fmt: skip
