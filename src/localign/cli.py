"""The command line: a config class becomes options, errors become one line."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import sys
import threading
from argparse import HelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn, get_args

from jsonargparse import ArgumentParser, set_parsing_settings

from localign import commands
from localign._version import __version__
from localign.errors import RunFailure, RunStopped, UserError, did_you_mean

EXIT_OK, EXIT_FAILURE, EXIT_BAD_INPUT = 0, 1, 2


@dataclass(frozen=True)
class Command:
    """One sub-command."""

    config: Callable[[], type]
    """Gives the config class; late, so that --help of one command does not import the others."""
    run: Callable[[Any], int | None]
    """Takes the config; returns an exit code, None for 0."""
    help: str
    positional: tuple[str, ...] = ()
    """Fields that may be given without their option's name, in order."""
    recipes_of: str | None = None
    """The command whose recipes it takes, if not its own."""


COMMANDS: dict[str, Command] = {
    "demo": Command(
        commands.demo_config, commands.demo, "align the embedded backbone, probe before and after, report"
    ),
    "align": Command(commands.align_config, commands.align, "locality alignment of a backbone"),
    "plan": Command(
        commands.plan_config,
        commands.plan,
        "what an alignment takes before it runs: arithmetic, memory, hours",
        recipes_of="align",
    ),
    "pretrain": Command(commands.pretrain_config, commands.pretrain, "make the embedded backbone"),
    "finetune": Command(
        commands.finetune_config, commands.finetune, "classification fine-tuning under a transformer head"
    ),
    "probe": Command(
        commands.probe_config, commands.probe, "what backbones know about patches and images", ("backbone",)
    ),
    "vlm train": Command(
        commands.vlm_config,
        commands.vlm_train,
        "a ViT, an adapter and a language model, trained on conversations",
    ),
    "vlm chat": Command(
        commands.chat_config, commands.vlm_chat, "ask a model about an image", ("model", "image")
    ),
    "vlm export": Command(
        commands.vlm_export_config, commands.vlm_export, "write a model as a transformers folder", ("model",)
    ),
    "vlm check": Command(
        commands.check_config, commands.vlm_check, "look for what is wrong with conversations", ("data",)
    ),
    "vlm convert": Command(
        commands.convert_config,
        commands.vlm_convert,
        "make the published mixtures of conversations",
        ("what",),
    ),
    "vlm eval": Command(
        commands.eval_config, commands.vlm_eval, "put benchmarks to a vision-language model", ("model",)
    ),
    "vlm score": Command(
        commands.score_config, commands.vlm_score, "score answers again, or compare models", ("runs",)
    ),
    "vlm show": Command(
        commands.show_config, commands.vlm_show, "draw questions with true and answered boxes", ("answers",)
    ),
    "vlm demo": Command(
        commands.vlm_demo_config,
        commands.vlm_demo,
        "compare models with and without alignment, on drawn scenes",
    ),
    "data shard": Command(
        commands.shard_config, commands.data_shard, "pack images into tar shards", ("source", "out")
    ),
    "data verify": Command(
        commands.data_verify_config,
        commands.data_verify,
        "decode every image, list the bad ones",
        ("source",),
    ),
    "data stats": Command(
        commands.stats_config,
        commands.data_stats,
        "how many images, how large, in which classes",
        ("source",),
    ),
    "data in21k-p": Command(
        commands.in21k_config,
        commands.data_in21k,
        "make the processed ImageNet-21k and its validation split",
        ("source", "out"),
    ),
    "bench": Command(
        commands.bench_config,
        commands.bench,
        "measure speed beside the plain way: labels, probe, vlm, answers, loader, scaling, align",
        ("what",),
    ),
    "reproduce": Command(
        commands.reproduce_config,
        commands.reproduce,
        "a table or figure of the paper, with all runs it takes",
        ("target",),
    ),
    "export": Command(
        commands.export_config, commands.export, "write a backbone for use elsewhere", ("source",)
    ),
    "import": Command(
        commands.import_config, commands.import_, "convert a published checkpoint (.pth.tar)", ("file",)
    ),
    "list": Command(commands.list_config, commands.list_, "what there is: backbones, recipes", ("what",)),
    "report": Command(commands.report_config, commands.report, "write report.html of a run again", ("run",)),
    "verify-reference": Command(
        commands.verify_config,
        commands.verify_reference,
        "recompute a folder of reference numbers",
        ("folder",),
    ),
}


