"""Digests of an export's weight files."""

from __future__ import annotations

import json
from pathlib import Path

from localign.engine.checkpoints.checksums import FILES, check_files, check_listed, files_info
from localign.errors import UserError
from localign.files import replace_text
from localign.text.printing import printable
from localign.text.reading import read_json_object

WEIGHTS_LIST = "weights.json"
"""Sizes and digests of all safetensors files of the folder. transformers does not read it."""


def write_weights_list(folder: Path) -> None:
    """Write the sizes and digests of a folder's weight files."""
    files = files_info(folder.glob("*.safetensors"))
    replace_text(folder / WEIGHTS_LIST, json.dumps({FILES: files}, indent=1) + "\n")


def check_weights(folder: Path) -> None:
    """Compare weight files with their digests. Folders without digests, such as old ones, are not checked.

    Raises:
        UserError: A file is missing or differs.
    """
    path = folder / WEIGHTS_LIST
    if not path.is_file():
        return
    try:
        files = read_json_object(path).get(FILES)
        check_listed(files)
        problem = check_files(folder, files or {})
    except (OSError, ValueError) as error:
        raise UserError(f"{printable(path)} is damaged: {printable(error)}") from None
    if problem:
        raise UserError(
            f"the weights in {printable(folder)} are damaged: {problem}; copy or export them again "
            f"(delete {WEIGHTS_LIST} if you changed them yourself)"
        )
