"""Every command line, option, file and address of README and the site exists."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
from docs_text import README, ROOT, command_lines, inline_code, localign_lines, pages

from localign.cli.options import flag, options_of
from localign.cli.parser import command_of, parse
from localign.cli.table import COMMANDS, split_command
from localign.deprecated import new_names
from localign.errors import UserError
from localign.recipes import recipe_names

OTHERS = frozenset(
    flag(name)
    for words in (
        "help config print-config",
        "standalone nproc-per-node nnodes rdzv-backend rdzv-id rdzv-endpoint",
        "signals-to-handle shutdown-timeout max-restarts",
        "signal kill-on-bad-exit gpus-per-task export parent",
        "trust-remote-code model-impl model",
    )
    for name in words.split()
) | {"--model_args", "--include_path"}
"""Options of every command, and of torchrun, SLURM, pkill, vLLM and lmms-eval."""


def known_options() -> frozenset[str]:
    named = {flag(name) for command in COMMANDS.values() for name in options_of(command.config())}
    old = {flag(name) for command in COMMANDS.values() for name in new_names(command.name)}
    return frozenset(named | old) | OTHERS


@pytest.mark.parametrize("page", pages())
def test_commands_parse(page: str) -> None:
    for words in localign_lines(pages()[page]):
        name, rest = split_command(words)
        try:
            assert parse(command_of(name, rest), rest) is not None
        except UserError as error:
            pytest.fail(f"{page}: localign {' '.join(words)}: {error}")


def test_there_are_commands_to_parse() -> None:
    assert sum(len(list(localign_lines(text))) for text in pages().values()) > 40
    assert len(list(localign_lines(pages()["README.md"]))) >= 5


@pytest.mark.parametrize("page", pages())
def test_inline_commands_and_options_exist(page: str) -> None:
    known = known_options()
    for code in inline_code(pages()[page]):
        if code.startswith("localign ") and re.match(r"[a-z]", code.removeprefix("localign ")):
            words = code.split()[1:]
            assert words[0] in {name.split()[0] for name in COMMANDS}, f"{page}: {code}"
        if re.match(r"(localign\s|--[a-z])", code):
            unknown = [o for o in re.findall(r"(?<![\w-])--[a-z][\w-]*", code) if o not in known]
            assert unknown == [], f"{page}: {code}"


@pytest.mark.parametrize("page", pages())
def test_make_targets_recipes_and_scripts_exist(page: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    text = pages()[page]
    called = [words[1] for words in command_lines(text) if words[:1] == ["make"] and len(words) > 1]
    called += [code.split()[1] for code in inline_code(text) if re.match(r"make [a-z]", code)]
    assert [target for target in called if target not in targets] == []
    named = re.findall(r"\b((?:scripts|benchmarks|tests)/[\w/]+\.(?:py|sh|md))\b", text)
    assert [name for name in named if not (ROOT / name).is_file()] == []
    recipes = re.findall(r"`((?:align|table1|table4|vlm|probe)/[\w-]+)`", text)
    folders = {path.name for path in (ROOT / "src" / "localign").rglob("*")}
    assert [r for r in recipes if r not in recipe_names() and r.split("/")[1] not in folders] == []


@pytest.mark.parametrize("page", pages())
def test_relative_links_lead_to_files(page: str) -> None:
    site = {"changelog.md", "contributing.md", "results.md", "log.md", "commands.md", "errors.md"}
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", pages()[page]):
        if not re.match(r"[a-z]+:", target) and not (page.startswith("docs/") and target in site):
            assert (folder / target).exists(), f"{page}: {target}"


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").split()) <= 400


def test_an_unknown_option_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above can fail."""
    wrong: Mapping[str, str] = {
        "x.md": "```bash\nlocalign align --lr-rate 1\n```\n`localign align --lr-rate`"
    }
    monkeypatch.setattr("test_docs_commands.pages", lambda: wrong)
    with pytest.raises(pytest.fail.Exception, match="lr-rate"):
        test_commands_parse("x.md")
    with pytest.raises(AssertionError, match="lr-rate"):
        test_inline_commands_and_options_exist("x.md")
