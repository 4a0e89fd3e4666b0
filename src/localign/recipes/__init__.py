"""Recipes: every published run by name. A recipe is a YAML file with the options of a command.

``base:`` names another recipe whose options it changes, ``command:`` names the command, and ``about:`` describes the
run. A user's config file has the same format, so it may build on a recipe: ``base: align/clip-vit-b``.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from localign.deprecated import with_new_names
from localign.errors import UserError, did_you_mean
from localign.text.reading import read_yaml

FOLDER = Path(str(files("localign"))) / "recipes"
_NO_RECIPES = "worlds"


@dataclass(frozen=True)
class Recipe:
    """The content of a config file and its bases."""

    name: str
    """Name of the recipe, or path of the file."""
    values: dict[str, Any]
    """Options of the file and of its bases."""
    stated: frozenset[str]
    """Options in the file and its bases, except the outermost base: the options that distinguish it from that base."""
    command: str | None = None
    """The command that the options are for; None if no file names it."""
    about: str = ""
    """A description of the run in one line."""


def recipe_names() -> list[str]:
    """The names of all recipes: general recipes first, and numbers in numerical order."""
    paths = (path.relative_to(FOLDER).with_suffix("") for path in FOLDER.rglob("*.yaml"))
    return sorted((p.as_posix() for p in paths if p.parts[0] != _NO_RECIPES), key=_sort_key)


def _sort_key(name: str) -> tuple[int, list[tuple[int, str]]]:
    parts = name.replace("/", "-").split("-")
    return name.count("/"), [(int(p), "") if p.isdigit() else (-1, p) for p in parts]


def read_recipe(name: str | Path, command: str | None = None) -> Recipe:
    """Read a recipe or a config file, with its bases.

    Args:
        name: Path of a file, or one of :func:`recipe_names`.
        command: The command that the options must be for; None accepts any.

    Raises:
        UserError: There is no such file or recipe, it is not readable, it is its own base, or it is for another
            command.
    """
    recipe = _read(str(name), None, ())
    if command is not None and recipe.command not in (None, command):
        raise UserError(f"{name} is for `localign {recipe.command}`, not for `localign {command}`")
    return recipe


def _read(name: str, beside: Path | None, seen: tuple[Path, ...]) -> Recipe:
    path = _find(name, beside)
    if path in seen:
        raise UserError(f"{name} is its own base: {' -> '.join(str(p) for p in (*seen, path))}")
    values = with_new_names(read_options(path), warn_of=str(path))
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
        raise UserError(f"{path}: {key} must be text, not {value!r:.60}")
    return value


def _find(name: str, beside: Path | None) -> Path:
    # A name may be no valid path: too long, with a null character, or in the home of an unknown user.
    with suppress(OSError, ValueError, RuntimeError):
        path = Path(name).expanduser()
        for candidate in (beside / path if beside else path, FOLDER / f"{name}.yaml"):
            if candidate.is_file():
                return candidate.resolve()
    raise UserError(f"there is no file or recipe {name!r}{did_you_mean(name, recipe_names())}")


def read_options(path: Path) -> dict[str, Any]:
    """Read a YAML file of options.

    Raises:
        UserError: The file is not readable, or is not a mapping.
    """
    content = read_yaml(path, options=True)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no options; it needs lines such as `lr: 3e-4`")
    return content
