"""The command line: a config class becomes options, errors become one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from localign._version import __version__
from localign.cli.parser import command_of, parse
from localign.cli.streams import standard_streams
from localign.cli.table import COMMANDS, Command, commands_of, split_command
from localign.errors import RunFailure, RunStopped, UserError
from localign.files.disk import describe, disk_errors, reason
from localign.signals import exit_on_signals, second_interrupt_ends
from localign.text.printing import printable

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


def welcome() -> str:
    """The text of `localign` alone."""
    return f"""localign {__version__} makes a vision transformer know where things are, not just what they are.

  localign demo                                       the whole method on drawn scenes, on a laptop
  localign align --backbone clip-vit-b --data IMAGES  align a backbone to your images, without labels
  localign probe clip-vit-b,runs/align --data COCO    measure what it gained
  localign vlm train --backbone runs/align ...        use it in a vision-language model
  localign export runs/align --format clip            use it elsewhere

All commands: localign --help. Options: localign COMMAND --help. This machine: localign doctor."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit code: 0, 1 (failure) or 2 (bad use or bad input)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with exit_on_signals():
        return exit_code(lambda: _answer(arguments))


def _answer(arguments: Sequence[str]) -> int | None:
    if not arguments:
        print(welcome())
        return EXIT_BAD_INPUT
    if arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return EXIT_OK
    if arguments[0] in ("-V", "--version"):
        print(__version__)
        return EXIT_OK
    if commands_of(arguments[0]) and arguments[1:2] in (["-h"], ["--help"]):
        print(usage(arguments[0]))
        return EXIT_OK
    name, rest = split_command(arguments)
    if not rest and COMMANDS[name].without_options:
        raise UserError(COMMANDS[name].without_options)
    return run(command_of(name, rest), rest)


def run(command: Command, arguments: Sequence[str]) -> int | None:
    """Run a command with the arguments after its name; its outputs are checked first, and held while it runs."""
    config = parse(command, arguments)
    from localign.cli.outputs import claimed  # here, because help and errors about options need no outputs

    with claimed(command.name, config):
        return command.run(config)


def exit_code(action: Callable[[], int | None]) -> int:
    """Do something; what goes wrong in a known way becomes one line on standard error, and the exit code."""
    if sys.stdout is None:
        _report("standard output is closed; redirect it to a file or to /dev/null")
        return EXIT_BAD_INPUT
    with standard_streams() as output, second_interrupt_ends():
        stop = None
        try:
            code = _exit_code(action)
        except SystemExit as raised:  # the help, or a signal
            stop, code = raised, raised.code if isinstance(raised.code, int) else EXIT_OK
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        if output.error is not None:
            _report(f"not everything was printed: standard output: {reason(output.error)}")
            return code or EXIT_FAILURE
        if stop is not None:
            raise stop
        return code


def _exit_code(action: Callable[[], int | None]) -> int:
    try:
        return action() or EXIT_OK
    except (UserError, RunFailure) as error:
        if not error.already_reported:
            _report(str(error))
        return EXIT_BAD_INPUT if isinstance(error, UserError) else EXIT_FAILURE
    except RunStopped:
        return EXIT_OK  # the run has said so
    except KeyboardInterrupt:
        _report("interrupted; continue with --resume")
        return EXIT_FAILURE
    except disk_errors() as error:
        _report(describe(error))
        return EXIT_FAILURE


def _report(problem: str) -> None:
    with suppress(OSError, ValueError):  # there may be nobody to tell
        print(f"localign: {printable(' '.join(problem.splitlines()))}", file=sys.stderr, flush=True)
