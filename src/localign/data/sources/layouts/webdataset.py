"""Samples as the webdataset library defines them: members of a tar file that share a key.

The key is a member's path up to the first dot of its base name, and the rest, in lower case, is its field:
``a/000.jpg`` and ``a/000.seg.png`` are the fields ``jpg`` and ``seg.png`` of the sample ``a/000``. A sample has one
image.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from localign.data.sources.base import SUFFIXES
from localign.data.sources.lists import LABEL_HEADERS, label_text
from localign.errors import UserError
from localign.text.printing import printable

EVERY_FILE = "*"
"""The value of ``--field`` for which every image file is a sample of its own."""
LABEL_FIELDS = ("cls", "json")
MAX_LABEL_BYTES = 2**20
"""Larger .cls and .json members hold no label."""

_PREFERRED = ("jpg", "jpeg", "jpe", "jfif", "webp", "png", "bmp", "gif", "tif", "tiff")
"""Image fields without a further dot, in the order in which they are taken: a label map is rather a PNG than a JPEG."""
_MAP_WORDS = frozenset({
    "seg", "segm", "segmentation", "semantic", "panoptic", "instance", "instances", "mask", "masks", "label", "labels",
    "annotation", "annotations", "depth", "matte", "trimap",
})  # fmt: skip
_MOST_FIELDS = 8
"""A key with more dotted image fields is a file name with dots."""


def split_name(name: str) -> tuple[str, str]:
    """The key and the field of a member; the field is "" if the base name has no dot or begins with one."""
    folder, slash, base = name.rpartition("/")
    stem, _, rest = base.partition(".")
    return (folder + slash + stem, rest.lower()) if stem else (name, "")


def is_image_field(name: str) -> bool:
    """Whether a field is an image by its suffix."""
    return f".{name.rpartition('.')[2]}" in SUFFIXES


def parse_fields(option: str | None) -> tuple[str, ...]:
    """The fields that ``--field`` names, in order; () without the option.

    Raises:
        UserError: The option names no field.
    """
    if option is None:
        return ()
    fields = tuple(part.strip().lstrip(".").lower() for part in option.split(","))
    if not all(fields):
        raise UserError(f"--field names fields such as jpg,png, not {printable(repr(option))}")
    return fields


@dataclass
class Scan:
    """The images of one shard.

    Args:
        shard: The shard's name.
        fields: Image fields to choose from, the first that a sample has; () for the default choice.
    """

    shard: str
    fields: tuple[str, ...] = ()
    names: list[str] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    """(offset, size) of each image, bytes."""
    labels: list[str] = field(default_factory=list)
    """The label of each image's sample, "" without one; filled by :meth:`choose`."""
    problems: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason) of members that look like images but are not, or of the shard itself."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Field -> number of image files that are not a sample's image."""
    companions: set[str] = field(default_factory=set)
    """Dotted image fields that stand beside a plain one."""
    dotted: dict[int, str] = field(default_factory=dict)
    """Number of an image in ``names`` -> its dotted field."""
    found: Counter[str] = field(default_factory=Counter)
    """Field -> number of members, for errors."""
    _label_of: dict[int, str] = field(default_factory=dict)

    def wants(self, name: str) -> bool:
        """Whether a member may be an image."""
        part = split_name(name)[1]
        if len(self.found) < 1000:
            self.found[part] += 1
        return is_image_field(part) if self.fields in ((), (EVERY_FILE,)) else part in self.fields

    def add_label(self, name: str, content: bytes) -> None:
        """Take the label of a ``.cls`` or ``.json`` member; ``.cls`` counts before ``.json``."""
        key, part = split_name(name)
        label = _label(part, content)
        if label and (part == "cls" or hash(key) not in self._label_of):
            self._label_of[hash(key)] = label

    def choose(self) -> None:
        """Keep one image of each sample. Files with equal names are all kept.

        Raises:
            UserError: The samples have several images, and none is the usual one.
        """
        if self.fields != (EVERY_FILE,):
            self._keep(self._chosen())
        keys = (split_name(name)[0] for name in self.names)
        self.labels = [self._label_of.get(hash(key), "") for key in keys] if self._label_of else []

    def _chosen(self) -> list[int]:
        samples: dict[
            int, int | list[int]
        ] = {}  # a list only for samples of several images, which saves memory
        parts = []
        for number, name in enumerate(self.names):
            key, part = split_name(name)
            parts.append(part)
            if (before := samples.setdefault(hash(key), number)) != number:
                samples[hash(key)] = [*([before] if isinstance(before, int) else before), number]
        chosen: list[int] = []
        several: list[frozenset[str]] = []
        for numbers in samples.values():
            group = [numbers] if isinstance(numbers, int) else numbers
            kept = self._image_of(group, parts)
            chosen += kept
            if len(names := frozenset(parts[n] for n in kept)) > 1:
                several.append(names)
        if len(several) > 1 and len(set(several)) == 1 and len(several[0]) <= _MOST_FIELDS:
            listed = ", ".join(sorted(several[0]))
            raise UserError(
                f"the samples of {printable(self.shard)} have several images: {printable(listed)}; choose with "
                f"--field, or give --field '{EVERY_FILE}' if every file is an image of its own"
            )
        chosen.sort()
        self.left_out.update(parts[n] for n in set(range(len(parts))) - set(chosen))
        self.dotted = {
            place: parts[n] for place, n in enumerate(chosen) if not self.fields and "." in parts[n]
        }
        return chosen

    def _image_of(self, group: list[int], parts: Sequence[str]) -> list[int]:
        """The members of one sample that are its image; several if their names are file names with dots."""
        present = {parts[n] for n in group}
        for name in self.fields or _PREFERRED:
            if name in present:
                if not self.fields:
                    self.companions |= {other for other in present if "." in other}
                return [n for n in group if parts[n] == name]
        return [n for n in group if not _is_map(parts[n])]

    def _keep(self, chosen: list[int]) -> None:
        if len(chosen) < len(self.names):
            self.names = [self.names[n] for n in chosen]
            self.places = [self.places[n] for n in chosen]


