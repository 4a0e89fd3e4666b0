"""Loading parts of models with transformers: no foreign code runs, and a folder reaches no network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from localign.backbones.quiet import quiet_hub
from localign.errors import UserError
from localign.text.printing import first_line, printable
from localign.text.reading import read_json_object

T = TypeVar("T")
_KERNELS = ("attn_implementation", "experts_implementation")
"""Keys of configs whose value may name a repository, whose code transformers would download and run."""


def load_pretrained(
    load: Callable[..., T], source: str | Path, *, failure: str = "cannot load the model", **options: Any
) -> T:
    """Call a ``from_pretrained`` of transformers.

    Args:
        load: The method.
        source: A folder, of which nothing outside is read, or a name on the Hub.
        failure: Begins the error line, before the source.
        options: Further arguments of the method.

    Raises:
        UserError: It cannot be loaded, or only with code of its own.
    """
    local = Path(source).is_dir()
    if local:
        check_local_config(Path(source))
    try:
        with quiet_hub():
            return load(source, trust_remote_code=False, local_files_only=local, **options)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # transformers and tokenizers raise nearly anything on damaged files
        raise UserError(f"{failure} {printable(source)}: {first_line(error)}") from None


def check_local_config(folder: Path) -> None:
    """Check that a folder's ``config.json`` names no code on the Hub.

    Raises:
        UserError: It does, or it cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        return
    for key, value in _entries(read_json_object(path)):
        if key.lstrip("_") in _KERNELS and any("/" in str(v) for v in _values(value)):
            raise UserError(f"{printable(path)}: {printable(key)} names code on the Hub ({printable(value)})")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from value.items()
    for inner in _values(value):
        if isinstance(inner, dict | list):
            yield from _entries(inner)


def _values(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else [value]
