"""Image sources: folders, lists, tar shards, parquet files, mixtures of these, and the built-in scenes."""

from localign.data.decoding import UnreadableImage, read_image, to_rgb
from localign.data.image_source import ImageSource
from localign.data.sources.base import (
    DECODE_HEADROOM,
    SUFFIXES,
    EncodedSource,
)
from localign.data.sources.excluding import ExcludingSource
from localign.data.sources.files import FileListSource, FolderSource
from localign.data.sources.mixture import MixtureSource
from localign.data.sources.opening import open_source
from localign.data.sources.parquet import ParquetSource
from localign.data.sources.tar import TarSource

__all__ = [
    "DECODE_HEADROOM",
    "SUFFIXES",
    "EncodedSource",
    "ExcludingSource",
    "FileListSource",
    "FolderSource",
    "ImageSource",
    "MixtureSource",
    "ParquetSource",
    "TarSource",
    "UnreadableImage",
    "open_source",
    "read_image",
    "to_rgb",
]
