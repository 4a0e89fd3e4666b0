"""Packs images into tar shards: in parallel, resumable, with reproducible bytes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from localign.data.decoding import UnreadableImage, decode_image
from localign.data.image_source import ImageSource
from localign.data.parallel import in_processes
from localign.data.sources import SUFFIXES
from localign.data.sources.layouts.packed import SHARDS, ShardRecord, shard_records
from localign.data.sources.tar_index import tar_index, write_portable
from localign.datatools.reading import encoded_image
from localign.engine.checkpoints.data_files import DATA_FILE, differences, load, read_states, save
from localign.errors import UserError
from localign.files import fsync_path, replace_text, replacing
from localign.options.datatools import In21kConfig, ShardConfig
from localign.text.printing import printable
from localign.text.reading import read_json_object

Facts = dict[str, Any]
"""The options and the source fingerprint on which the bytes of the shards depend."""
About = dict[str, Any]
"""Content of ``about.json``: the :data:`Facts`, and as numbers ``images``, ``bytes`` (the total size of the shards),
``shards`` and ``left_out`` (the unreadable images, which are not in the shards)."""

ABOUT, LEFT_OUT = "about.json", "left-out.jsonl"
QUALITY = 92
_NO_FACTS = frozenset({"source", "out", "exclude", "workers", "field", "max_row_group_gib", "allow_outside"})
"""Options that do not change the shards, or that the source's fingerprint covers."""
_JPEG = b"\xff\xd8\xff"
_KINDS = ((_JPEG, ".jpg"), (b"\x89PNG", ".png"), (b"RIFF", ".webp"), (b"GIF8", ".gif"), (b"BM", ".bmp"))


@dataclass(frozen=True)
class Packing:
    """A function that packs one shard; it is sent to worker processes.

    Attributes:
        source: The images.
        order: int64, the indices of the images to pack, in packing order.
        folders: The folder to put in front of each image's name, in packing order; None for no folders.
        per_shard: Images per shard.
        resize: Length of the short side, pixels; None copies the files.
        quality: JPEG quality of resized images, 1..100.
        folder: The output folder.
        with_shards: Put the source's shard in front of each image's file name, because shards repeat names.
    """

    source: ImageSource
    order: NDArray[np.int64]
    folders: Sequence[str] | None
    per_shard: int
    resize: int | None
    quality: int
    folder: Path
    with_shards: bool = False

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-len(self.order) // self.per_shard)

    def __call__(self, number: int) -> ShardRecord:
        """Write one shard and return its record."""
        path = self.folder / f"{number:06}.tar"
        images = 0
        left_out: list[tuple[str, str]] = []
        begin = number * self.per_shard
        with replacing(path) as temporary, tarfile.open(temporary, "w") as tar:
            for place in range(begin, min(begin + self.per_shard, len(self.order))):
                try:
                    name, data = self._member(place)
                except UnreadableImage as error:
                    left_out.append((error.name, error.reason))
                    continue
                member = tarfile.TarInfo(name)  # without owner and time, so that the bytes are reproducible
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

    def with_distinct_names(self) -> Packing:
        """This packing, or one that puts the source's shards in front of file names if their names are not distinct.

        Raises:
            UserError: Two images have the same name in the same shard, or outside of shards.
        """
        if self._first_repeated() is None:
            return self
        packing = replace(self, with_shards=True)
        if (repeated := packing._first_repeated()) is not None:
            place, count = repeated
            name = printable(self.source.name(int(self.order[place])))
            raise UserError(
                f"{count} images would have the same name as another image in the shards, such as {name}; list every "
                "image once, or leave images out with --exclude"
            )
        return packing

    def _first_repeated(self) -> tuple[int, int] | None:
        """The place of an image whose name another image has, and the number of such images; None without."""
        count = len(self.order)
        hashes = np.fromiter(
            (hash(self._name(place, b"")) for place in range(count)), np.int64, count
        )  # millions of strings fill the memory
        _, first, of_name = np.unique(hashes, return_index=True, return_counts=True)
        duplicates = count - len(first)
        return (int(first[of_name > 1].min()), duplicates) if duplicates else None

    def _name(self, place: int, data: bytes) -> str:
        folder = "" if self.folders is None else self.folders[place]
        shard, name = self.source.place(int(self.order[place]))
        return member_name(name, folder, data, shard if self.with_shards else "")

    def _member(self, place: int) -> tuple[str, bytes]:
        index = int(self.order[place])
        name, data = self.source.name(index), encoded_image(self.source, index)
        if self.resize is not None:
            data = shrink(data, name, self.resize, self.quality)
        return self._name(place, data), data


def shrink(data: bytes, name: str, side: int, quality: int) -> bytes:
    """Resize an image to a short side of ``side`` pixels, as JPEG. A file with a shorter side is returned unchanged.

    Raises:
        UnreadableImage: The image cannot be decoded.
    """
    image = decode_image(data, name, at_least=2 * side)  # decoding leaves at least a factor of 2 to Lanczos
    short = min(image.size)
    if short <= side:
        return data
    size = [max(1, round(n * side / short)) for n in image.size]
    file = io.BytesIO()
    image.resize((size[0], size[1]), Image.Resampling.LANCZOS).save(file, "JPEG", quality=quality)
    return file.getvalue()


