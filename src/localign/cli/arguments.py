"""The words after a command: which of them belong to which option."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from localign.cli.options import Option, flag, options_of
from localign.deprecated import warn
from localign.errors import UserError, did_you_mean
from localign.text.plainyaml import load_options

HELP = ("-h", "--help")


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """Options that every command takes beside its own."""

    config: str = ""
    """YAML file of the options below, or a name of `localign list recipes`; options on the command line win."""
    print_config: Literal["all", "skip_default", "skip_unset"] | None = None
    """Print the options as a YAML file for --config, and stop. skip_default leaves out the options that have their
    default value, skip_unset the options that are null."""


FILE_OPTIONS = options_of(FileOptions)


@dataclass(frozen=True)
class Arguments:
    """A command line, taken apart."""

    files: tuple[str, ...]
    """Files and recipes, in order."""
    given: Mapping[str, Any]
    """Field -> text; a list of texts for an option that takes several words; a mapping for ``name=value`` pairs."""
    items: Mapping[str, Mapping[str, Any]]
    """Field -> the pairs that are added to its mapping, as ``--model-kwargs.depth 2`` adds one."""
    help: bool
    print_config: str | None


class _Reader:
    """Takes one command line apart, from left to right."""

    def __init__(
        self,
        words: Sequence[str],
        options: Mapping[str, Option],
        positional: Sequence[str],
        renamed: Mapping[str, str],
    ) -> None:
        self.rest = list(words)
        self.options = {**FILE_OPTIONS, **options}
        self.positional = list(positional)
        self.renamed = {old: new for old, new in renamed.items() if old not in options and new in options}
        self.spelt: dict[str, str] = {}
        self.files: list[str] = []
        self.given: dict[str, Any] = {}
        self.items: dict[str, dict[str, Any]] = {}
        self.help = False

    def read(self) -> Arguments:
        while self.rest:
            word = self.rest.pop(0)
            if word.partition("=")[0] in HELP:
                self.help = True
            elif word.startswith("--"):
                self._read_option(word)
            else:
                self._read_positional(word)
        print_config = self.given.pop("print_config", None)
        return Arguments(tuple(self.files), self.given, self.items, self.help, print_config)

    def _read_positional(self, word: str) -> None:
        if not self.positional or word.startswith("-"):
            raise UserError(f"unexpected argument {word!r}")
        option = self.options[self.positional.pop(0)]
        words = [word]
        while option.is_list and self.rest and not self.rest[0].startswith("-"):
            words.append(self.rest.pop(0))
        self.given[option.name] = _value(option, option.name, words)

    def _read_option(self, word: str) -> None:
        spelt, equals, value = word.partition("=")
        option, key = self._find(spelt)
        words = [value] if equals else self._words(several=option.is_list or (option.is_mapping and not key))
        if key:
            pair = _mapping(spelt, [f"{key}={word}" for word in words])
            self.items.setdefault(option.name, {}).update(pair)
        elif option.name == "config":
            self.files.append(_value(option, spelt, words))
        else:
            self.given[option.name] = _value(option, spelt, words)

    def _find(self, spelt: str) -> tuple[Option, str]:
        """The option, and the key of ``--model-kwargs.depth``; empty without one."""
        name, _, key = spelt[2:].replace("-", "_").partition(".")
        option = self.options.get(self.renamed.get(name, name))
        if option is None or (key and not option.is_mapping):
            known = [*map(flag, self.options), HELP[1]]
            raise UserError(f"unknown option {flag(spelt[2:])}{did_you_mean(flag(spelt[2:]), known)}")
        if name in self.renamed:
            warn(flag(name), option.flag)
        if (before := self.spelt.setdefault(option.name, name)) != name:
            raise UserError(f"{flag(before)} and {flag(name)} are names of the same option; give one of them")
        return option, key

    def _words(self, several: bool) -> list[str]:
        """The words up to the next option: as many as there are, or one."""
        words: list[str] = []
        while self.rest and not self.rest[0].startswith("--") and (several or not words):
            words.append(self.rest.pop(0))
        return words


def read_arguments(
    words: Sequence[str],
    options: Mapping[str, Option],
    positional: Sequence[str] = (),
    renamed: Mapping[str, str] | None = None,
) -> Arguments:
    """Take a command line apart.

    ``--model-kwargs depth=2 img_size=96`` becomes a mapping, ``--heads transformer linear`` a list; the other values
    stay text.

    Args:
        words: The words after the command.
        options: The command's, by field.
        positional: Fields that may be given without the option's name, in order.
        renamed: Old name of a field -> its name; the old one is taken with a warning.

    Raises:
        UserError: An unknown or abbreviated option, a word too many, or an option without a value.
    """
    return _Reader(words, options, positional, renamed or {}).read()


def _value(option: Option, spelt: str, words: list[str]) -> Any:
    if option.is_mapping:
        return _mapping(spelt, words)
    if option.is_list:
        return _list(spelt, words)
    if not words and option.bare is None:
        raise UserError(f"{spelt} needs a value")
    return words[0] if words else option.bare


def _list(spelt: str, words: list[str]) -> Any:
    """Words separated by spaces or commas; or one word with a list of YAML, as it is."""
    if len(words) == 1 and words[0].startswith("["):
        return words[0]
    parts = [part.strip() for word in words for part in word.split(",") if part.strip()]
    if not parts:
        raise UserError(f"{spelt} needs a value")
    return parts


def _mapping(spelt: str, words: list[str]) -> Any:
    """Pairs separated by spaces or commas; or one word with a mapping of YAML, as it is."""
    if len(words) == 1 and words[0].startswith("{"):
        return words[0]
    pairs = [part.partition("=") for word in words for part in word.split(",") if part]
    if not pairs or any(not equals or not key for key, equals, _ in pairs):
        raise UserError(f"{spelt} takes name=value pairs, for example depth=2")
    return {key: _yaml(spelt, key, value) for key, _, value in pairs}


def _yaml(spelt: str, key: str, value: str) -> Any:
    try:
        return load_options(value)
    except ValueError as error:
        raise UserError(f"{spelt}: the value of {key} is not readable YAML: {error}") from error
