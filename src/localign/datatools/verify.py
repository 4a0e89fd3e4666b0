"""`localign data verify`: which images do not decode, and which shards are not what was packed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localign.data.decoding import UnreadableImage, decode_image
from localign.data.parallel import in_processes, parts
from localign.data.sources import ImageSource, TarSource
from localign.datatools.packing import read_checksums, sha256
from localign.datatools.reading import encoded, open_files
from localign.files import replace_text
from localign.options.datatools import DataVerifyConfig


@dataclass(frozen=True)
class _Judge:
    source: ImageSource

    def __call__(self, part: tuple[int, int]) -> list[list[str]]:
        """(name, reason) of what does not decode."""
        bad = []
        for index in range(*part):
            name = self.source.name(index)
            try:
                decode_image(encoded(self.source, index), name)
            except UnreadableImage as error:
                bad.append([name, error.reason])
        return bad


def run_verify(config: DataVerifyConfig) -> int:
    """Go through all images, write the list, and print what is bad.

    Returns:
        The exit code: 1 where anything is bad.

    Raises:
        UserError: The source does not exist.
        RunFailure: A process died.
    """
    found = verify_images(config)
    print(f"images     {found['images']:,} decoded, {len(found['bad']):,} bad")
    for name, reason in list(found["bad"].items())[:5]:
        print(f"           {name}: {reason}")
    if found["checked"]:
        print(f"checksums  {found['checked']:,} shards compared, {len(found['shards']):,} differ")
        for name in found["shards"][:5]:
            print(f"           {name}")
    print(f"list       {config.out}, for --exclude")
    return 1 if found["bad"] or found["shards"] else 0


def verify_images(config: DataVerifyConfig) -> dict[str, Any]:
    """Go through all images and write the list.

    Returns:
        ``images``, how many were looked at; ``bad``, reasons by name; ``shards``, names of those whose checksum
        differs; ``checked``, how many have one.

    Raises:
        UserError: The source does not exist.
        RunFailure: A process died.
    """
    source = open_files(config.source)
    items = parts(len(source))
    bad = dict(getattr(source, "unreadable", ()))
    for found in in_processes(_Judge(source), items, len(items), config.processes, "decoding"):
        bad |= {name: reason for name, reason in found}
    shards = list(source.shards) if isinstance(source, TarSource) else []
    sums = {path: known[path.name] for path in shards if path.name in (known := read_checksums(path.parent))}
    found_sums = in_processes(sha256, list(sums), len(sums), config.processes, "checksums")
    wrong = [path.name for path, found in zip(sums, found_sums, strict=True) if found != sums[path]]
    lines = (json.dumps({"path": name, "reason": reason}) + "\n" for name, reason in bad.items())
    path = Path(config.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, "".join(lines))
    return {"images": len(source), "bad": bad, "shards": wrong, "checked": len(sums)}
