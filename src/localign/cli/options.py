"""The options of a command: one for every field of its config class."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from itertools import pairwise
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

UNGROUPED = "Options"
"""Title of the only group of a config class without ``GROUPS``."""
_BARE = {"resume": "must", "print_config": "all"}
"""Options that may stand alone, beside those that are true or false -> what they then mean."""


@dataclass(frozen=True)
class Option:
    """One option, as the command line and config files give it."""

    name: str
    """The field's name, as config files spell it."""
    type: Any
    """The field's annotation."""
    default: Any
    help: str
    """The docstring below the field."""

    @property
    def flag(self) -> str:
        """The option on the command line."""
        return flag(self.name)

    @property
    def members(self) -> tuple[Any, ...]:
        """The alternatives of a union; a tuple of the type itself for other types."""
        return get_args(self.type) if get_origin(self.type) in (Union, UnionType) else (self.type,)

    @property
    def takes_null(self) -> bool:
        """Whether ``null`` is a value of this option."""
        return type(None) in self.members

    @property
    def is_list(self) -> bool:
        """Whether the option takes several words, as in ``--heads linear mlp``."""
        return get_origin(self.type) is tuple and get_args(self.type)[1:] == (...,)

    @property
    def takes_pair(self) -> bool:
        """Whether the option takes two whole numbers, as in ``--image-size 224x336``."""
        return tuple[int, int] in self.members

    @property
    def is_mapping(self) -> bool:
        """Whether the option takes ``name=value`` pairs, as in ``--model-kwargs depth=2``."""
        return get_origin(self.type) is dict

    @property
    def bare(self) -> str | None:
        """The value of the option when it stands alone, as in ``--compile``; None if it needs a value."""
        return "true" if self.type is bool else _BARE.get(self.name)

    @property
    def choices(self) -> tuple[str, ...]:
        """Every value the option takes; empty if there are others."""
        found: list[str] = []
        for member in self.members:
            if member is bool:
                found += ["true", "false"]
            elif get_origin(member) is Literal:
                found += map(str, get_args(member))
            elif member is type(None):
                found.append("null")
            else:
                return ()
        return tuple(found)

    @property
    def accepted(self) -> str:
        """The values that the option takes, for an error line: ``int, null`` or ``one of [a, b]``."""
        return ", ".join(_accepted(member) for member in self.members)

    @property
    def metavar(self) -> str:
        """A value of the option, for the help: ``INT|null`` or ``{a,b}``."""
        if self.choices:
            return f"{{{','.join(self.choices)}}}"
        return "|".join(_metavar(member) for member in self.members)

    @property
    def shown_default(self) -> str:
        """The default, as a user would type it; empty for null and for nothing."""
        if self.default is None:
            return ""
        if self.is_mapping:
            return " ".join(f"{key}={value}" for key, value in self.default.items())
        if self.is_list:
            return " ".join(self.default)
        return self.default if isinstance(self.default, str) else json.dumps(self.default)


def flag(name: str) -> str:
    """A field's name as an option of the command line."""
    return "--" + name.replace("_", "-")


def options_of(config: type) -> dict[str, Option]:
    """Field name -> option, in the order of the fields of a config class."""
    types, helps = get_type_hints(config), _field_docstrings(config)
    return {
        field.name: Option(field.name, types[field.name], _default(field), helps.get(field.name, ""))
        for field in dataclasses.fields(config)
    }


def groups_of(config: type) -> Mapping[str, Sequence[str]]:
    """Title -> field names: the groups in which the help shows the options of a config class, first things first.

    A class with many options names its groups in ``GROUPS``: title -> names of fields, separated by spaces.
    """
    groups: Mapping[str, str] | None = getattr(config, "GROUPS", None)
    if groups is None:
        return {UNGROUPED: [field.name for field in dataclasses.fields(config)]}
    return {title: names.split() for title, names in groups.items()}


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _field_docstrings(config: type) -> dict[str, str]:
    """Field name -> the docstring below it; a subclass's docstring wins over that of its base."""
    found: dict[str, str] = {}
    for owner in reversed(config.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        for field, below in pairwise(_body(owner)):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                found |= {field.target.id: text} if (text := _text(below)) else {}
    return found


def _body(owner: type) -> list[ast.stmt]:
    """The statements of a class at the top of its module."""
    module = ast.parse(inspect.getsource(sys.modules[owner.__module__]))
    return next(s.body for s in module.body if isinstance(s, ast.ClassDef) and s.name == owner.__name__)


def _text(statement: ast.stmt) -> str | None:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return " ".join(str(statement.value.value).split())
    return None


def _accepted(member: Any) -> str:
    if member is type(None):
        return "null"
    if member == tuple[int, int]:
        return "two as in 224x336"
    if get_origin(member) is Literal:
        return f"one of [{', '.join(map(str, get_args(member)))}]"
    if get_origin(member) is tuple:
        kinds = [_accepted(kind) for kind in get_args(member) if kind is not ...]
        return f"a list of {kinds[0]}" if ... in get_args(member) else f"[{', '.join(kinds)}]"
    return "name=value pairs" if get_origin(member) is dict else member.__name__


def _metavar(member: Any) -> str:
    if get_origin(member) is Literal:
        return "|".join(map(str, get_args(member)))
    if member == tuple[int, int]:
        return "INTxINT"
    if get_origin(member) is tuple:
        kinds = [_metavar(kind) for kind in get_args(member) if kind is not ...]
        return kinds[0] if ... in get_args(member) else f"[{','.join(kinds)}]"
    if get_origin(member) is dict:
        return "NAME=VALUE"
    return {int: "INT", float: "FLOAT", str: "TEXT", type(None): "null"}[member]
