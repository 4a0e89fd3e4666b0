"""Opening the model that a command names, and identifying its weights."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download

from localign.backbones.export import CONFIG_FILE
from localign.backbones.quiet import quiet_hub
from localign.errors import UserError
from localign.text.printing import first_line, printable
from localign.text.reading import read_json_object
from localign.vlm.evaluation.localign_model import LocalignModel
from localign.vlm.evaluation.model_base import LazyModel
from localign.vlm.evaluation.transformers_model import TransformersModel
from localign.vlm.model.build import export_folder
from localign.vlm.model.configuration import LocalignVLMConfig
from localign.vlm.model.digests import WEIGHTS_LIST
from localign.vlm.scoring.boxes import BoxFrame

_BLOCK_BYTES = 2**24


def open_model(
    name: str,
    fingerprint: str,
    device: torch.device,
    dtype: torch.dtype,
    frame: BoxFrame | None = None,
    commit: str | None = None,
) -> LazyModel:
    """Open a model without loading its weights.

    Args:
        name: A run folder of ``localign vlm train``, an export, or any image-text-to-text model of transformers.
        fingerprint: See :func:`fingerprint_of`.
        device: Device of the weights.
        dtype: Type of the weights.
        frame: The frame of coordinates in the answers; default the frame that the model declares.
        commit: See :func:`hub_commit`.

    Raises:
        UserError: There is no such model.
    """
    folder = export_folder(name)
    config = _config(name)
    if folder is not None and config.get("model_type") == LocalignVLMConfig.model_type:
        return LocalignModel(folder, fingerprint, device, dtype, frame)
    return TransformersModel(
        name if folder is None else str(folder), fingerprint, device, dtype, frame, commit
    )


def hub_commit(name: str, revision: str | None = None) -> str | None:
    """The commit of a branch, tag or commit of a model on the Hub; None for a folder.

    Args:
        name: See :func:`open_model`.
        revision: Default the main branch.

    Raises:
        UserError: There is no such model or revision, or a folder is given with a revision.
    """
    if export_folder(name) is not None:
        if revision is not None:
            raise UserError(f"--revision selects a revision of a model on the Hub, but {name} is a folder")
        return None
    if Path(name).exists():
        raise UserError(f"{name} does not hold a model: it has no {CONFIG_FILE}")
    # The cache keeps a file in a folder that is named by its commit.
    try:
        with quiet_hub():
            path = Path(hf_hub_download(name, CONFIG_FILE, revision=revision))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load the model {printable(name)}: {first_line(error)}") from None
    return path.parent.name


def fingerprint_of(name: str, commit: str | None = None) -> str:
    """A string that identifies a model's weights and configuration: a hash of its files, or its commit on the Hub.

    Args:
        name: See :func:`open_model`.
        commit: See :func:`hub_commit`; default the commit of the main branch.

    Raises:
        UserError: There is no such model.
    """
    folder = export_folder(name)
    if folder is None:
        return f"{name}@{commit or hub_commit(name)}"
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        is_part = path.is_file() and not path.name.startswith(".") and path.suffix != ".md"
        if is_part and path.name != WEIGHTS_LIST:  # which says nothing that the weights do not
            digest.update(os.fsencode(path.name) + b"\0" + _file_digest(path))
    return digest.hexdigest()


def _file_digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.digest()


def _config(name: str) -> dict[str, Any]:
    """The model's ``config.json``; empty for a model on the Hub."""
    folder = export_folder(name)
    if folder is None:
        return {}
    return read_json_object(folder / CONFIG_FILE)
