"""Errors that commands show as one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad options or bad input. The command shows one line without a traceback and exits with 2."""

    already_reported = False
    """Whether another process of the run shows the error."""


class RunFailure(Exception):
    """A run that started but cannot continue. The command shows one line and exits with 1."""

    already_reported = False
    """Whether another process of the run shows the error."""


class RunStopped(Exception):
    """A run that stopped after SIGTERM or SIGUSR1 and can be resumed. The command exits with 0."""


def did_you_mean(name: str, known: Iterable[str], count: int = 5) -> str:
    """The end of an error line, which suggests known names similar to ``name``.

    Returns:
        ``"; did you mean 'a', 'b'?"``, or an empty string if no known name is similar.
    """
    close = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f"; did you mean {', '.join(repr(c) for c in close)}?" if close else ""
