"""What the commands on images share: opening a source of encoded files, and reading them."""

from __future__ import annotations

from localign.data.sources import EncodedSource, ExcludingSource, ImageSource, MixtureSource, open_source
from localign.errors import UserError


def open_files(spec: str, exclude: str | None = None) -> ImageSource:
    """A source whose images are encoded files, in full size.

    Raises:
        UserError: There is none, or it is a mixture.
    """
    source = open_source(spec, exclude=exclude)
    if isinstance(source, MixtureSource):
        raise UserError(f"{spec} is a mixture; give its sources one at a time")
    return source


def encoded(source: ImageSource, index: int) -> bytes:
    """The file of an image. Raises UnreadableImage."""
    if isinstance(source, ExcludingSource):
        return encoded(source.source, int(source.kept[index]))
    assert isinstance(source, EncodedSource)
    return source.encoded(index)
