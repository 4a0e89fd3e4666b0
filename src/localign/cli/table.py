"""The commands: one line for each."""

# ruff: noqa: E501

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from localign.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Command:
    """One sub-command. Its modules are imported when it runs or shows its help, not before."""

    name: str
    """One word, or two as in ``vlm train``."""
    config_path: str
    """The config class, as ``module:Class``. The module imports no torch, numpy, timm or
    transformers, so that the help and error lines come at once."""
    run_path: str
    """The function that takes the config, as ``module:function``. An int that it returns is the exit code; any other
    result is for Python."""
    help: str
    positional: tuple[str, ...] = ()
    """Fields that may be given without the option's name, in order."""
    recipes_of: str | None = None
    """The command whose recipes it takes, if not its own."""
    ignored_in_files: tuple[str, ...] = ()
    """Keys of such recipes that mean nothing to this command."""
    sibling: str | None = None
    """The command that runs instead when a recipe given as ``--config`` is one that the sibling takes."""
    package: str = "localign"
    """The package of the two paths."""
    program: str = "localign"
    """What is typed before the name, for the help."""
    without_options: str = ""
    """The error where nothing follows the name; empty if the command runs without options."""

    def config(self) -> type:
        """The config class."""
        config: type = self._imported(self.config_path)
        return config

    def run(self, config: Any) -> int | None:
        """Run the command; returns the exit code, None for 0."""
        function: Callable[[Any], object] = self._imported(self.run_path)
        result = function(config)
        return result if isinstance(result, int) else None

    def _imported(self, path: str) -> Any:
        module, _, name = path.partition(":")
        return getattr(import_module(f"{self.package}.{module}"), name)


_ALIGN_WHAT = "align needs options: --backbone NAME and --data IMAGES, or --config RECIPE (see `localign list`); `localign demo` shows the method on drawn scenes"

