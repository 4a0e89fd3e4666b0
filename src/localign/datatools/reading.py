"""Opens sources of encoded files and reads the files, for all commands on images."""

from __future__ import annotations

import sys

from localign.data.image_source import ImageSource
from localign.data.sources import EncodedSource, ExcludingSource, FolderSource, MixtureSource, open_source
from localign.errors import UserError


def open_files(spec: str, exclude: str | None = None) -> ImageSource:
    """Open a source of encoded files that decodes images in full.

    Raises:
        UserError: The source does not exist or holds no images, or it is a mixture.
    """
    source = open_source(spec, exclude=exclude)
    if isinstance(source, MixtureSource):
        raise UserError(f"{spec} is a mixture; run the command on each of its sources instead")
    inner = source.source if isinstance(source, ExcludingSource) else source
    if isinstance(inner, FolderSource) and inner.notice:
        print(f"data       {inner.notice}", file=sys.stderr)
    return source


def encoded_image(source: ImageSource, index: int) -> bytes:
    """The content of an image's file. Raises UnreadableImage."""
    if isinstance(source, ExcludingSource):
        return encoded_image(source.source, int(source.indices[index]))
    assert isinstance(source, EncodedSource)
    return source.encoded(index)