def member_name(name: str, folder: str, data: bytes, shard: str = "") -> str:
    """A member's name in a shard: a relative path without ``..``, with the suffix of the file's format.

    Args:
        name: The image's name in its source.
        folder: The folder to put in front, or "".
        data: The content of the file.
        shard: The shard to put in front of the file name, or "". It adds no folder, because folders are classes, and no
            dot, because a sample's key ends at the first dot.
    """
    path = re.sub(r"\.parquet:", "/", name)
    if shard:
        folders, slash, base = path.rpartition("/")
        prefix = re.sub(r"[./]+", "_", shard.removesuffix(".tar").strip("./"))
        path = f"{folders}{slash}{prefix}-{base}"
    parts = [part for part in (*folder.split("/"), *path.split("/")) if part not in ("", ".", "..")]
    path = "/".join(parts)
    suffix = PurePosixPath(path).suffix.lower()
    kind = next((kind for magic, kind in _KINDS if data.startswith(magic)), "")
    jpeg = suffix in (".jpg", ".jpeg", ".jpe", ".jfif")
    if suffix not in SUFFIXES or (kind == ".jpg" and not jpeg):
        return path + (kind or ".jpg")
    return path


def pack(packing: Packing, processes: int, facts: Facts) -> About:
    """Write all shards that an interrupted call has not written yet, and the files that describe them.

    Args:
        packing: Packs one shard; its folder is the ``*.partial`` folder.
        processes: Worker processes; 0 packs in this process.
        facts: The facts on which the shards depend; a partial folder with other facts is refused.

    Returns:
        The content of ``about.json``.

    Raises:
        UserError: The folder holds shards with other facts, or two images have the same name.
        RunFailure: A worker process died.
    """
    folder = packing.folder
    packing = packing.with_distinct_names()
    folder.mkdir(parents=True, exist_ok=True)
    _check_facts(folder, facts)
    check_same_files(folder, packing.source)
    if not (folder / DATA_FILE).exists():
        save(folder, read_states(packing.source.data_files()))
    done = {record["shard"]: record for record in shard_records(folder) if _is_complete(folder, record)}
    replace_text(folder / SHARDS, "".join(json.dumps(r) + "\n" for r in done.values()))
    replace_text(folder / ABOUT, json.dumps(facts, indent=1) + "\n")
    missing = [number for number in range(packing.shards) if f"{number:06}.tar" not in done]
    with open(folder / SHARDS, "a", encoding="utf-8") as log:
        for record in in_processes(packing, missing, len(missing), processes, "packing"):
            done[record["shard"]] = record
            log.write(json.dumps(record) + "\n")
            log.flush()
    records = [done[f"{number:06}.tar"] for number in range(packing.shards)]
    return _finish(folder, records, facts)


def _finish(folder: Path, records: list[ShardRecord], facts: Facts) -> About:
    left_out = [entry for record in records for entry in record["left_out"]]
    paths = [folder / record["shard"] for record in records]
    write_portable(folder, tar_index(paths), paths)
    counts = {
        "images": sum(record["images"] for record in records),
        "bytes": sum(record["bytes"] for record in records),
        "shards": len(records),
        "left_out": len(left_out),
    }
    about: About = facts | counts
    lines = (json.dumps({"path": name, "reason": reason}) + "\n" for name, reason in left_out)
    replace_text(folder / LEFT_OUT, "".join(lines))
    replace_text(folder / SHARDS, "".join(json.dumps(record) + "\n" for record in records))
    replace_text(folder / ABOUT, json.dumps(about, indent=1) + "\n")
    return about


def _check_facts(folder: Path, facts: Facts) -> None:
    if not (folder / ABOUT).exists():
        return
    found: Mapping[str, Any] = {}
    with suppress(UserError):
        found = read_json_object(folder / ABOUT)
    different = [name for name, value in facts.items() if found.get(name) != value]
    if different:
        raise UserError(
            f"{folder} holds unfinished shards that differ in {', '.join(different)}; remove it, or give another "
            "folder"
        )


def check_same_files(folder: Path, source: ImageSource) -> None:
    """Refuse to go on with shards of a source whose files have changed since.

    Raises:
        UserError: Files differ; the line names them.
    """
    saved = load(folder)
    if saved is not None and (parts := differences(saved, source.data_files())):
        raise UserError(
            f"the source of the shards in {printable(folder)} changed since they were begun: {'; '.join(parts)}; "
            "remove the folder, or give another folder"
        )


def _is_complete(folder: Path, record: ShardRecord) -> bool:
    try:
        return (folder / record["shard"]).stat().st_size == record["bytes"]
    except OSError:
        return False


def read_checksums(folder: Path) -> dict[str, str]:
    """Shard name -> sha256 for a folder that :func:`pack` wrote; {} for any other folder."""
    return {record["shard"]: record["sha256"] for record in shard_records(folder)}


def sha256(path: Path) -> str:
    """The SHA-256 checksum of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def output_folders(out: str) -> tuple[Path, Path]:
    """The final folder, and the ``*.partial`` folder that holds the shards until packing is complete."""
    final = Path(out).expanduser()
    return final, final.with_name(final.name + ".partial")


def publish(partial: Path, final: Path) -> None:
    """Rename the partial folder to its final name. Its index stays valid, because it depends only on the shards."""
    os.replace(partial, final)
    fsync_path(final.parent)


def facts_of(source: ImageSource, config: ShardConfig | In21kConfig) -> Facts:
    """The facts on which the shards depend: the source's fingerprint, and all options except paths and workers."""
    options = {k: v for k, v in asdict(config).items() if k not in _NO_FACTS}
    return {"source": source.fingerprint(), **options}


def show_packed(about: Mapping[str, Any], folder: Path) -> None:
    """Print a summary of a folder of packed shards."""
    size = about["bytes"] / 2**20
    print(
        f"packed     {about['images']:,} images, {size:,.1f} MiB, {about['shards']:,} shards: {printable(folder)}"
    )
    if about["left_out"]:
        print(f"left out   {about['left_out']:,} images, see {printable(folder / LEFT_OUT)}")
