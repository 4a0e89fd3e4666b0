"""Loading parts of models with transformers: no foreign code runs, and a folder reaches no network."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def without_load_report() -> Iterator[None]:
    """Suppress transformers' table of tensors that do not fit; our error names them."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_no_load_report)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_load_report)


def _is_no_load_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def check_coverage(source: str | os.PathLike[str], total: int, info: dict[str, Any]) -> None:
    """Check that weights covered a model exactly.

    Args:
        source: Named in the error.
        total: Number of the model's tensors.
        info: What ``from_pretrained`` returns with ``output_loading_info=True``.

    Raises:
        UserError: Tensors are missing, unexpected or of the wrong shape.
    """
    missing = set(info["missing_keys"])
    reshaped = {name for name, *_ in info["mismatched_keys"]}
    problems = {
        f"{len(missing)} of {total} tensors are missing": missing,
        "unexpected tensors": set(info["unexpected_keys"]),
        "tensors of the wrong shape": reshaped,
    }
    lines = [f"{problem} ({_list_names(names)})" for problem, names in problems.items() if names]
    if lines:
        raise UserError(f"the weights in {source} do not fit the model: {'; '.join(lines)}")


def _list_names(names: set[str], limit: int = 5) -> str:
    listed = ", ".join(sorted(names)[:limit])
    return listed if len(names) <= limit else f"{listed} and {len(names) - limit} more"
