"""The arrays that the report's pictures are drawn from; `localign.pictures` writes them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PICTURES_FILE = "pictures.npz"


def read_pictures(folder: Path) -> tuple[dict[str, NDArray[Any]], str]:
    """The arrays of a run folder's ``pictures.npz``; where there are none, nothing and the reason."""
    path = folder / PICTURES_FILE
    if not path.is_file():
        return {}, f"{PICTURES_FILE} is missing"
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}, ""
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        return {}, f"{PICTURES_FILE} cannot be read ({error})"
