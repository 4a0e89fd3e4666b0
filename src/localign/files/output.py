"""Outputs of commands: checked before the work, locked while it lasts, and never over what somebody else wrote."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localign.errors import UserError
from localign.files import sweep, temporary_name
from localign.files.disk import reason
from localign.files.lock import LOCK_FILE, take, write_kinds
from localign.text.plainyaml import load_yaml
from localign.text.printing import printable

if TYPE_CHECKING:
    from PIL.PngImagePlugin import PngInfo

EXPORT, VLM_EXPORT = "export", "vlm export"
"""Kinds of folders that describe themselves in ``config.json``."""
PROVENANCE_KEY = "localign_provenance"
"""Marks the ``config.json`` of an export in transformers' format."""
EMBEDDING_KEY = "localign_embed"
"""Key of the metadata of a parquet file of features."""
PAGE_MARK = '<meta name="generator" content="localign explore">'
"""Stands in the head of every page of `localign explore`."""
EXPORT_FILES = (
    "config.json", "model.safetensors", "decoder.safetensors", "preprocessor_config.json", "*_localign_v*.py",
    "model.onnx*", "model.pt2",
)  # fmt: skip
"""What exports of backbones hold, beside a README.md, which is ours only as long as nobody has edited it."""
VLM_EXPORT_FILES = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer*",
    "processor_config.json", "preprocessor_config.json", "chat_template.*", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.txt", "*_localign_v*.py",
)  # fmt: skip
RUN_FILES = (
    "config.yaml", "results.json", "log.jsonl", "checkpoints", "export", "tensorboard", "wandb", "nonfinite", "profile",
    "report.html", "pictures.npz", "data.npz",
)  # fmt: skip
"""What trainings write into their run folders."""
EVAL_FILES = ("results.json", "answers.jsonl")
"""What evaluations write. Answers on the way to them lie in a folder of their own."""
SHOWN = "vlm show"
"""Kind of a folder of pictures, each of which carries a mark."""
_PNG_KEY = "Software"
_PICTURES = 50
"""Pictures of a folder that are looked at."""
_MARK_BYTES = 2**20
"""The largest ``config.yaml``, ``config.json`` or ``comparison.json`` that is looked at, bytes."""


def kinds_of(folder: Path) -> set[str]:
    """The commands whose output a folder is, by the files in it that say so; empty for a foreign folder."""
    yaml = mapping_in(folder / "config.yaml", load_yaml, limit=_MARK_BYTES)
    results = mapping_in(folder / "results.json")
    model, compared = (mapping_in(folder / f"{n}.json", limit=_MARK_BYTES) for n in ("config", "comparison"))
    kinds = {str(yaml["command"])} if yaml.keys() >= {"command", "config"} else set()
    if results.keys() >= {"command", "versions"}:
        kinds.add(str(results["command"]))
    if model.get("model_type") == "localign_vlm":  # which has a section of ours, too
        kinds.add(VLM_EXPORT)
    elif isinstance(model.get("localign"), dict) or PROVENANCE_KEY in model:
        kinds.add(EXPORT)
    if compared.keys() >= {"benchmarks", "panels"}:
        kinds.add("vlm score")
    if any(is_marked_png(path, SHOWN) for path in islice(folder.glob("*.png"), _PICTURES)):
        kinds.add(SHOWN)
    return kinds


def png_mark(kind: str) -> PngInfo:
    """What :meth:`PIL.Image.Image.save` takes as ``pnginfo`` to write the command into a picture."""
    from PIL.PngImagePlugin import PngInfo

    mark = PngInfo()
    mark.add_text(_PNG_KEY, f"localign {kind}")
    return mark


def is_marked_png(path: Path, kind: str) -> bool:
    """Whether a picture was saved with :func:`png_mark`."""
    try:
        with path.open("rb") as file:
            return f"{_PNG_KEY}\0localign {kind}".encode() in file.read(256)  # before the pixels
    except OSError:
        return False


def mapping_in(
    path: Path, parse: Callable[[str], Any] = json.loads, *, limit: int | None = None
) -> dict[str, Any]:
    """The content of a file that may be ours; {} if it is missing, larger than ``limit`` or something else."""
    try:
        if not path.is_file() or (limit is not None and path.stat().st_size > limit):
            return {}
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


class OutputFolder:
    """A folder that one command writes to, from its check to :meth:`close`.

    Args:
        path: Created if it does not exist.
        kind: The command, such as ``probe``.
        writes: Names, or patterns of names, that the command writes or deletes in the folder.
        advice: The end of an error line.

    Raises:
        UserError: Another process writes to the folder, or it holds one of the names and is not an output of the same
            command.
        OSError: A file is in the place of the folder, or the folder cannot be written to.
    """

    def __init__(
        self, path: str | Path, kind: str, writes: Sequence[str] = (), *, advice: str = "give another --out"
    ) -> None:
        self.path, self.kind, self.writes = Path(path), kind, tuple(writes)
        self._is_ours = False
        self._created = _make(self.path)
        try:
            self._lock, self._marks = take(self.path / LOCK_FILE, self.path, kind)
        except BaseException:
            _remove_empty(self._created)
            raise
        try:
            check_ours(self.path, kind, self.writes, {*kinds_of(self.path), *self._marks}, advice)
        except BaseException:
            self.close()
            raise
        self._is_ours = True

    def close(self) -> None:
        """Release the folder. What the command created is removed if it is still empty."""
        with suppress(OSError):
            marks = self._needed_marks()
            if not marks:
                (self.path / LOCK_FILE).unlink(missing_ok=True)
            elif self._lock is not None:
                write_kinds(self._lock, marks)
        if self._lock is not None:
            self._lock.close()
        _remove_empty(self._created)

    def _needed_marks(self) -> set[str]:
        """The kinds of the folder that no other file in it tells."""
        marks = set(self._marks)
        if self._is_ours and _written(self.path, self.writes):
            marks.add(self.kind)
        return marks - kinds_of(self.path)


