"""Images into tar shards: in parallel, resumable, the same bytes whenever it is done."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from localign.data.decoding import UnreadableImage, decode_image
from localign.data.parallel import in_processes
from localign.data.sources import SUFFIXES, ImageSource
from localign.data.sources.tar_index import tar_index, write_portable
from localign.datatools.reading import encoded
from localign.errors import UserError
from localign.files import fsync_path, replace_text, replacing

ABOUT, SHARDS, LEFT_OUT = "about.json", "shards.jsonl", "left-out.jsonl"
QUALITY = 92
_JPEG = b"\xff\xd8\xff"
_KINDS = ((_JPEG, ".jpg"), (b"\x89PNG", ".png"), (b"RIFF", ".webp"), (b"GIF8", ".gif"), (b"BM", ".bmp"))


@dataclass(frozen=True)
class Packing:
    """Packs shard after shard; goes to worker processes.

    Attributes:
        source: Images.
        order: int64, which of them, in the order of packing.
        folders: What to put in front of each image's name, by its place in ``order``; None: nothing.
        per_shard: Images of a shard.
        resize: The short side, pixels; None copies files.
        quality: Of JPEG.
        folder: Where to.
    """

    source: ImageSource
    order: NDArray[np.int64]
    folders: Sequence[str] | None
    per_shard: int
    resize: int | None
    quality: int
    folder: Path

    @property
    def shards(self) -> int:
        """How many there will be."""
        return -(-len(self.order) // self.per_shard)

    def __call__(self, number: int) -> dict[str, Any]:
        """Write a shard; returns what is known of it."""
        path = self.folder / f"{number:06}.tar"
        images, left_out = 0, []
        begin = number * self.per_shard
        with replacing(path) as temporary, tarfile.open(temporary, "w") as tar:
            for place in range(begin, min(begin + self.per_shard, len(self.order))):
                try:
                    name, data = self._member(place)
                except UnreadableImage as error:
                    left_out.append([error.name, error.reason])
                    continue
                member = tarfile.TarInfo(name)  # of nobody, at no time: the same bytes whoever packs
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
                images += 1
        return {
            "shard": path.name,
            "images": images,
            "bytes": path.stat().st_size,
            "sha256": sha256(path),
            "left_out": left_out,
        }

    def check_names(self) -> None:
        """Raises UserError where two images would have one name in the shards."""
        names = (
            hash(self._name(place, b"")) for place in range(len(self.order))
        )  # strings would fill the memory
        same = len(self.order) - len(np.unique(np.fromiter(names, np.int64, len(self.order))))
        if same:
            raise UserError(f"{same} images would have the name of another one in the shards")

    def _name(self, place: int, data: bytes) -> str:
        folder = "" if self.folders is None else self.folders[place]
        return member_name(self.source.name(int(self.order[place])), folder, data)

    def _member(self, place: int) -> tuple[str, bytes]:
        index = int(self.order[place])
        name, data = self.source.name(index), encoded(self.source, index)
        if self.resize is not None:
            data = smaller(data, name, self.resize, self.quality)
        return self._name(place, data), data


def smaller(data: bytes, name: str, side: int, quality: int) -> bytes:
    """A JPEG whose short side has so many pixels; the file as it is where that side is not longer.

    Raises:
        UnreadableImage: It cannot be decoded.
    """
    image = decode_image(data, name, at_least=2 * side)  # what a fraction leaves, Lanczos still halves
    short = min(image.size)
    if short <= side:
        return data
    size = [max(1, round(n * side / short)) for n in image.size]
    file = io.BytesIO()
    image.resize((size[0], size[1]), Image.Resampling.LANCZOS).save(file, "JPEG", quality=quality)
    return file.getvalue()


def member_name(name: str, folder: str, data: bytes) -> str:
    """A name in a shard: relative, downwards, and with a suffix that says what the file is.

    Args:
        name: The image's in its source.
        folder: To be put in front.
        data: The file.
    """
    path = re.sub(r"\.parquet:", "/", name)
    kept = [part for part in (*folder.split("/"), *path.split("/")) if part not in ("", ".", "..")]
    path = "/".join(kept)
    suffix = PurePosixPath(path).suffix.lower()
    kind = next((kind for magic, kind in _KINDS if data.startswith(magic)), "")
    jpeg = suffix in (".jpg", ".jpeg", ".jpe", ".jfif")
    if suffix not in SUFFIXES or (kind == ".jpg" and not jpeg):
        return path + (kind or ".jpg")
    return path


def pack(packing: Packing, processes: int, facts: dict[str, Any]) -> dict[str, Any]:
    """Write all shards, those that an earlier call wrote excepted, and what is known of them.

    The folder is called ``*.partial`` until it is whole.

    Args:
        packing: See there; ``folder`` is the partial one.
        processes: To work in.
        facts: What the shards are a function of: a folder of others is not gone on with.

    Returns:
        ``about.json``: the facts, and ``images``, ``bytes``, ``shards`` and ``left_out`` as counts.

    Raises:
        UserError: The folder is of other facts, or names of images coincide.
        RunFailure: A process died.
    """
    folder = packing.folder
    packing.check_names()
    folder.mkdir(parents=True, exist_ok=True)
    _check_about(folder, facts)
    done = {record["shard"]: record for record in _records(folder) if _is_there(folder, record)}
    replace_text(folder / SHARDS, "".join(json.dumps(r) + "\n" for r in done.values()))
    replace_text(folder / ABOUT, json.dumps(facts, indent=1) + "\n")
    left = [number for number in range(packing.shards) if f"{number:06}.tar" not in done]
    with open(folder / SHARDS, "a", encoding="utf-8") as log:
        for record in in_processes(packing, left, len(left), processes, "packing"):
            done[record["shard"]] = dict(record)
            log.write(json.dumps(record) + "\n")
            log.flush()
    records = [done[f"{number:06}.tar"] for number in range(packing.shards)]
    return _finish(folder, records, facts)


def _finish(folder: Path, records: list[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    left_out = [entry for record in records for entry in record["left_out"]]
    paths = [folder / record["shard"] for record in records]
    write_portable(folder, tar_index(paths), paths)
    about = facts | {
        "images": sum(record["images"] for record in records),
        "bytes": sum(record["bytes"] for record in records),
        "shards": len(records),
        "left_out": len(left_out),
    }
    lines = (json.dumps({"path": name, "reason": reason}) + "\n" for name, reason in left_out)
    replace_text(folder / LEFT_OUT, "".join(lines))
    replace_text(folder / SHARDS, "".join(json.dumps(record) + "\n" for record in records))
    replace_text(folder / ABOUT, json.dumps(about, indent=1) + "\n")
    return about


def _check_about(folder: Path, facts: dict[str, Any]) -> None:
    try:
        there = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except ValueError:
        there = {}
    different = [name for name, value in facts.items() if there.get(name) != value]
    if different:
        raise UserError(
            f"{folder} is the beginning of other shards (another {', '.join(different)}); remove it, or give "
            "another folder"
        )


def _records(folder: Path) -> list[dict[str, Any]]:
    """What an earlier call has written of its shards; a line that was cut off counts as not written."""
    records = []
    with suppress(FileNotFoundError):
        for line in (folder / SHARDS).read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and record.keys() >= {
                    "shard",
                    "images",
                    "bytes",
                    "sha256",
                    "left_out",
                }:
                    records.append(record)
    return records


def _is_there(folder: Path, record: dict[str, Any]) -> bool:
    try:
        return (folder / record["shard"]).stat().st_size == record["bytes"]
    except OSError:
        return False


def read_checksums(folder: Path) -> dict[str, str]:
    """sha256 by shard of a folder that :func:`pack` wrote; empty of another one."""
    return {record["shard"]: record["sha256"] for record in _records(folder)}


def sha256(path: Path) -> str:
    """Of a file's content, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def partial(out: str) -> tuple[Path, Path]:
    """Where shards are to be, and where they are until they are whole."""
    final = Path(out).expanduser()
    return final, final.with_name(final.name + ".partial")


def put_whole(temporary: Path, final: Path) -> None:
    """Rename the partial folder. Its index files stay valid: they depend on the shards alone."""
    os.replace(temporary, final)
    fsync_path(final.parent)


def facts_of(source: ImageSource, config: Any) -> dict[str, Any]:
    """What packed shards are a function of: the images and the options but for workers and places."""
    options = {k: v for k, v in asdict(config).items() if k not in ("source", "out", "exclude", "workers")}
    return {"source": source.fingerprint(), **options}


def show_packed(about: Mapping[str, Any], folder: Path) -> None:
    """Print what ``about.json`` of a folder says."""
    size = about["bytes"] / 2**20
    print(f"packed     {about['images']:,} images, {size:,.1f} MiB, {about['shards']:,} shards: {folder}")
    if about["left_out"]:
        print(f"left out   {about['left_out']:,} images, see {folder / 'left-out.jsonl'}")
