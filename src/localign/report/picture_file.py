"""Reading the arrays of ``pictures.npz``, from which the report draws its pictures."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from localign.results import PICTURES_FILE, Pictures


def read_pictures(folder: Path) -> tuple[Pictures, str]:
    """The arrays of a run folder's ``pictures.npz``, and an empty string; no arrays and the reason if that fails."""
    path = folder / PICTURES_FILE
    if not path.is_file():
        return {}, f"{PICTURES_FILE} is missing"
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}, ""
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        return {}, f"{PICTURES_FILE} cannot be read ({error})"
