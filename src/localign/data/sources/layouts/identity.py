"""What a file is by its first bytes, and short names of shards that tell them apart."""

from __future__ import annotations

import os
from collections.abc import Sequence

from localign.errors import UserError
from localign.text.printing import printable
from localign.text.reading import LFS_POINTER, is_lfs_pointer, packed_with

HEAD = 512
"""Bytes that :func:`known_content` looks at."""

_UNPACK = {
    "gzip": "decompress it with gunzip",
    "bzip2": "decompress it with bunzip2",
    "xz": "decompress it with unxz",
    "zstd": "decompress it with unzstd",
}
_KINDS = (
    (b"PK\x03\x04", "a zip archive"),
    (b"PAR1", "a parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89PNG", "a PNG image"),
    (b"<!DOCTYPE", "a web page, perhaps an error page of a download"),
    (b"<html", "a web page, perhaps an error page of a download"),
    (b"<?xml", "an XML file, perhaps an error page of a download"),
)


def read_head(path: str | os.PathLike[str]) -> bytes:
    """The first bytes of a file, for :func:`known_content`. Raises UserError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(HEAD)
    except OSError as error:
        raise UserError(f"cannot read {printable(path)}: {error.strerror}") from None


def known_content(head: bytes, expected: str = "") -> str | None:
    """What a file is by its first bytes, as the end of "x is ..."; None if it is unknown or as expected.

    Args:
        head: The first :data:`HEAD` bytes.
        expected: "tar" or "parquet".
    """
    if not head:
        return "empty"
    if head[257:262] == b"ustar":
        return None if expected == "tar" else "a tar file"
    if is_lfs_pointer(head):
        return LFS_POINTER
    if packer := packed_with(head):
        return f"compressed with {packer}; {_UNPACK.get(packer, 'unpack it')}, shards must be uncompressed"
    found = next((text for magic, text in _KINDS if head.startswith(magic)), None)
    return None if found == "a parquet file" and expected == "parquet" else found


def short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of paths or URLs: as few as tell all of them apart, the same number for all."""
    parts = [path.partition("?")[0].split("/") for path in paths]
    distinct = len({tuple(p) for p in parts})
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == distinct:
            return names
    return list(paths)


def is_shard(path: str, name: str) -> bool:
    """Whether ``name`` is a path's name, or its last parts."""
    return path.partition("?")[0] == name or path.partition("?")[0].endswith(f"/{name}")
