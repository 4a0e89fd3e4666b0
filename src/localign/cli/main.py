"""The command line: a config class becomes options, errors become one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from localign._version import __version__
from localign.cli.parser import command_of, parse
from localign.cli.table import COMMANDS, commands_of, split_command
from localign.errors import RunFailure, RunStopped, UserError
from localign.signals import exit_on_signals

EXIT_OK, EXIT_FAILURE, EXIT_BAD_INPUT = 0, 1, 2


def usage(group: str = "") -> str:
    """The text of `localign --help`, or of `localign GROUP --help` for the commands with this first word."""
    width = max(map(len, COMMANDS)) + 2
    shown = commands_of(group) if group else COMMANDS
    lines = [f"  {name:<{width}}{command.help}" for name, command in shown.items()]
    return "\n".join(
        [
            f"localign {__version__}: locality alignment for vision transformers",
            "",
            "usage: localign COMMAND [options]       localign COMMAND --help",
            "",
            *lines,
            "",
            "Several GPUs: torchrun --nproc-per-node N -m localign COMMAND ...",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit code: 0, 1 (failure) or 2 (bad use or bad input)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return EXIT_OK if arguments else EXIT_BAD_INPUT
    if arguments[0] in ("-V", "--version"):
        print(__version__)
        return EXIT_OK
    if commands_of(arguments[0]) and arguments[1:2] in (["-h"], ["--help"]):
        print(usage(arguments[0]))
        return EXIT_OK
    with exit_on_signals():
        return exit_code(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> int | None:
    name, rest = split_command(arguments)
    command = command_of(name, rest)
    return command.run(parse(command, rest))


def exit_code(action: Callable[[], int | None]) -> int:
    """Do something; what goes wrong in a known way becomes one line on standard error, and the exit code."""
    try:
        return action() or EXIT_OK
    except (UserError, RunFailure) as error:
        if not error.already_reported:
            print(f"localign: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return EXIT_BAD_INPUT if isinstance(error, UserError) else EXIT_FAILURE
    except RunStopped:
        return EXIT_OK  # the run has said so
    except KeyboardInterrupt:
        print("localign: interrupted; continue with --resume", file=sys.stderr)
        return EXIT_FAILURE
