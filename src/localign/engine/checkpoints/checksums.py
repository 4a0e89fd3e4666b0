"""What a checkpoint's JSON file knows of the checkpoint: size and digest of each file, and a digest of itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

FILES, SEAL = "files", "checksum"
_BLOCK = 2**22
_DIGEST_SIZE = 16
_UNSEALED = "0" * 2 * _DIGEST_SIZE
"""In the place of a file's own digest, while that is computed."""
_THREADS = 4
"""Files that are read at a time; hashing runs outside of Python's lock."""

FileFacts = dict[str, Any]
"""``{"bytes": int, "blake2b": str}`` of one file."""


def file_facts(path: Path) -> FileFacts:
    """Size and digest of a file."""
    digest, size = blake2b(digest_size=_DIGEST_SIZE), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "blake2b": digest.hexdigest()}


def facts_of(paths: Iterable[Path]) -> dict[str, FileFacts]:
    """Size and digest of files, by their names."""
    paths = sorted(paths)
    with ThreadPoolExecutor(_THREADS) as threads:
        return {path.name: facts for path, facts in zip(paths, threads.map(file_facts, paths), strict=True)}


def sealed_text(content: Mapping[str, Any], files: Mapping[str, FileFacts]) -> str:
    """The text of a checkpoint's JSON file, with what it says about the checkpoint's files and itself."""
    text = json.dumps({**content, FILES: dict(files), SEAL: _UNSEALED}, indent=1)
    return _with_seal(text, _UNSEALED, _digest(text))


def read_sealed(text: str) -> dict[str, Any]:
    """The content of a checkpoint's JSON file. An older localign's has no seal, and is taken as it is.

    Raises:
        ValueError: It is not what was written.
    """
    content = json.loads(text)
    if not isinstance(content, dict) or not isinstance(content.get("step"), int):
        raise ValueError("it does not say which step it is of")
    seal = content.get(SEAL)
    if seal is None and FILES not in content:
        return content
    if not isinstance(seal, str) or _digest(_with_seal(text, seal, _UNSEALED)) != seal:
        raise ValueError("it is not what was written (its checksum differs)")
    return content


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=_DIGEST_SIZE).hexdigest()


def _with_seal(text: str, old: str, new: str) -> str:
    before, found, after = text.rpartition(f'"{SEAL}": "{old}"')
    return f'{before}"{SEAL}": "{new}"{after}' if found else text


def files_problem(folder: Path, files: Mapping[str, FileFacts]) -> str:
    """What is wrong with a checkpoint's files, beside what was noted when they were written; "" for nothing.

    Raises:
        OSError: One cannot be read.
    """
    there = {p.name: p for p in folder.glob("*.safetensors")}
    problems = [f"{name} is missing" for name in files.keys() - there.keys()]
    problems += [f"{name} does not belong to it" for name in there.keys() - files.keys()]
    sizes = {name: there[name].stat().st_size for name in files.keys() & there.keys()}
    problems += [
        f"{name} has {size} bytes instead of {files[name]['bytes']}"
        for name, size in sizes.items()
        if size != files[name]["bytes"]
    ]
    if not problems:
        found = facts_of(there.values())
        changed = [name for name in found if found[name] != files[name]]
        problems = [f"{name} is not what was written (its checksum differs)" for name in changed]
    return "; ".join(sorted(problems))
