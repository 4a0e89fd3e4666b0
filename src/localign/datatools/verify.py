"""`localign data verify`: finds images that do not decode and shards that differ from their checksums."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from localign.data.decoding import UnreadableImage, decode_image
from localign.data.image_source import ImageSource
from localign.data.parallel import in_processes, parts
from localign.data.sources import TarSource
from localign.datatools.packing import read_checksums, sha256
from localign.datatools.reading import encoded_image, open_files
from localign.files import replace_text
from localign.options.datatools import DataVerifyConfig
from localign.text.printing import printable


class Verification(TypedDict):
    """The result of :func:`verify_images`."""

    images: int
    """Number of images that were decoded."""
    bad: dict[str, str]
    """Name -> reason of each unreadable image."""
    shards: list[str]
    """Names of the shards that differ from their checksums."""
    checked: int
    """Number of shards that have a checksum."""


@dataclass(frozen=True)
class _Verifier:
    source: ImageSource

    def __call__(self, part: tuple[int, int]) -> list[tuple[int, str]]:
        """(index, reason) of the unreadable images in a range of indices."""
        bad = []
        for index in range(*part):
            name = self.source.name(index)
            try:
                decode_image(encoded_image(self.source, index), name)
            except UnreadableImage as error:
                bad.append((index, error.reason))
        return bad


def run_verify(config: DataVerifyConfig) -> int:
    """Verify all images and shards, and print the bad images and shards.

    Returns:
        The exit code: 1 if an image or a shard is bad, else 0.

    Raises:
        UserError: The source does not exist or holds no images.
        RunFailure: A worker process died.
    """
    found = verify_images(config)
    print(f"images     {found['images']:,} decoded, {len(found['bad']):,} bad")
    for name, reason in list(found["bad"].items())[:5]:
        print(f"           {printable(name)}: {printable(reason)}")
    if found["checked"]:
        print(f"checksums  {found['checked']:,} shards compared, {len(found['shards']):,} differ")
        for name in found["shards"][:5]:
            print(f"           {printable(name)}")
    print(f"list       {printable(config.out)}, for --exclude")
    return 1 if found["bad"] or found["shards"] else 0


def verify_images(config: DataVerifyConfig) -> Verification:
    """Decode all images, compare shards with their checksums, and write the list of unreadable images.

    Raises:
        UserError: The source does not exist or holds no images.
        RunFailure: A worker process died.
    """
    source = open_files(config)
    items = parts(len(source))
    entries = {name: {"path": name, "reason": reason} for name, reason in source.unreadable}
    for found in in_processes(_Verifier(source), items, len(items), config.processes, "decoding"):
        for index, reason in found:
            shard, name = source.place(index)
            entries[source.name(index)] = {
                "path": name,
                **({"shard": shard} if shard else {}),
                "reason": reason,
            }
    bad = {name: entry["reason"] for name, entry in entries.items()}
    shards = source.shards if isinstance(source, TarSource) else ()
    folders = {path.parent: read_checksums(path.parent) for path in shards}
    expected = {path: sums[path.name] for path in shards if path.name in (sums := folders[path.parent])}
    actual = in_processes(sha256, list(expected), len(expected), config.processes, "checksums")
    wrong = [path.name for path, checksum in zip(expected, actual, strict=True) if checksum != expected[path]]
    lines = (json.dumps(entry) + "\n" for entry in entries.values())
    path = Path(config.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, "".join(lines))
    return {"images": len(source), "bad": bad, "shards": wrong, "checked": len(expected)}