def _is_map(name: str) -> bool:
    """Whether a dotted field, such as ``seg.png``, is a label map by its words."""
    words = name.rpartition(".")[0].replace("_", ".").replace("-", ".").split(".")
    return not _MAP_WORDS.isdisjoint(words)


def _label(part: str, content: bytes) -> str:
    if part == "cls":
        return content.decode("utf-8", "replace").strip()
    try:
        values: Any = json.loads(content)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(values, dict):
        return ""
    return next((label_text(values[name]) for name in LABEL_HEADERS if name in values), "")


def sort_of(member: tarfile.TarInfo) -> str:
    """What a member is that is no plain file."""
    if member.issparse():
        return "a sparse file"
    if member.islnk():
        return "a hard link"
    return "a link" if member.issym() else "a special file"


def notice_of(left_out: Counter[str]) -> str | None:
    """The line about image files that are not a sample's image, or None."""
    if not left_out:
        return None
    listed = ", ".join(f"{count:,} {printable(name)}" for name, count in left_out.most_common(4))
    more = ", ..." if len(left_out) > 4 else ""
    return f"one image per sample: left out {listed}{more}; --field chooses other fields"


def no_images(shards: int, fields: Sequence[str], found: Iterable[tuple[str, int]]) -> str:
    """The error line for shards without images."""
    what = "the shard holds" if shards == 1 else f"the {shards} shards hold"
    names = ", ".join(printable(name) for name, _ in found if name)
    if not fields:
        return f"{what} no images" + (f"; the fields of their samples are {names}" if names else "")
    return f"{what} no field {' or '.join(map(printable, fields))}; the fields are {names or 'none'}"
