"""From a command line to a config object, and from a config class to the help."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from localign.cli.arguments import FILE_OPTIONS, Arguments, read_arguments
from localign.cli.options import Option, flag, groups_of, options_of
from localign.cli.table import COMMANDS, Command
from localign.cli.values import converted
from localign.deprecated import new_names, with_new_names
from localign.errors import UserError, did_you_mean


def parse(name: str | Command, argv: Sequence[str]) -> Any:
    """The config object of a command line.

    Args:
        name: A name of the table, or a command that is not in it.
        argv: The arguments after the command.

    Raises:
        UserError: Unknown, misspelt, mistyped or contradictory options.
        SystemExit: The command line asks for the help, or to print its options; they are printed.
    """
    command = COMMANDS[name] if isinstance(name, str) else name
    options = options_of(command.config())
    read = read_arguments(argv, options, command.positional, new_names(command.name))
    if read.help:
        print(build_parser(command).format_help(), end="")
        raise SystemExit(0)
    values = {key: converted(options[key], value) for key, value in _given(read, command, options).items()}
    if read.print_config is not None:
        what = converted(FILE_OPTIONS["print_config"], read.print_config)
        print(_as_yaml(values, options, what), end="")
        raise SystemExit(0)
    return command.config()(**values)


def command_of(name: str, argv: Sequence[str]) -> Command:
    """The command of a name, or its sibling where the command line gives a recipe of the sibling.

    Raises:
        UserError: A file or recipe of the command line cannot be read.
    """
    from localign.recipes import read_recipe

    command = COMMANDS[name]
    if command.sibling is None:
        return command
    sibling = COMMANDS[command.sibling]
    words = [word for argument in argv for word in argument.split("=", 1)]
    files = [value for option, value in pairwise(words) if option == "--config"]
    return sibling if any(read_recipe(f).command == sibling.recipes_of for f in files) else command


def _given(read: Arguments, command: Command, options: Mapping[str, Option]) -> dict[str, Any]:
    """Field -> what files and options give; options win."""
    given: dict[str, Any] = {}
    for file in read.files:
        given |= _file_options(file, command, options)
    given |= read.given
    for key, items in read.items.items():
        inner = given.get(key) or {}
        given[key] = {**inner, **items} if isinstance(inner, dict) else inner
    return given


def _file_options(file: str, command: Command, options: Mapping[str, Option]) -> dict[str, Any]:
    from localign.recipes import read_recipe

    values = read_recipe(file, command.recipes_of or command.name).values
    values = {key: value for key, value in values.items() if key not in command.ignored_in_files}
    values = with_new_names(values, command.name, warn_of=file)
    for key in values:
        if key not in options:
            known = [*map(flag, options)]
            raise UserError(f"unknown key {key!r} in the config file{did_you_mean(flag(str(key)), known)}")
    return values


def _as_yaml(values: Mapping[str, Any], options: Mapping[str, Option], what: str) -> str:
    import yaml

    shown = {name: values.get(name, option.default) for name, option in options.items()}
    if what == "skip_default":
        shown = {name: value for name, value in shown.items() if value != options[name].default}
    if what == "skip_unset":
        shown = {name: value for name, value in shown.items() if value is not None}
    return yaml.safe_dump(json.loads(json.dumps(shown)), sort_keys=False, allow_unicode=True)


def build_parser(name: str | Command) -> ArgumentParser:
    """The parser of one command, for its help and for shell completion; :func:`parse` reads command lines."""
    command = COMMANDS[name] if isinstance(name, str) else name
    positional = "".join(f" [{field.upper()}]" for field in command.positional)
    parser = ArgumentParser(
        prog=f"{command.program} {command.name}",
        usage=f"{command.program} {command.name}{positional} [--config FILE] [--option value ...]",
        description=(command.config().__doc__ or command.help).strip().splitlines()[0],
        add_help=False,
    )
    add_options(parser, command)
    return parser


def add_options(parser: ArgumentParser, command: Command) -> None:
    """Give a parser the options of a command, in groups."""
    general = parser.add_argument_group("General")
    for option in FILE_OPTIONS.values():
        _add_option(general, option)
    general.add_argument("-h", "--help", action="help", help="Show this help and stop.")
    options = options_of(command.config())
    for title, names in groups_of(command.config()).items():
        group = parser.add_argument_group(title)
        for field in names:
            _add_option(group, options[field])


def _add_option(group: Any, option: Option) -> None:
    default = f" (default: {option.shown_default})" if option.shown_default else ""
    group.add_argument(
        option.flag,
        dest=option.name,
        metavar=option.metavar,
        choices=option.choices or None,
        nargs="*" if option.is_list or option.is_mapping else "?" if option.bare else None,
        help=(option.help + default).replace("%", "%%"),
    )
