"""Checksums in a checkpoint's JSON file: size and digest of every other file, and a digest of the JSON itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypedDict

from localign.text.printing import printable

FILES, SEAL = "files", "checksum"
"""Keys in the JSON file: name -> :class:`FileInfo`, and the digest of the JSON file."""
_BLOCK = 2**22
_DIGEST_SIZE = 16
_UNSEALED = "0" * 2 * _DIGEST_SIZE
"""Stands for the JSON file's digest while the digest is computed."""
_THREADS = 4
"""Files read in parallel; hashing releases Python's lock."""


class FileInfo(TypedDict):
    """Size and digest of a file."""

    bytes: int
    blake2b: str
    """32 hexadecimal digits."""


def file_info(path: Path) -> FileInfo:
    """Read a file and return its size and digest."""
    digest, size = blake2b(digest_size=_DIGEST_SIZE), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "blake2b": digest.hexdigest()}


def files_info(paths: Iterable[Path]) -> dict[str, FileInfo]:
    """Sizes and digests of files, by file name."""
    paths = sorted(paths)
    with ThreadPoolExecutor(_THREADS) as threads:
        return {path.name: info for path, info in zip(paths, threads.map(file_info, paths), strict=True)}


def sealed_text(content: Mapping[str, Any], files: Mapping[str, FileInfo]) -> str:
    """The text of a checkpoint's JSON file: the content, the checkpoint's other files, and the text's own digest."""
    text = json.dumps({**content, FILES: dict(files), SEAL: _UNSEALED}, indent=1)
    return _with_seal(text, _UNSEALED, _digest(text))


def read_sealed(text: str) -> dict[str, Any]:
    """Parse a checkpoint's JSON file. A file of an older version has no digest and is not checked.

    Raises:
        ValueError: The text is not JSON, has no step, does not match its digest, or its list of files is none.
    """
    content = json.loads(text)
    if not isinstance(content, dict) or type(content.get("step")) is not int:
        raise ValueError("it has no step number")
    seal = content.get(SEAL)
    if seal is None and FILES not in content:
        return content
    check_listed(content.get(FILES))
    if not isinstance(seal, str) or _digest(_with_seal(text, seal, _UNSEALED)) != seal:
        raise ValueError("its checksum differs")
    return content


def check_listed(files: Any) -> None:
    """Check a list of files from JSON.

    Raises:
        ValueError: It is not a dictionary of name -> :class:`FileInfo`.
    """
    if not isinstance(files, dict):
        raise ValueError("it lists no files")
    for name, info in files.items():
        if not (
            isinstance(info, dict) and type(info.get("bytes")) is int and isinstance(info.get("blake2b"), str)
        ):
            raise ValueError(f"it has no size and digest of {printable(name)}")


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=_DIGEST_SIZE).hexdigest()


def _with_seal(text: str, old: str, new: str) -> str:
    before, found, after = text.rpartition(f'"{SEAL}": "{old}"')
    return f'{before}"{SEAL}": "{new}"{after}' if found else text


def check_files(folder: Path, expected: Mapping[str, FileInfo]) -> str:
    """Compare a checkpoint's files with what its JSON file says about them.

    Returns:
        A line that names all differences; "" if there are none.

    Raises:
        OSError: A file cannot be read.
    """
    paths = {p.name: p for p in folder.glob("*.safetensors")}
    problems = [f"{printable(name)} is missing" for name in expected.keys() - paths.keys()]
    problems += [
        f"{printable(name)} does not belong to the checkpoint" for name in paths.keys() - expected.keys()
    ]
    sizes = {name: paths[name].stat().st_size for name in expected.keys() & paths.keys()}
    problems += [
        f"{name} has {size} bytes instead of {expected[name]['bytes']}"
        for name, size in sizes.items()
        if size != expected[name]["bytes"]
    ]
    if not problems:
        found = files_info(paths.values())
        changed = [name for name in found if found[name] != expected[name]]
        problems = [f"the checksum of {name} differs" for name in changed]
    return "; ".join(sorted(problems))
