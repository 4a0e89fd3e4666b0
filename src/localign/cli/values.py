"""Converts values of options, from text or from YAML, to the type of the field."""

from __future__ import annotations

import re
from argparse import ArgumentError
from typing import Any

from localign.cli.options import Option
from localign.errors import UserError
from localign.options.names import check_limit

_PAIR = re.compile(r"(-?\d{1,18})x(-?\d{1,18})")


def converted(option: Option, given: Any) -> Any:
    """The value of an option.

    Args:
        option: The option.
        given: Text of the command line, or any value of a YAML file.

    Raises:
        UserError: It has another type, is none of the choices, or is an absurd number.
    """
    # Here, because help and errors about names need no types.
    from jsonargparse import ArgumentParser

    if option.takes_pair and isinstance(given, str) and (pair := _PAIR.fullmatch(given.strip())):
        given = [int(number) for number in pair.groups()]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=option.type)
    try:
        parsed = (
            parser.parse_args([f"--value={given}"])
            if isinstance(given, str)
            else parser.parse_object({"value": given})
        )
    except (ArgumentError, OverflowError) as error:
        shown = f"{str(given)!r:.80}"
        raise UserError(f"{option.flag} takes {option.accepted}, not {shown}") from error
    if parsed.value is None and not option.takes_null:
        raise UserError(f"{option.flag} takes no null")
    check_limit(option.name, parsed.value)
    return parsed.value