class Parser(ArgumentParser):
    """Options are written with hyphens; an error is one line that names them."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        raise UserError(_one_line(message, [_hyphens(o) for o in known]))

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        text = super().format_help() if formatter is None else super().format_help(formatter)
        return re.sub(r"--[a-z_]+", lambda m: _hyphens(m.group()), text)


def _hyphens(option: str) -> str:
    return option.replace("_", "-")


def _one_line(message: str, known: Sequence[str]) -> str:
    """jsonargparse's messages, which can span many lines, as one."""
    if unknown := re.search(r"[Uu]nrecognized arguments: (\S+)", message):
        option = _hyphens(unknown.group(1).split("=")[0])
        return f"unknown option {option}{did_you_mean(option, known)}"
    if unknown := re.search(r"Option '([^']+)' is not accepted", message):
        name = unknown.group(1)
        return f"unknown key {name!r} in the config file{did_you_mean('--' + _hyphens(name), known)}"
    if key := re.search(r'[Pp]arser key "([^"]+)"', message):
        value = re.search(r"(?:Given value|Got value): (.*)", message)
        kinds = re.search(r"Subtypes: (.*)", message) or re.search(
            r"Expected an? (.*?)(?:\. Got value|$)", message
        )
        expected = _kinds(kinds.group(1)) if kinds else "something else"
        given = f"not {value.group(1).strip()!r}" if value else "which it did not get"
        return f"{_hyphens('--' + key.group(1))} takes {expected}, {given}"
    return " ".join(message.split())


def _kinds(text: str) -> str:
    """jsonargparse's list of types as a user would put it: "int, null", "one of [a, b]"."""
    if text.startswith("["):
        text = text[1:-1]
    text = re.sub(r"<class '(\w+)'>", r"\1", text).replace("NoneType", "null")
    return text.replace("typing.Literal", "one of ").replace("'", "").strip(" .")


