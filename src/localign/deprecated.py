"""Old names of options, which work for one release on the command line and in files, and old meanings of options."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from localign.errors import UserError

REVISION = 2
"""Saved with every run. It counts the changes in what the same options mean; the first runs saved none.

2: ``crop: published`` draws from the ranges of the published runs; before, from those of ``rkrc``. ``mask: block``
uncovers rectangles; before, it hid them."""


@dataclass(frozen=True)
class Renamed:
    """An option that had another name in the release before."""

    old: str
    new: str
    command: str | None = None
    """The only command that renamed it; None for all commands that have the new name."""


RENAMED = (
    Renamed("warmup_share", "warmup_ratio"),
    Renamed("warmup_start", "warmup_init_ratio"),
    Renamed("ema", "ema_decay"),
    Renamed("save", "out", command="plan"),
)


def new_names(command: str | None = None) -> dict[str, str]:
    """Old name -> new name of the options of a command; without one, of those renamed in all commands."""
    return {r.old: r.new for r in RENAMED if r.command in (None, command)}


def with_new_names(
    values: Mapping[str, Any], command: str | None = None, warn_of: str | None = None
) -> dict[str, Any]:
    """Options under the names they have now.

    Args:
        values: Option -> value, from one file.
        command: Whose options they are.
        warn_of: The file, for a line on standard error that says which names to use; None to say nothing.

    Raises:
        UserError: An option is given under both names.
    """
    names, renamed = new_names(command), dict(values)
    for old in [key for key in values if key in names]:
        new = names[old]
        if new in values:
            raise UserError(f"{warn_of or 'the file'}: {old} is the old name of {new}; give one of them")
        renamed[new] = renamed.pop(old)
        if warn_of is not None:
            warn(f"{warn_of}: {old}", new)
    return renamed


def with_meanings_of_now(values: Mapping[str, Any], command: str | None, revision: int) -> dict[str, Any]:
    """Saved options as they have to be written now, where that is possible.

    Args:
        values: Option -> value, under the names of now.
        command: Whose options they are.
        revision: The :data:`REVISION` that they were saved with.
    """
    changed = dict(values)
    photographs = not str(values.get("data")).startswith("scenes")
    published = values.get("crop") == "published" or (command == "align" and values.get("crop") is None)
    if revision < 2 and command in ("align", "finetune") and photographs and published:
        changed["crop"] = "rkrc"
    return changed


def lost_meaning(values: Mapping[str, Any], command: str | None, revision: int) -> str | None:
    """What the saved options mean that no option means now, so that the run cannot go on; None if there is no such."""
    if revision < 2 and command == "align" and values.get("mask") == "block":
        return "its block masks hide rectangles; block masks now uncover them, as published"
    return None


def with_old_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options under the names that they had before, for digests that folders of earlier releases are named after."""
    names = {r.new: r.old for r in RENAMED if r.command is None}
    return {names.get(key, key): value for key, value in values.items()}


def warn(old: str, new: str) -> None:
    """Say on standard error, on one rank, which name to use."""
    if os.environ.get("RANK", "0") == "0":
        print(f"deprecated {old} is now {new}; the next release will not know the old name", file=sys.stderr)
