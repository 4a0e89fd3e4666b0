"""Recipes: every published run by name, each a YAML file of a command's options.

A recipe may name another with ``base:`` and then holds only what differs from it; ``command:`` says whose
options they are and ``about:`` what the run is. Files of users are read the same way, so they may build on a
recipe: ``base: align/clip-vit-b``.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from localign.deprecated import with_new_names
from localign.errors import UserError, did_you_mean
from localign.plainyaml import load_options

FOLDER = Path(str(files("localign"))) / "recipes"
_NO_RECIPES = "worlds"


@dataclass(frozen=True)
class Recipe:
    """A config file with its bases."""

    name: str
    """Name of the recipe, or path of the file."""
    values: dict[str, Any]
    """Options, those of the bases included."""
    stated: frozenset[str]
    """Options that the recipe states beyond its outermost base: what makes it another run than that."""
    command: str | None = None
    """Whose options these are; None in a file that does not say."""
    about: str = ""
    """The run in one line."""


def recipe_names() -> list[str]:
    """Names that :func:`read_recipe` knows, general ones first, and numbers in the order of their size."""
    found = (path.relative_to(FOLDER).with_suffix("") for path in FOLDER.rglob("*.yaml"))
    return sorted((p.as_posix() for p in found if p.parts[0] != _NO_RECIPES), key=_in_order)


def _in_order(name: str) -> tuple[int, list[tuple[int, str]]]:
    parts = name.replace("/", "-").split("-")
    return name.count("/"), [(int(p), "") if p.isdigit() else (-1, p) for p in parts]


def read_recipe(name: str | Path, command: str | None = None) -> Recipe:
    """A recipe by name, or any config file by path, with its bases.

    Args:
        name: A path to a file, or one of :func:`recipe_names`.
        command: The command whose options are wanted.

    Raises:
        UserError: Neither file nor recipe, not readable, a circle of bases, or of another command.
    """
    recipe = _read(str(name), None, ())
    if command is not None and recipe.command not in (None, command):
        raise UserError(f"{name} is for `localign {recipe.command}`, not for `localign {command}`")
    return recipe


def _read(name: str, beside: Path | None, seen: tuple[Path, ...]) -> Recipe:
    path = _find(name, beside)
    if path in seen:
        raise UserError(f"{name} is its own base: {' -> '.join(str(p) for p in (*seen, path))}")
    values = with_new_names(read_yaml(path), warn_of=str(path))
    base, command, about = (_text(values.pop(key, None), key, path) for key in ("base", "command", "about"))
    if base is None:
        return Recipe(name, values, frozenset(), command, about or "")
    below = _read(base, path.parent, (*seen, path))
    return Recipe(
        name,
        {**below.values, **values},
        below.stated | values.keys(),
        command or below.command,
        about or below.about,
    )


def _text(value: Any, key: str, path: Path) -> str | None:
    if value is not None and not isinstance(value, str):
        raise UserError(f"{path}: {key} takes a text, not {value!r:.60}")
    return value


def _find(name: str, beside: Path | None) -> Path:
    # A name may be no path at all: too long, of a home that is none, with a zero in it.
    with suppress(OSError, ValueError, RuntimeError):
        path = Path(name).expanduser()
        for candidate in (beside / path if beside else path, FOLDER / f"{name}.yaml"):
            if candidate.is_file():
                return candidate.resolve()
    raise UserError(f"there is no file or recipe {name!r}{did_you_mean(name, recipe_names())}")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of options.

    Raises:
        UserError: The file is not readable, or holds something else.
    """
    try:
        content = load_options(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no options; it needs lines like `lr: 3e-4`")
    return content