# name, config class, function, help, positional fields
# fmt: off
_TABLE: tuple[Command, ...] = (
    Command("demo", "options.demo:DemoConfig", "demo.run:run_demo", "align the embedded backbone, probe it before and after, and write a report"),
    Command("align", "options.align:AlignConfig", "alignment.command:run_align", "align a backbone", without_options=_ALIGN_WHAT),
    Command("plan", "options.plan:PlanConfig", "planning.show:run_plan", "estimate a run: arithmetic, memory, hours", recipes_of="align", ignored_in_files=("out",), sibling="vlm plan"),
    Command("pretrain", "options.pretrain:PretrainConfig", "pretraining.task:run_pretrain", "pre-train the embedded backbone on scenes"),
    Command("finetune", "options.finetune:FinetuneConfig", "finetuning.task:run_finetune", "fine-tune a backbone for classification, with a transformer head"),
    Command("probe", "options.probe:ProbeCommandConfig", "probing.command:run_probe", "measure what backbones know about patches and images", ("backbone",)),
    Command("embed", "options.export:EmbedConfig", "datatools.embed:run_embed", "write the features of images to a parquet file", ("images",)),
    Command("explore", "options.export:ExploreConfig", "explore.command:run_explore", "write a web page that compares models patch by patch", ("models",)),
    Command("vlm train", "options.vlm.train:VLMConfig", "vlm.commands:run_vlm_train", "train a ViT, an adapter and a language model on conversations"),
    Command("vlm plan", "options.vlm.plan:VLMPlanConfig", "planning.show:run_vlm_plan", "estimate a VLM training: parameters, memory, steps", recipes_of="vlm train", ignored_in_files=("out",)),
    Command("vlm chat", "options.vlm.tools:ChatConfig", "vlm.chat:run_chat", "ask a model about an image", ("model", "image")),
    Command("vlm swap", "options.vlm.tools:SwapConfig", "vlm.commands:run_swap", "put another tower into a LLaVA model", ("llava",)),
    Command("vlm export", "options.vlm.tools:VLMExportConfig", "vlm.commands:run_vlm_export", "write a model as a transformers folder", ("model",)),
    Command("vlm check", "options.vlm.tools:CheckConfig", "vlm.commands:run_check", "find faults in files of conversations", ("data",)),
    Command("vlm convert", "options.vlm.tools:ConvertConfig", "vlm.commands:run_convert", "build the published mixtures of conversations", ("what",)),
    Command("vlm eval", "options.vlm.evaluation:EvalConfig", "vlm.commands:run_eval", "evaluate a vision-language model on benchmarks", ("model",)),
    Command("vlm score", "options.vlm.evaluation:ScoreConfig", "vlm.evaluation.score:run_score", "score kept answers again, or compare models", ("runs",)),
    Command("vlm show", "options.vlm.evaluation:ShowConfig", "vlm.evaluation.show:run_show", "draw questions with true and predicted boxes", ("answers",)),
    Command("vlm demo", "options.vlm.demo:VLMDemoConfig", "vlm.demo.run:run_vlm_demo", "compare models with and without alignment on drawn scenes"),
    Command("data shard", "options.datatools:ShardConfig", "datatools.shard:run_shard", "pack images into tar shards", ("source", "out")),
    Command("data verify", "options.datatools:DataVerifyConfig", "datatools.verify:run_verify", "decode every image and list the unreadable ones", ("source",)),
    Command("data stats", "options.datatools:StatsConfig", "datatools.stats:run_stats", "count images and classes, and measure image sizes", ("source",)),
    Command("data in21k-p", "options.datatools:In21kConfig", "datatools.in21k:run_in21k", "build the processed ImageNet-21k and its validation split", ("source", "out")),
    Command("bench align", "options.bench:AlignBenchConfig", "bench.align:run_bench_align", "time alignment steps against a plain implementation"),
    Command("bench loader", "options.bench:LoaderBenchConfig", "bench.loader:run_bench_loader", "time the loading of training crops against torchvision"),
    Command("reproduce", "options.reproduce:ReproduceConfig", "vlm.figures.command:run_reproduction", "reproduce a table or figure of the paper, with all the runs it needs", ("target",)),
    Command("export", "options.export:ExportConfig", "alignment.export:run_export", "write a backbone for use elsewhere", ("source",)),
    Command("import", "options.export:ImportConfig", "alignment.export:run_import", "convert a published checkpoint (.pth.tar)", ("file",)),
    Command("list", "cli.listing:ListConfig", "cli.listing:run_list", "list backbones or recipes", ("what",)),
    Command("doctor", "cli.doctor:DoctorConfig", "cli.doctor:run_doctor", "show what this machine and installation can do"),
    Command("report", "options.export:ReportConfig", "report.build:run_report", "write report.html of a run again", ("run",)),
    Command("verify-reference", "options.export:VerifyConfig", "alignment.verify:run_verify_reference", "recompute a folder of reference numbers", ("folder",)),
    Command("completion", "cli.completion:CompletionConfig", "cli.completion:run_completion", "print a completion script for a shell", ("shell",)),
)
# fmt: on

COMMANDS: dict[str, Command] = {command.name: command for command in _TABLE}


def commands_of(group: str) -> dict[str, Command]:
    """The commands of two words with this first word."""
    return {name: command for name, command in COMMANDS.items() if name.startswith(f"{group} ")}


def split_command(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """A command's name, of one word or two as in ``vlm train``, and the arguments after it.

    Raises:
        UserError: There is no such command.
    """
    for words in (2, 1):
        if (name := " ".join(arguments[:words])) in COMMANDS:
            return name, list(arguments[words:])
    name = arguments[0]
    if group := commands_of(name):
        raise UserError(f"localign {name} what? there is {', '.join(group)}")
    raise UserError(f"unknown command {name!r}{did_you_mean(name, COMMANDS)}; `localign --help` lists them")