def check_ours(folder: Path, kind: str, writes: Sequence[str], kinds: set[str], advice: str) -> None:
    """Sweep a folder that the same command wrote; refuse one that holds other files with the names it writes.

    Args:
        folder: The folder; the caller holds its lock.
        kind: The command.
        writes: Names, or patterns of names.
        kinds: The commands that wrote the folder, see :func:`kinds_of`.
        advice: The end of the error line.

    Raises:
        UserError: The folder is not an output of the command.
    """
    if kind in kinds:
        sweep(folder)
        return
    taken = _written(folder, writes)
    if not taken:
        return
    place, name = printable(folder), printable(taken[0])
    checkpoints = folder / "checkpoints"
    if "config.yaml" not in taken and checkpoints.is_dir() and any(checkpoints.iterdir()):
        raise UserError(
            f"{place} holds checkpoints but no config.yaml, which says what the run is; restore config.yaml, or move "
            "the folder away to start anew"
        )
    if kinds:
        others = ", ".join(f"`localign {printable(other)}`" for other in sorted(kinds))
        raise UserError(
            f"{place} is a run of {others}, not of `localign {kind}`, which would replace its {name}; {advice}"
        )
    raise UserError(f"{place} holds {name}, and nothing there says that `localign {kind}` wrote it; {advice}")


def _written(folder: Path, writes: Sequence[str]) -> list[str]:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [name for pattern in writes for name in names if fnmatch(name, pattern)]


def _make(path: Path) -> list[Path]:
    """Make a folder and its parents; returns those that were missing, the outermost first. Raises OSError."""
    missing = list(takewhile(lambda folder: not folder.exists(), (path, *path.parents)))[::-1]
    there = missing[0].parent if missing else path
    if there.exists() and not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
    try:
        for folder in missing:
            folder.mkdir(exist_ok=True)
    except OSError:
        _remove_empty(missing)
        raise
    return missing


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in reversed(folders):
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def output_folder(
    path: str | Path, kind: str, writes: Sequence[str] = (), *, advice: str = "give another --out"
) -> Iterator[Path]:
    """Yield a checked and locked folder; see :class:`OutputFolder`. Errors of the disk are UserErrors here."""
    with _before_the_work(Path(path), advice):
        folder = OutputFolder(path, kind, writes, advice=advice)
    try:
        yield folder.path
    finally:
        folder.close()


@contextmanager
def output_file(
    path: str | Path, kind: str, is_ours: Callable[[Path], bool], *, advice: str = "give another --out"
) -> Iterator[Path]:
    """Yield a checked and locked path, for :func:`localign.files.replacing` to write to.

    Args:
        path: Its folder is created if it does not exist.
        kind: The command.
        is_ours: Whether an existing file looks like one that the command wrote.
        advice: The end of an error line.

    Raises:
        UserError: A folder or a foreign file is in the place of the file, its folder cannot be written to, or another
            process writes the file.
    """
    path = Path(path)
    with locked_beside(path, kind, advice=advice):
        if path.is_dir():
            raise UserError(f"{printable(path)} is a folder, not a file; {advice}")
        if path.exists() and not (path.is_file() and is_ours(path)):
            raise UserError(
                f"{printable(path)} exists, and `localign {kind}` did not write it; move it away, or {advice}"
            )
        yield path


@contextmanager
def locked_beside(path: Path, kind: str, *, advice: str = "give another --out") -> Iterator[None]:
    """Lock a file or folder that appears as a whole, by a lock file beside it that is gone afterwards.

    Raises:
        UserError: Its parent cannot be written to, or another process writes it.
    """
    path = path.absolute()  # so that "." has a name, too
    beside = path.with_name(f".{path.name}{LOCK_FILE}")
    with _before_the_work(path, advice):
        created = _make(path.parent)
        try:
            held, _ = take(beside, path, kind)
        except BaseException:
            _remove_empty(created)
            raise
    try:
        with _before_the_work(path, advice):
            sweep(path.parent, name=path.name)
            temporary_name(path).touch()  # its name is longer than that of the lock file
            temporary_name(path).unlink()
        yield
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        if held is not None:
            held.close()
        _remove_empty(created)


@contextmanager
def _before_the_work(path: Path, advice: str) -> Iterator[None]:
    try:
        yield
    except NotADirectoryError as error:
        raise UserError(f"{printable(error.filename)} is a file, not a folder; {advice}") from error
    except OSError as error:
        raise UserError(f"cannot write to {printable(path)}: {reason(error)}; {advice}") from error