def build_parser(name: str) -> Parser:
    """The parser of one command."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    command = COMMANDS[name]
    positional = "".join(f" [{field.upper()}]" for field in command.positional)
    parser = Parser(
        prog=f"localign {name}",
        usage=f"localign {name}{positional} [--config FILE] [--option value ...]",
        description=(command.config().__doc__ or command.help).strip().splitlines()[0],
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file of the options below, or a name of `localign list recipes`; options given here win.",
    )
    parser.add_class_arguments(command.config(), as_group=False)
    return parser


def parse(name: str, argv: Sequence[str]) -> Any:
    """The config object of a command line.

    Raises:
        UserError: Unknown, misspelt, mistyped or contradictory options.
    """
    command = COMMANDS[name]
    parser = build_parser(name)
    values = vars(parser.parse_args([_opened(token, name) for token in normalise(argv, command)]))
    given = {f.name: values[f.name] for f in dataclasses.fields(command.config()) if f.name in values}
    for field in dataclasses.fields(command.config()):
        # The parser takes null for an option that is not given.
        if given.get(field.name, field.name) is None and type(None) not in get_args(field.type):
            raise UserError(f"{_hyphens('--' + field.name)} takes no null")
    return command.config()(**given)


def _opened(token: str, command: str) -> str:
    """The content of a config file or recipe, with its bases, in place of its name."""
    from localign.recipes import read_recipe

    option, _, value = token.partition("=")
    if option != "--config":
        return token
    whose = COMMANDS[command].recipes_of or command
    return f"{option}={json.dumps(read_recipe(value, whose).values)}"


def normalise(argv: Sequence[str], command: Command) -> list[str]:
    """Users' spelling to the parser's: positionals named, hyphens to underscores, bare flags given a value.

    ``--model-kwargs depth=2 img_size=96`` becomes one JSON object, ``--heads transformer linear`` one list.
    """
    fields = {f.name: f for f in dataclasses.fields(command.config())}
    positional = list(command.positional)
    out: list[str] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--"):
            if token == "-h":
                out.append(token)
            elif positional:
                name = positional.pop(0)
                tokens = [token]
                while _is_list(fields[name]) and rest and not rest[0].startswith("-"):
                    tokens.append(rest.pop(0))
                out += [f"--{name}", _as_json_list(name, tokens) if _is_list(fields[name]) else token]
            else:
                raise UserError(f"unexpected argument {token!r}")
            continue
        option, equals, value = token.partition("=")
        name = option[2:].replace("-", "_")
        field = fields.get(name.split(".")[0])
        values = [value] if equals else []
        several = _is_mapping(field) or _is_list(field)
        while not equals and rest and not rest[0].startswith("--") and (not values or several):
            values.append(rest.pop(0))
        if _is_mapping(field) and "." not in name:
            values = [_as_json(option, values)]
        elif _is_list(field):
            values = [_as_json_list(option, values)]
        elif not values and field is not None:
            values = [_bare(option, field)]
        out += [f"--{name}={values[0]}"] if values else [f"--{name}"]
    return out


def _is_mapping(field: dataclasses.Field[Any] | None) -> bool:
    return field is not None and "dict" in str(field.type)


def _is_list(field: dataclasses.Field[Any] | None) -> bool:
    return field is not None and str(field.type).startswith("tuple[str")


def _as_json_list(option: str, values: list[str]) -> str:
    if len(values) == 1 and values[0].startswith("["):
        return values[0]
    parts = [part.strip() for value in values for part in value.split(",") if part.strip()]
    if not parts:
        raise UserError(f"{option} needs a value")
    return json.dumps(parts)


def _as_json(option: str, values: list[str]) -> str:
    import yaml

    if len(values) == 1 and values[0].startswith("{"):
        return values[0]
    pairs = [part.partition("=") for value in values for part in value.split(",") if part]
    if not pairs or any(not equals or not key for key, equals, _ in pairs):
        raise UserError(f"{option} takes name=value pairs, for example depth=2")
    return json.dumps({key: yaml.safe_load(value) for key, _, value in pairs})


def _bare(option: str, field: dataclasses.Field[Any]) -> str:
    if field.type is bool:
        return "true"
    if field.name == "resume":
        return "must"
    raise UserError(f"{option} needs a value")


def split_command(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """A command's name, of one word or two as in ``vlm train``, and what follows it.

    Raises:
        UserError: There is no such command.
    """
    for words in (2, 1):
        if (name := " ".join(arguments[:words])) in COMMANDS:
            return name, list(arguments[words:])
    group = [name for name in COMMANDS if name.startswith(f"{arguments[0]} ")]
    if group:
        raise UserError(f"localign {arguments[0]} what? there is {', '.join(group)}")
    name = arguments[0]
    raise UserError(f"unknown command {name!r}{did_you_mean(name, COMMANDS)}; `localign --help` lists them")


def usage() -> str:
    """What `localign --help` prints."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"localign {__version__}: locality alignment for vision transformers",
            "",
            "usage: localign COMMAND [options]       localign COMMAND --help",
            "",
            *lines,
            "",
            "Several GPUs: torchrun --nproc-per-node N -m localign COMMAND ...",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit code: 0, 1 (failure) or 2 (bad use or bad input)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return EXIT_OK if arguments else EXIT_BAD_INPUT
    if arguments[0] in ("-V", "--version"):
        print(__version__)
        return EXIT_OK
    with _told_when_ended():
        return exit_code(lambda: _run(arguments))


@contextmanager
def _told_when_ended() -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 end the process with a line; training, which saves first, takes them over."""
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a worker, which whoever started it may end
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if os.environ.get("RANK", "0") == "0":
            # Not print: the signal may have come within one.
            os.write(2, f"localign: ended by {signal.Signals(number).name}\n".encode())
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # Python sets no handlers elsewhere
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _run(arguments: Sequence[str]) -> int | None:
    name, rest = split_command(arguments)
    return COMMANDS[name].run(parse(name, rest))


def exit_code(action: Callable[[], int | None]) -> int:
    """Do something; what goes wrong in a known way becomes one line on standard error, and the exit code."""
    try:
        return action() or EXIT_OK
    except (UserError, RunFailure) as error:
        if not error.already_reported:
            print(f"localign: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return EXIT_BAD_INPUT if isinstance(error, UserError) else EXIT_FAILURE
    except RunStopped:
        return EXIT_OK  # the run has said so
    except KeyboardInterrupt:
        print("localign: interrupted; continue with --resume", file=sys.stderr)
        return EXIT_FAILURE
