"""The command line: a table of commands, their options from config classes, errors as one line."""

from localign.cli.main import EXIT_BAD_INPUT, EXIT_FAILURE, EXIT_OK, exit_code, main
from localign.cli.parser import build_parser, parse
from localign.cli.table import COMMANDS, Command, split_command

__all__ = [
    "COMMANDS",
    "EXIT_BAD_INPUT",
    "EXIT_FAILURE",
    "EXIT_OK",
    "Command",
    "build_parser",
    "exit_code",
    "main",
    "parse",
    "split_command",
]
