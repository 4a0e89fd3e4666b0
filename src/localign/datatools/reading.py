"""Opens sources of encoded files and reads the files, for all commands on images."""

from __future__ import annotations

import sys

from localign.data.image_source import ImageSource
from localign.data.sources import (
    EncodedSource,
    ExcludingSource,
    FolderSource,
    MixtureSource,
    TarSource,
    open_source,
)
from localign.errors import UserError
from localign.options.data import row_group_bytes
from localign.options.datatools import ReadConfig


def open_files(config: ReadConfig, exclude: str | None = None) -> ImageSource:
    """Open a source of encoded files that decodes images in full, and print its notice about images left out.

    Raises:
        UserError: The source does not exist or holds no images, or it is a mixture.
    """
    source = open_source(
        config.source,
        exclude=exclude,
        field=config.field,
        max_group_bytes=row_group_bytes(config.max_row_group_gib),
        allow_outside=config.allow_outside,
    )
    if isinstance(source, MixtureSource):
        raise UserError(f"{config.source} is a mixture; run the command on each of its sources instead")
    inner = source.source if isinstance(source, ExcludingSource) else source
    notice = inner.notice if isinstance(inner, FolderSource) else None
    if isinstance(inner, TarSource):
        notice = inner.index.notice
    if notice:
        print(f"data       {notice}", file=sys.stderr)
    return source


def encoded_image(source: ImageSource, index: int) -> bytes:
    """The content of an image's file. Raises UnreadableImage."""
    if isinstance(source, ExcludingSource):
        return encoded_image(source.source, int(source.indices[index]))
    assert isinstance(source, EncodedSource)
    return source.encoded(index)
