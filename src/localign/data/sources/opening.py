"""From what ``--data`` names to a source."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from localign.data.sources.base import SUFFIXES, ImageSource, is_remote
from localign.data.sources.excluding import ExcludingSource
from localign.data.sources.files import LIST_SUFFIXES, FileListSource, FolderSource
from localign.data.sources.mixture import MixtureSource
from localign.data.sources.parquet import ParquetSource
from localign.data.sources.tar import TarSource
from localign.errors import UserError
from localign.plainyaml import load_yaml

TAR, PARQUET = ".tar", ".parquet"
MIXTURE_SUFFIXES = (".yaml", ".yml")
_MOST_SHARDS = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def open_source(
    spec: str,
    *,
    image_size: tuple[int, int] | None = None,
    scaled_decode: bool = True,
    exclude: str | None = None,
) -> ImageSource:
    """The source a run's config names.

    - ``scenes`` or ``scenes:<split>``.
    - A list of files: ``.txt``, ``.csv`` or ``.jsonl``.
    - Tar shards or parquet files: one of them; a pattern such as ``shards/{000000..000099}.tar`` or
      ``data/train-*.parquet``; or a folder that holds nothing else at its top.
    - Such shards or files by their address, such as ``s3://bucket/shards/{000000..000099}.tar`` or the folder's.
    - A mixture, ``.yaml``: see :func:`open_mixture`.
    - Any other folder: the images in it.

    Args:
        spec: One of these.
        image_size: (rows, columns) the images will be brought to; scenes are drawn in that size.
        scaled_decode: Decode large JPEGs at a fraction where ``image_size`` allows it. Crops that magnify a
            small part (random resized crop) want False.
        exclude: A list of images to leave out, by their names in the source.

    Raises:
        UserError: The source does not exist or holds no images, or the list does not go with it.
    """
    source = _open(spec, image_size, scaled_decode)
    return source if exclude is None else ExcludingSource(source, exclude)


def _open(spec: str, image_size: tuple[int, int] | None, scaled_decode: bool) -> ImageSource:
    head, colon, split = spec.partition(":")
    if head == "scenes":
        return _open_scenes(split if colon else "train", image_size)
    decode_size = image_size if scaled_decode else None
    if is_remote(spec):
        return _open_remote(spec, decode_size)
    path = Path(spec).expanduser()
    suffix = path.suffix.lower()
    if suffix in MIXTURE_SUFFIXES and not path.is_dir():
        return open_mixture(path, image_size, scaled_decode)
    if suffix in LIST_SUFFIXES and not path.is_dir():
        return FileListSource(path, decode_size)
    shards = find_shards(path)
    if not shards:
        return FolderSource(path, decode_size)
    return (TarSource if shards[0].suffix.lower() == TAR else ParquetSource)(shards, decode_size)


def _open_remote(spec: str, image_size: tuple[int, int] | None) -> ImageSource:
    from localign.data.sources.remote import StreamedTarSource, find_remote, name_of

    urls = find_remote(expanded(spec), (TAR, PARQUET))
    kinds = {Path(name_of(url)).suffix.lower() for url in urls}
    if kinds not in ({TAR}, {PARQUET}):
        raise UserError(
            f"{spec} stands for {', '.join(sorted(kinds))} files; it must be .tar or .parquet alone"
        )
    return (StreamedTarSource if kinds == {TAR} else ParquetSource)(urls, image_size)


def find_shards(path: Path) -> list[Path]:
    """The tar or parquet files that a file, a pattern or a folder stands for; none of another folder.

    Raises:
        UserError: A pattern that no file fits, or one that other files fit too.
    """
    if path.is_dir():
        return _shards_alone(path)
    if path.exists() or not set("{*?[") & set(str(path)):
        return [path] if path.suffix.lower() in (TAR, PARQUET) else []
    found = []
    for name in expanded(str(path)):
        matches = sorted(glob.glob(name)) if set("*?[") & set(name) else [name]
        found += [Path(match) for match in matches]
    kinds = {file.suffix.lower() for file in found}
    if not found:
        raise UserError(f"no file is called like {path}")
    if kinds not in ({TAR}, {PARQUET}):
        raise UserError(
            f"{path} stands for {', '.join(sorted(kinds))} files; it must be .tar or .parquet alone"
        )
    return found


def _shards_alone(folder: Path) -> list[Path]:
    """The shards of one kind in a folder that holds neither images nor folders beside them."""
    shards: dict[str, list[Path]] = {TAR: [], PARQUET: []}
    with os.scandir(folder) as entries:
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith("."):
                continue
            if suffix in SUFFIXES or entry.is_dir():
                return []
            if suffix in shards:
                shards[suffix].append(Path(entry.path))
    if shards[TAR] and shards[PARQUET]:
        raise UserError(f"{folder} holds tar and parquet files; name one kind, as in {folder / '*.tar'}")
    return sorted(shards[TAR] or shards[PARQUET])


def expanded(pattern: str) -> list[str]:
    """A pattern without its braces: ``{000..012}`` counts, with as many digits; ``{a,b}`` lists.

    Raises:
        UserError: It stands for too many names.
    """
    parts: list[Sequence[str]] = []
    count, at = 1, 0
    for braces in _BRACES.finditer(pattern):
        if (numbers := _RANGE.fullmatch(braces.group(1))) is not None:
            first, last = (int(n) for n in numbers.groups())
            count *= abs(last - first) + 1
            if count > _MOST_SHARDS:
                raise UserError(f"{pattern} stands for more than {_MOST_SHARDS:,} files")
            choices = [f"{n:0{len(numbers.group(1))}}" for n in range(first, last + 1)]
        else:
            choices = braces.group(1).split(",")
        parts += [[pattern[at : braces.start()]], choices]
        at = braces.end()
    return ["".join(names) for names in itertools.product(*parts, [pattern[at:]])]


def open_mixture(
    file: Path, image_size: tuple[int, int] | None = None, scaled_decode: bool = True
) -> MixtureSource:
    """The mixture that a YAML file describes, whose paths are relative to it::

        mixture:
          - {data: photos, weight: 0.7, exclude: bad.jsonl}
          - {data: "shards/*.tar", weight: 0.3}

    Weights are relative to one another. Without any, every image of every source comes equally often.

    Raises:
        UserError: The file or a source does not exist, or it says something else.
    """
    parts = _parts_of(file)
    weights = [part["weight"] for part in parts if "weight" in part]
    if weights and len(weights) < len(parts):
        raise UserError(f"{file} gives a weight to some of its sources; give one to each, or to none")
    sources = []
    for part in parts:
        exclude = part.get("exclude")
        sources.append(
            open_source(
                _beside(file, part["data"]),
                image_size=image_size,
                scaled_decode=scaled_decode,
                exclude=None if exclude is None else _beside(file, exclude),
            )
        )
    titles = [part["data"] for part in parts]
    return MixtureSource(sources, weights or None, titles)


def _parts_of(file: Path) -> list[dict[str, Any]]:
    try:
        content = load_yaml(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the mixture {file}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file} is not YAML: {error}") from None
    parts = content.get("mixture") if isinstance(content, dict) and len(content) == 1 else None
    kinds: dict[str, Any] = {"data": str, "weight": (int, float), "exclude": str}
    for part in parts if isinstance(parts, list) and parts else [None]:
        if not isinstance(part, dict) or "data" not in part:
            raise UserError(
                f"{file} is no mixture: `mixture:` is a list of data: PATH, weight: NUMBER, exclude: FILE"
            )
        for key, value in part.items():
            if key not in kinds or not isinstance(value, kinds[key]) or isinstance(value, bool):
                raise UserError(
                    f"{file}: a source of a mixture has data, weight and exclude, not {key}: {value!r}"
                )
        if Path(part["data"]).suffix.lower() in MIXTURE_SUFFIXES:
            raise UserError(f"{file} is a mixture of mixtures; list their sources in it")
    return parts  # type: ignore[return-value]


def _beside(file: Path, path: str) -> str:
    elsewhere = is_remote(path) or path.partition(":")[0] == "scenes"
    return path if elsewhere else str(file.parent / Path(path).expanduser())


def _open_scenes(split: str, image_size: tuple[int, int] | None) -> ImageSource:
    from localign.data.scenes import SceneConfig, SceneSource

    if image_size is None:
        return SceneSource(split=split)
    if image_size[0] != image_size[1]:
        raise UserError(f"scenes are square; the image size asked for is {image_size[0]} x {image_size[1]}")
    return SceneSource(SceneConfig(image_size=image_size[0]), split=split)
