"""Errors that are the user's to mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad use or bad input: shown as one line, without a traceback; the command exits with 2."""

    already_reported = False
    """Whether another process of the run shows it."""


class RunFailure(Exception):
    """A run that began well and cannot go on: shown as one line; the command exits with 1."""

    already_reported = False
    """Whether another process of the run shows it."""


class RunStopped(Exception):
    """A run that was asked to stop (SIGTERM, SIGUSR1) and can be continued; the command exits with 0."""


def did_you_mean(name: str, known: Iterable[str], count: int = 5) -> str:
    """A tail for an error line that names the known strings nearest to ``name``.

    Returns:
        ``"; did you mean 'a', 'b'?"``, or an empty string where nothing is near.
    """
    close = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f"; did you mean {', '.join(repr(c) for c in close)}?" if close else ""
