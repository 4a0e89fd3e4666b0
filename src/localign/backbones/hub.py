"""Finds the folder of a model: on this machine, or in the cache of the model hub."""

from __future__ import annotations

import re
from pathlib import Path

from localign.backbones.export import CONFIG_FILE, export_folder
from localign.backbones.quiet import quiet_hub
from localign.errors import UserError
from localign.text.printing import first_line, printable

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_CONFIGS = ["config.json", "preprocessor_config.json", "*.index.json"]
_SAFETENSORS, _TORCH = "*.safetensors", "pytorch_model*.bin"


def model_folder(name: str) -> Path | None:
    """The folder that holds a model's ``config.json``.

    Args:
        name: A folder, a run folder (its export is taken), or a repository ``organisation/model`` of the model hub,
            which is downloaded.

    Returns:
        The folder; None if the name is neither, such as a name of timm's.

    Raises:
        UserError: The folder has no ``config.json``, or the repository cannot be downloaded.
    """
    if Path(name).is_dir():
        folder = export_folder(name)
        if not (folder / CONFIG_FILE).is_file():
            raise UserError(f"{printable(name)} holds no model: it has no {CONFIG_FILE}")
        return folder
    return download(name) if _REPOSITORY.fullmatch(name) and not Path(name).exists() else None


def download(repository: str) -> Path:
    """Download the configuration and weights of a repository into the hub's cache; nothing else, and no code.

    Raises:
        UserError: The repository does not exist, needs a login, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    try:
        with quiet_hub():
            folder = Path(snapshot_download(repository, allow_patterns=[*_CONFIGS, _SAFETENSORS]))
            if not any(folder.glob(_SAFETENSORS)):
                folder = Path(snapshot_download(repository, allow_patterns=[*_CONFIGS, _TORCH]))
    except Exception as error:  # network, permission and cache errors of several libraries
        raise UserError(
            f"{repository} cannot be downloaded from the model hub: {first_line(error)}; give a folder that holds it"
        ) from None
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{repository} holds no model: it has no {CONFIG_FILE}")
    return folder
