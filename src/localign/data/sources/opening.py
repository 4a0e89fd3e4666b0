"""Opens the image source that a ``--data`` value names."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict

from localign.data.image_source import ImageSource
from localign.data.sources.base import SUFFIXES, is_remote, name_of
from localign.data.sources.excluding import ExcludingSource
from localign.data.sources.files import FileListSource, FolderSource
from localign.data.sources.layouts.identity import known_content, read_head
from localign.data.sources.layouts.webdataset import parse_fields
from localign.data.sources.lists import LIST_SUFFIXES
from localign.data.sources.mixture import MixtureSource
from localign.data.sources.parquet import ParquetSource
from localign.data.sources.tar import TarSource
from localign.data.untrusted.walking import FILE, FOLDER, kind_of
from localign.errors import UserError
from localign.text.plainyaml import load_yaml
from localign.text.printing import printable
from localign.text.reading import read_text

TAR, PARQUET = ".tar", ".parquet"
MIXTURE_SUFFIXES = (".yaml", ".yml")
_MAX_SHARDS = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class _MixtureData(TypedDict):
    data: str


class _MixturePart(_MixtureData, total=False):
    """One entry of a mixture file."""

    weight: float
    exclude: str
    field: str


def open_source(
    spec: str,
    *,
    image_size: tuple[int, int] | None = None,
    scaled_decode: bool = True,
    exclude: str | None = None,
    field: str | None = None,
    max_group_bytes: int | None = None,
    allow_outside: bool = False,
) -> ImageSource:
    """Open the source that ``spec`` names:

    - ``scenes`` or ``scenes:<split>``: the built-in scenes.
    - ``.txt``, ``.csv``, ``.tsv`` or ``.jsonl``: a list of files.
    - ``.tar`` or ``.parquet``: one file; a pattern such as ``shards/{000000..000099}.tar`` or
      ``data/train-*.parquet``; or a folder with files of one of these kinds, without images or sub-folders.
    - A URL of such files, such as ``s3://bucket/shards/{000000..000099}.tar``, or of their folder.
    - ``.yaml``: a mixture, see :func:`open_mixture`.
    - Any other folder: the images in it.

    Args:
        spec: The name, as above.
        image_size: (rows, columns) to which images will be resized; scenes are drawn at that size.
        scaled_decode: Decode large JPEGs at reduced size where ``image_size`` allows it. False for crops that
            magnify a small part (random resized crop).
        exclude: A list of the names of images to leave out.
        field: The fields of tar samples, or the columns of parquet files, that hold the image: the first that is there,
            such as ``jpg,png``. ``*``: every image file in tar shards is a sample of its own.
        max_group_bytes: Bytes that a row group of a parquet file may take in memory; default 2 GiB.
        allow_outside: Accept lists with paths, absolute or with ``..``, that lead out of the list's folder.

    Raises:
        UserError: The source does not exist or holds no images, the exclusion list does not match it, or ``field`` is
            given for another kind of source.
    """
    fields = parse_fields(field)
    source = _open(spec, image_size, scaled_decode, fields, max_group_bytes, allow_outside)
    if fields and not isinstance(source, TarSource | ParquetSource):
        raise UserError(f"--field applies to tar shards and parquet files, not to {printable(spec)}")
    return source if exclude is None else ExcludingSource(source, exclude)


def _open(
    spec: str,
    image_size: tuple[int, int] | None,
    scaled_decode: bool,
    fields: tuple[str, ...],
    max_group_bytes: int | None,
    allow_outside: bool,
) -> ImageSource:
    head, colon, split = spec.partition(":")
    if head == "scenes":
        return _open_scenes(split if colon else "train", image_size)
    decode_size = image_size if scaled_decode else None
    if is_remote(spec):
        return _open_shards(_remote_shards(spec), decode_size, fields, max_group_bytes)
    path = Path(spec).expanduser()
    suffix = path.suffix.lower()
    if suffix in MIXTURE_SUFFIXES and not path.is_dir():
        return open_mixture(path, image_size, scaled_decode, max_group_bytes, allow_outside)
    if suffix in LIST_SUFFIXES and not path.is_dir():
        return FileListSource(path, decode_size, allow_outside)
    shards = find_shards(path)
    if not shards and path.is_file():
        what = known_content(read_head(path))
        raise UserError(
            f"{printable(path)} is a file, not a folder of images{f': it is {what}' if what else ''}"
        )
    if not shards:
        return FolderSource(path, decode_size)
    return _open_shards(shards, decode_size, fields, max_group_bytes)


def _open_shards(
    shards: Sequence[Path] | Sequence[str],
    image_size: tuple[int, int] | None,
    fields: tuple[str, ...],
    max_group_bytes: int | None,
) -> ImageSource:
    first = shards[0]
    if PurePosixPath(name_of(str(first))).suffix.lower() == PARQUET:
        return ParquetSource(shards, image_size, fields, max_group_bytes)
    if isinstance(first, Path):
        return TarSource(shards, image_size, fields)
    from localign.data.sources.remote import StreamedTarSource

    return StreamedTarSource([str(url) for url in shards], image_size, fields)


def _remote_shards(spec: str) -> list[str]:
    from localign.data.sources.remote import find_remote

    urls = find_remote(expand_braces(spec), (TAR, PARQUET))
    kinds = {Path(name_of(url)).suffix.lower() for url in urls}
    if kinds not in ({TAR}, {PARQUET}):
        raise UserError(
            f"{spec} matches {', '.join(sorted(kinds))} files; it must match only .tar or only .parquet files"
        )
    return urls


def takes_field(spec: str) -> bool:
    """Whether ``spec`` names tar shards or parquet files, whose images ``--field`` chooses."""
    if is_remote(spec):
        return True
    return spec.partition(":")[0] != "scenes" and bool(find_shards(Path(spec).expanduser()))


def find_shards(path: Path) -> list[Path]:
    """The tar or parquet files that a file, a pattern or a folder names; [] for any other file or folder.

    Raises:
        UserError: A pattern matches no file, or files of more than one kind, or a folder holds both kinds.
    """
    if path.is_dir():
        return _folder_shards(path)
    if path.exists() or not set("{*?[") & set(str(path)):
        return [path] if path.suffix.lower() in (TAR, PARQUET) else []
    found = []
    for name in expand_braces(str(path)):
        matches = sorted(glob.glob(name)) if set("*?[") & set(name) else [name]
        found += [Path(match) for match in matches]
    kinds = {file.suffix.lower() for file in found}
    if not found:
        raise UserError(f"no file matches {path}")
    if kinds not in ({TAR}, {PARQUET}):
        raise UserError(
            f"{path} matches {', '.join(sorted(kinds))} files; it must match only .tar or only .parquet files"
        )
    return found


def _folder_shards(folder: Path) -> list[Path]:
    """The tar or parquet files of a folder; [] if the folder also holds images or folders."""
    shards: dict[str, list[Path]] = {TAR: [], PARQUET: []}
    with os.scandir(folder) as entries:
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith("."):
                continue
            kind = kind_of(entry)
            if kind == FOLDER or (suffix in SUFFIXES and kind == FILE):
                return []
            if suffix in shards and kind == FILE:
                shards[suffix].append(Path(entry.path))
    if shards[TAR] and shards[PARQUET]:
        raise UserError(f"{folder} holds tar and parquet files; name one kind, such as {folder / '*.tar'}")
    return sorted(shards[TAR] or shards[PARQUET])


def expand_braces(pattern: str) -> list[str]:
    """Expand the braces of a pattern: ``{000..012}`` counts with that many digits, ``{a,b}`` lists alternatives.

    Raises:
        UserError: The pattern expands to too many names.
    """
    parts: list[Sequence[str]] = []
    count, at = 1, 0
    for braces in _BRACES.finditer(pattern):
        if (numbers := _RANGE.fullmatch(braces.group(1))) is not None:
            first, last = (int(n) for n in numbers.groups())
            count *= abs(last - first) + 1
            if count > _MAX_SHARDS:
                raise UserError(f"{pattern} expands to more than {_MAX_SHARDS:,} files")
            choices = [f"{n:0{len(numbers.group(1))}}" for n in range(first, last + 1)]
        else:
            choices = braces.group(1).split(",")
        parts += [[pattern[at : braces.start()]], choices]
        at = braces.end()
    return ["".join(names) for names in itertools.product(*parts, [pattern[at:]])]


def open_mixture(
    file: Path,
    image_size: tuple[int, int] | None = None,
    scaled_decode: bool = True,
    max_group_bytes: int | None = None,
    allow_outside: bool = False,
) -> MixtureSource:
    """Open the mixture that a YAML file describes. Its paths are relative to the file::

        mixture:
          - {data: photos, weight: 0.7, exclude: bad.jsonl}
          - {data: "shards/*.tar", weight: 0.3}

    Weights are relative. Without weights, every image of every source comes equally often.

    Raises:
        UserError: The file or a source does not exist, or the file does not describe a mixture.
    """
    parts = _read_mixture(file)
    weights = [part["weight"] for part in parts if "weight" in part]
    if weights and len(weights) < len(parts):
        raise UserError(
            f"{file} gives a weight to some of its sources; give a weight to all sources or to none"
        )
    sources = []
    for part in parts:
        exclude = part.get("exclude")
        sources.append(
            open_source(
                _relative_to(file, part["data"]),
                image_size=image_size,
                scaled_decode=scaled_decode,
                exclude=None if exclude is None else _relative_to(file, exclude),
                field=part.get("field"),
                max_group_bytes=max_group_bytes,
                allow_outside=allow_outside,
            )
        )
    titles = [part["data"] for part in parts]
    return MixtureSource(sources, weights or None, titles)


def _read_mixture(file: Path) -> list[_MixturePart]:
    try:
        content = load_yaml(read_text(file))
    except ValueError as error:
        raise UserError(f"{printable(file)} is not YAML: {printable(error)}") from None
    parts = content.get("mixture") if isinstance(content, dict) and len(content) == 1 else None
    kinds: dict[str, Any] = {"data": str, "weight": (int, float), "exclude": str, "field": str}
    for part in parts if isinstance(parts, list) and parts else [None]:
        if not isinstance(part, dict) or "data" not in part:
            raise UserError(
                f"{file} is not a mixture: `mixture:` is a list of data: PATH, weight: NUMBER, exclude: FILE"
            )
        for key, value in part.items():
            if key not in kinds or not isinstance(value, kinds[key]) or isinstance(value, bool):
                raise UserError(
                    f"{file}: a source of a mixture takes data, weight, exclude and field, not {key}: {value!r}"
                )
        if Path(part["data"]).suffix.lower() in MIXTURE_SUFFIXES:
            raise UserError(f"{file} is a mixture of mixtures; list the sources of {part['data']} instead")
    return parts  # type: ignore[return-value]


def _relative_to(file: Path, path: str) -> str:
    no_path = is_remote(path) or path.partition(":")[0] == "scenes"
    return path if no_path else str(file.parent / Path(path).expanduser())


def _open_scenes(split: str, image_size: tuple[int, int] | None) -> ImageSource:
    from localign.data.scenes import SceneConfig, SceneSource

    if image_size is None:
        return SceneSource(split=split)
    if image_size[0] != image_size[1]:
        raise UserError(
            f"scenes are square; they cannot have an image size of {image_size[0]} x {image_size[1]}"
        )
    return SceneSource(SceneConfig(image_size=image_size[0]), split=split)
