"""`localign completion`: a script that completes commands, options and choices in a shell."""

from __future__ import annotations

from argparse import ArgumentParser
from dataclasses import dataclass
from typing import Any, Literal, get_args

from localign.cli.options import options_of
from localign.cli.parser import add_options
from localign.cli.table import COMMANDS, Command
from localign.errors import UserError

Shell = Literal["bash", "zsh", "fish", "tcsh"]


@dataclass(frozen=True, kw_only=True)
class CompletionConfig:
    """Print a script that completes commands, options and choices in a shell (needs localign[completion])."""

    shell: Shell | None = None
    """bash, zsh, fish or tcsh. For bash: localign completion bash >
    ~/.local/share/bash-completion/completions/localign"""


def run_completion(config: CompletionConfig) -> None:
    """Print the script.

    Raises:
        UserError: No shell is given, or the extra is not installed.
    """
    if config.shell is None:
        raise UserError(f"completion takes a shell: {', '.join(get_args(Shell))}")
    try:
        import shtab
    except ImportError as error:
        raise UserError("completion needs shtab: pip install 'localign[completion]'") from error
    print(shtab.complete(parser_of_all_commands(shtab.FILE), config.shell))


def parser_of_all_commands(files: Any) -> ArgumentParser:
    """One parser for the whole command line; commands of two words lie in a parser of their first word.

    Args:
        files: Shtab's mark of arguments that name files; given to all free text.
    """
    root = ArgumentParser("localign", add_help=False)
    parents: dict[str, Any] = {"": root.add_subparsers()}
    for command in COMMANDS.values():
        first, _, last = command.name.rpartition(" ")
        if first not in parents:
            group = parents[""].add_parser(first, help=f"commands of localign {first}", add_help=False)
            parents[first] = group.add_subparsers()
        _add_command(parents[first].add_parser(last, help=command.help, add_help=False), command, files)
    return root


def _add_command(parser: ArgumentParser, command: Command, files: Any) -> None:
    options = options_of(command.config())
    for name in command.positional:
        option = options[name]
        nargs = "*" if option.is_list else "?"
        parser.add_argument(name, metavar=option.metavar, nargs=nargs, choices=option.choices or None)
    add_options(parser, command)
    for action in parser._actions:
        # Not where several words may follow: shtab would then complete no further options.
        if action.choices is None and "TEXT" in str(action.metavar) and action.nargs != "*":
            action.complete = files  # type: ignore[attr-defined]
