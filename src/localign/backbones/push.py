"""Uploads exports to the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from localign._version import __version__
from localign.backbones.cards import CARD_FILE, Card, is_own_card, write_card
from localign.backbones.quiet import quiet_hub
from localign.errors import UserError
from localign.text.printing import printable


def publish(folder: Path, card: Card, files: Sequence[str], *, private: bool = False) -> None:
    """Write the card of an export, upload the export if the card names a repository, and print both.

    Args:
        folder: The export, complete.
        card: Its card.
        files: As for :func:`push`.
        private: The repository must be private.

    Raises:
        UserError: The upload failed.
    """
    if not write_card(folder, card):
        print(
            f"kept       {printable(folder / CARD_FILE)}, which localign did not write or somebody has edited"
        )
    if card.repository is not None:
        print(f"pushed     {printable(push(folder, card.repository, files, private=private))}")


def push(folder: Path, repository: str, files: Sequence[str], *, private: bool = False) -> str:
    """Upload an export. The repository is created if it does not exist; other files in it stay.

    Args:
        folder: The export.
        repository: ``ORGANISATION/NAME``.
        files: Patterns of the names that localign writes; nothing else is uploaded.
        private: The repository must be private.

    Returns:
        The address of the repository.

    Raises:
        UserError: There is no token, the Hub cannot be reached, or it refuses. The folder stays as it is.
    """
    from huggingface_hub import HfApi

    try:
        with quiet_hub():
            api = HfApi(library_name="localign", library_version=__version__)
            url = str(api.create_repo(repository, private=private or None, exist_ok=True))
            if private and not api.model_info(repository).private:
                raise UserError("the repository exists and is public, but --private was given")
            keeps_card = api.file_exists(repository, CARD_FILE) and not is_own_card(
                Path(api.hf_hub_download(repository, CARD_FILE))
            )
            api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=f"localign {__version__}",
                allow_patterns=[*files, *([] if keeps_card else [CARD_FILE])],
            )
    except Exception as error:  # network, permission and validation errors of several libraries
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{printable(repository)} was not pushed: {printable(reason)}; the export in {printable(folder)} is "
            "complete"
        ) from None
    return url
