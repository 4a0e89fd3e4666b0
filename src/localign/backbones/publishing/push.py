"""Uploads exports to the Hugging Face Hub."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from localign._version import __version__
from localign.backbones.publishing.cards import CARD_FILE, Card, is_own_card, write_card
from localign.backbones.quiet import quiet_hub
from localign.errors import UserError
from localign.text.printing import first_line, printable


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
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    advice = ""
    try:
        with quiet_hub(), _bars_on_terminals_only():
            api = HfApi(library_name="localign", library_version=__version__)
            url = str(api.create_repo(repository, private=private or None, exist_ok=True))
            if private and not api.model_info(repository).private:
                raise UserError("the repository exists and is public, but --private was given")
            keeps_card = api.file_exists(repository, CARD_FILE) and not is_own_card(
                Path(api.hf_hub_download(repository, CARD_FILE))
            )
            names = _names(folder, [*files, *([] if keeps_card else [CARD_FILE])])
            # One commit, so that a repository never holds the card or config of other weights.
            api.create_commit(
                repository,
                [CommitOperationAdd(name, folder / name) for name in names],
                commit_message=f"localign {__version__}",
            )
    except HfHubHTTPError as error:
        status = error.response.status_code
        login = "; log in with `hf auth login`, or set HF_TOKEN to a token that may write there"
        failure, advice = f"the Hub answers {status}", login if status in (401, 403) else ""
        if message := error.server_message:
            failure += f", {message.splitlines()[0]}"
    except Exception as error:  # network, permission and validation errors of several libraries
        failure = first_line(error)
    else:
        return url
    raise UserError(
        f"{repository} was not pushed: {printable(failure)}{advice}; the export in {printable(folder)} is complete"
    )


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    hides = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if hides:
        disable_progress_bars()
    try:
        yield
    finally:
        if hides:
            enable_progress_bars()


def _names(folder: Path, patterns: Sequence[str]) -> list[str]:
    return sorted(
        f.name for f in folder.iterdir() if f.is_file() and any(fnmatch(f.name, p) for p in patterns)
    )
