"""Lists the files below a folder. Folders of others hold pipes, sockets and links that lead in circles."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from localign.errors import UserError
from localign.text.printing import printable

FOLDER, FILE = "a folder", "a file"
MAX_VISITS = 100
"""Times that a link to a folder is followed from different places. Links between folders can multiply without end."""


@dataclass
class Found:
    """What lies below a folder."""

    names: list[str] = field(default_factory=list)
    """Relative names of the files with a wanted suffix, with forward slashes."""
    other: Counter[str] = field(default_factory=Counter)
    """The suffixes of all other files, and how many there are."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason) of what looks like a wanted file or a folder and is neither."""


def kind_of(entry: os.DirEntry[str]) -> str:
    """``FOLDER``, ``FILE``, or what else an entry of a folder is. Links are followed; nothing is opened.

    A link to nothing counts as a file: whoever reads it learns that there is no such file.
    """
    try:
        if entry.is_dir():
            return FOLDER
        if entry.is_file():
            return FILE
        mode = entry.stat().st_mode
    except FileNotFoundError:
        return FILE
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return "a link that leads to itself"
    return "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"


def walk(root: Path, suffixes: Collection[str]) -> Found:
    """Find the files below a folder, at any depth. Names that begin with a dot are left out.

    Links to folders are followed, except links that lead back into the folder.

    Args:
        root: The folder.
        suffixes: Of the wanted files, in lower case.

    Raises:
        UserError: A folder cannot be listed.
    """
    found = Found()
    visits: Counter[tuple[str, str]] = Counter()
    stack: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(root),))]
    while stack:
        prefix, links = stack.pop()
        try:
            with os.scandir(root / prefix) as entries:
                # Sorted, because the bound on visits must not depend on the order on the disk.
                for entry in sorted(entries, key=lambda e: e.name, reverse=True):
                    if not entry.name.startswith("."):
                        _sort_in(entry, prefix, links, suffixes, found, stack, visits)
        except OSError as error:
            raise UserError(f"cannot list the folder {printable(root / prefix)}: {error.strerror}") from None
    return found


def _sort_in(
    entry: os.DirEntry[str],
    prefix: str,
    links: tuple[str, ...],
    suffixes: Collection[str],
    found: Found,
    stack: list[tuple[str, tuple[str, ...]]],
    visits: Counter[tuple[str, str]],
) -> None:
    """Put one entry of the folder ``prefix`` where it belongs."""
    name, kind = prefix + entry.name, kind_of(entry)
    suffix = os.path.splitext(entry.name)[1].lower()
    if kind == FOLDER and entry.is_symlink():
        parent = os.path.realpath(os.path.dirname(entry.path))
        visits[parent, entry.name] += 1
        chain = _extended_chain(parent, os.path.realpath(entry.path), links)
        if chain and visits[parent, entry.name] <= MAX_VISITS:
            stack.append((f"{name}/", chain))
        else:
            found.skipped.append((name, "a link that leads back" if not chain else "links that multiply"))
    elif kind == FOLDER:
        stack.append((f"{name}/", links))
    elif kind != FILE and (suffix in suffixes or kind.startswith("a link")):
        found.skipped.append((name, kind))
    elif suffix in suffixes:
        found.names.append(name)
    else:
        found.other[suffix] += 1


def _extended_chain(parent: str, target: str, chain: tuple[str, ...]) -> tuple[str, ...]:
    """The chain of followed folders plus a link's target; () if the link leads back into the chain."""
    leads_back = target in chain or parent == target or parent.startswith(target.rstrip(os.sep) + os.sep)
    return () if leads_back else (*chain, target)


def skipped_line(skipped: list[tuple[str, str]], what: str = "image") -> str | None:
    """What was skipped as one line, or None if nothing was."""
    if not skipped:
        return None
    first = ", ".join(f"{printable(name)} ({reason})" for name, reason in skipped[:3])
    count = (
        f"{len(skipped)} entries that are no {what}s" if len(skipped) > 1 else f"1 entry that is no {what}"
    )
    return f"skipped {count}: {first}{', ...' if len(skipped) > 3 else ''}"
