"""What a file that should hold weights really is, from its first bytes."""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import IO

from localign.errors import UserError
from localign.text.printing import printable
from localign.text.reading import LFS_POINTER, is_lfs_pointer, packed_with

_HEAD = 4096
_LEGACY_PICKLES = 5
"""Pickles at the start of an old torch file; the fourth holds the content."""
_SPARE = 2**26
"""Bytes to which any file may expand."""
_OTHERS = {
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"%PDF": "a PDF",
    b"GGUF": "a GGUF file",
}
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")


def check_format(path: Path) -> None:
    """Check that a file may be safetensors or a torch file, as its name says, and that reading it takes no more memory.

    Raises:
        UserError: The file is something else, which the line names, or it expands to much more than its size.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
        if problem := _problem(path, head):
            raise UserError(f"{printable(path)} {problem}")
    except OSError as error:
        raise UserError(f"{printable(path)} cannot be read: {error.strerror or error}") from None


def _problem(path: Path, head: bytes) -> str | None:
    if not head:
        return "is empty; download or copy it again"
    if is_lfs_pointer(head):
        return f"is {LFS_POINTER}"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.lower().startswith(_PAGES):
        return "is a web page, probably an error message of the server; download the file again"
    if packer := packed_with(head):
        return f"is packed with {packer}; unpack it first"
    for start, name in _OTHERS.items():
        if head.startswith(start):
            return f"is {name}; give a safetensors or torch file"
    if text.startswith((b"{", b"[")) and b"\0" not in head[:16]:
        if b'"weight_map"' in head or path.name.endswith(".index.json"):
            return (
                "is the index of a checkpoint in several files and holds no tensors; "
                "join the files that it names into one safetensors file"
            )
        return "is JSON text, not a checkpoint"
    if head[257:262] == b"ustar":
        return "is a tar archive; unpack it first"
    return _torch_problem(path, head)


def _torch_problem(path: Path, head: bytes) -> str | None:
    named_safe = path.suffix == ".safetensors"
    if head.startswith(b"PK\x03\x04"):
        if named_safe:
            return "is a zip archive, perhaps a torch file; if it is one, give it the ending .pth"
        return _archive_problem(path)
    if named_safe and head.startswith(b"\x80") and head[1:2] in b"\2\3\4\5" and head[8:9] != b"{":
        return "is a pickle, perhaps an old torch file; if it is one, give it the ending .pth"
    if not named_safe and head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 10**8:
        return "is a safetensors file; give it the ending .safetensors"
    if not named_safe and head.startswith(b"\x80"):
        with path.open("rb") as file:
            return _pickle_problem(file, path.stat().st_size)
    return None


def _archive_problem(path: Path) -> str | None:
    """The problem of a zip archive that should be a torch file. torch stores tensors as they are."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries if entry.filename.endswith("data.pkl")]
            problem = _expansion(path, entries)
            if names and not problem:
                with archive.open(names[0]) as file:
                    problem = _pickle_problem(file, path.stat().st_size)
    except Exception:  # readers of archives raise nearly anything
        return None  # torch's reader says more
    return problem if names else "is a zip archive without torch's data.pkl, not a torch file"


def _expansion(path: Path, entries: list[zipfile.ZipInfo]) -> str | None:
    expanded, size = sum(entry.file_size for entry in entries), path.stat().st_size
    if expanded <= 2 * size + _SPARE:
        return None
    return (
        f"has {size / 2**20:,.1f} MiB and would expand to {expanded / 2**20:,.0f} MiB; "
        "unpack it, and store it again without compression"
    )


def _pickle_problem(file: IO[bytes], size: int) -> str | None:
    """A call that torch's safe reader makes and that takes more memory than the file: ``bytearray(10**10)``."""
    try:
        for _ in range(_LEGACY_PICKLES):
            calls, largest = False, 0
            for opcode, argument, _position in pickletools.genops(file):
                calls |= opcode.name == "GLOBAL" and str(argument).endswith(" bytearray")
                largest = max(largest, argument if isinstance(argument, int) else 0)
            if calls and largest > size:
                return "makes an array of bytes that is larger than the file; it is damaged or hostile"
    except (ValueError, OverflowError, MemoryError):
        pass  # the end of the pickles, or damage, of which torch's reader says more
    return None
