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


def sealed(content: Mapping[str, Any], files: Mapping[str, FileFacts]) -> dict[str, Any]:
    """The content of a checkpoint's JSON file with what it says about the checkpoint's files and itself."""
    whole = {**content, FILES: dict(files)}
    return {**whole, SEAL: _seal(whole)}


def _seal(content: Mapping[str, Any]) -> str:
    # Through JSON and back: as it will be read, with lists for tuples.
    plain = json.loads(json.dumps(content))
    text = json.dumps(plain, sort_keys=True)
    return blake2b(text.encode(), digest_size=_DIGEST_SIZE).hexdigest()


def check_seal(state: Any) -> bool:
    """Whether the content of a JSON file says what its checkpoint holds; an older localign's does not.

    Raises:
        ValueError: It is not what was written.
    """
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise ValueError("it does not say which step it is of")
    if FILES not in state and SEAL not in state:
        return False
    if state.get(SEAL) != _seal({k: v for k, v in state.items() if k != SEAL}):
        raise ValueError("it is not what was written (its checksum differs)")
    return True


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
        problems = [f"{name} is not what was written (its checksum differs)" for name in found if found[name] != files[name]]
    return "; ".join(sorted(problems))
