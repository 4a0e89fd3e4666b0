"""What each command writes: checked and locked before the command's modules are imported."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from localign.errors import UserError
from localign.files.output import (
    EMBEDDING_KEY,
    EVAL_FILES,
    EXPORT,
    EXPORT_FILES,
    PAGE_MARK,
    RUN_FILES,
    VLM_EXPORT,
    VLM_EXPORT_FILES,
    check_ours,
    kinds_of,
    locked_beside,
    mapping_in,
    output_file,
    output_folder,
)
from localign.options.bench import MeasurementConfig
from localign.options.datatools import DataVerifyConfig, In21kConfig, ShardConfig, StatsConfig
from localign.options.demo import DemoConfig
from localign.options.export import EmbedConfig, ExploreConfig, ExportConfig, ImportConfig, ReportConfig
from localign.options.names import VLM_FIGURES
from localign.options.plan import PlanConfig
from localign.options.probe import ProbeCommandConfig
from localign.options.reproduce import BACKBONES_FILE, BACKBONES_HEADER, ReproduceConfig
from localign.options.train import TrainConfig
from localign.options.vlm.demo import VLMDemoConfig
from localign.options.vlm.evaluation import EvalConfig, ScoreConfig, ShowConfig
from localign.options.vlm.plan import VLMPlanConfig
from localign.options.vlm.tools import CheckConfig, ConvertConfig, SwapConfig, VLMExportConfig

_Output = AbstractContextManager[object]
_ELSEWHERE = "give another folder"
_SHARD_FILES = ("about.json", "shards.jsonl", "left-out.jsonl", "*.tar")
_PROBE_FILES = (
    "config.yaml", "results.json", "pictures.npz", "report.html", "recalls.csv", "classes.csv", "sizes.csv",
    "tables", "figures",
)  # fmt: skip
_DEMO_FILES = (
    "config.yaml",
    "results.json",
    "pictures.npz",
    "report.html",
    "explore.html",
    "align-seed*",
    "probe-seed*",
)
_VLM_DEMO_FILES = ("config.yaml", "results.json", "train", "test", "llm", "align", "*-seed*")
_COMPARISON_FILES = ("comparison.*", "bars*", "radar*")
_LOOKED_AT = 1 << 16
"""Bytes of a list that are looked at."""
_PARQUET_END, _FOOTER = 8, 1 << 26
"""Bytes of the length and magic at the end of a parquet file, and of the longest footer that is looked at."""


@contextmanager
def claimed(command: str, config: Any) -> Iterator[None]:
    """Hold what a command writes, so that bad outputs are known before the work.

    Args:
        command: The command's name, which is the kind of its folders.
        config: Its options.

    Raises:
        UserError: An output is not a file or folder of this command, cannot be written to, or is in use.
    """
    of = next((OUTPUTS[kind] for kind in type(config).__mro__ if kind in OUTPUTS), None)
    is_main = os.environ.get("RANK", "0") == "0"  # the other ranks of torchrun write nothing of their own
    with ExitStack() as stack:
        for output in of(command, config) if of is not None and is_main else ():
            stack.enter_context(output)
        yield


def _checked(output: _Output) -> None:
    """Check an output that the command itself locks."""
    with output:
        pass


def _training(command: str, config: TrainConfig) -> Iterator[_Output]:
    if not getattr(config, "dry_run", False):
        _checked(output_folder(config.out, command, RUN_FILES))
    return iter(())


def _plan(command: str, config: PlanConfig | VLMPlanConfig) -> Iterator[_Output]:
    if config.out:
        yield output_file(config.out, command, _json_of(command=("plan",)))


def _bench(command: str, config: MeasurementConfig) -> Iterator[_Output]:
    yield output_file(config.file, command, _json_of(command=("bench",)))


def _probe(command: str, config: ProbeCommandConfig) -> Iterator[_Output]:
    if config.cache_dir is not None:
        _checked(output_folder(config.cache_dir, command, advice="give another --cache-dir"))
    yield output_folder(config.out, command, _PROBE_FILES)


def _demo(command: str, config: DemoConfig | VLMDemoConfig) -> Iterator[_Output]:
    yield output_folder(config.out, command, _DEMO_FILES if command == "demo" else _VLM_DEMO_FILES)


def _reproduce(command: str, config: ReproduceConfig) -> Iterator[_Output]:
    if not config.dry_run:
        folder = Path(config.out) / config.world / (config.target + ("-quick" if config.quick else ""))
        is_vlm = config.target in VLM_FIGURES
        if not is_vlm:
            _checked(output_file(folder.parent / BACKBONES_FILE, command, _is_table_of_backbones))
        yield output_folder(folder, command, ("results.json", *(_COMPARISON_FILES if is_vlm else ())))
        if is_vlm and config.world == "scenes":
            yield output_folder(config.demo_folder, "vlm demo", _VLM_DEMO_FILES)


def _is_table_of_backbones(path: Path) -> bool:
    with path.open("rb") as file:
        return file.readline(_LOOKED_AT).rstrip() == ",".join(BACKBONES_HEADER).encode()


def _export(command: str, config: ExportConfig | ImportConfig) -> Iterator[_Output]:
    yield output_folder(config.out, EXPORT, EXPORT_FILES)


def _vlm_export(command: str, config: VLMExportConfig | SwapConfig) -> Iterator[_Output]:
    yield output_folder(config.out, VLM_EXPORT, VLM_EXPORT_FILES)


def _report(command: str, config: ReportConfig) -> Iterator[_Output]:
    folder = Path(config.run)
    if folder.is_dir():
        yield output_file(
            folder / "report.html", command, lambda _: bool(kinds_of(folder)), advice="give another run"
        )


def _eval(command: str, config: EvalConfig) -> Iterator[_Output]:
    _checked(output_folder(config.out, command, EVAL_FILES))
    return iter(())


def _score(command: str, config: ScoreConfig) -> Iterator[_Output]:
    if len(config.runs) == 1 and Path(config.runs[0]).is_dir():
        yield output_folder(config.runs[0], "vlm eval", EVAL_FILES)
    else:
        yield output_folder(config.out or "comparison", command, _COMPARISON_FILES)


def _show(command: str, config: ShowConfig) -> Iterator[_Output]:
    yield output_folder(config.out, command, ("*.png",))


def _check(command: str, config: CheckConfig) -> Iterator[_Output]:
    if config.missing_list is not None:
        yield output_file(
            config.missing_list, command, _is_list_of_images, advice="give another --missing-list"
        )


def _convert(command: str, config: ConvertConfig) -> Iterator[_Output]:
    if config.out is not None:  # nothing in such a file tells who wrote it
        yield output_file(config.out, command, lambda _: False)
    elif config.add is not None and Path(config.add).is_dir():
        yield output_folder(config.add, command, advice="give a folder that can be written to")


def _shards(command: str, config: ShardConfig | In21kConfig) -> Iterator[_Output]:
    final = Path(config.out).expanduser()
    yield locked_beside(final, command, advice=_ELSEWHERE)
    # What is finished is compared with the options later.
    partial = final.with_name(final.name + ".partial")
    if partial.exists() and not partial.is_dir():
        raise UserError(f"{partial} is a file, not a folder; {_ELSEWHERE}")
    for folder in (partial, partial / "train", partial / "val"):
        if folder.is_dir():
            check_ours(folder, command, _SHARD_FILES, _packed_by(folder), _ELSEWHERE)


def _packed_by(folder: Path) -> set[str]:
    facts = mapping_in(folder / "about.json")
    if not facts.keys() >= {"source", "shard_images"}:
        return set()
    return {"data in21k-p" if "min_images" in facts else "data shard"}


def _embed(command: str, config: EmbedConfig) -> Iterator[_Output]:
    yield output_file(config.out, command, _is_features)


def _explore(command: str, config: ExploreConfig) -> Iterator[_Output]:
    if not config.serve:
        yield output_file(config.out, command, _is_page)


def _verify(command: str, config: DataVerifyConfig) -> Iterator[_Output]:
    yield output_file(config.out, command, _is_list_of_bad_images)


def _stats(command: str, config: StatsConfig) -> Iterator[_Output]:
    if config.out is not None:
        yield output_file(
            config.out, command, lambda path: mapping_in(path).keys() >= {"opened", "unreadable"}
        )


OUTPUTS: Mapping[type, Callable[[str, Any], Iterator[_Output]]] = {
    TrainConfig: _training,
    PlanConfig: _plan,
    VLMPlanConfig: _plan,
    MeasurementConfig: _bench,
    ProbeCommandConfig: _probe,
    DemoConfig: _demo,
    VLMDemoConfig: _demo,
    ReproduceConfig: _reproduce,
    ExportConfig: _export,
    ImportConfig: _export,
    VLMExportConfig: _vlm_export,
    SwapConfig: _vlm_export,
    ReportConfig: _report,
    EvalConfig: _eval,
    ScoreConfig: _score,
    ShowConfig: _show,
    CheckConfig: _check,
    ConvertConfig: _convert,
    ShardConfig: _shards,
    In21kConfig: _shards,
    EmbedConfig: _embed,
    ExploreConfig: _explore,
    DataVerifyConfig: _verify,
    StatsConfig: _stats,
}
"""Config class -> what it writes. Subclasses write the same, unless they have an entry of their own."""


# -- files of ours -----------------------------------------------------------------------------------------


def _json_of(**facts: tuple[str, ...]) -> Callable[[Path], bool]:
    def is_ours(path: Path) -> bool:
        content = mapping_in(path)
        return all(content.get(key) in values for key, values in facts.items())

    return is_ours


def _first_lines(path: Path) -> list[str] | None:
    """The complete lines at the start of a text file; None for anything else."""
    try:
        with path.open("rb") as file:
            start = file.read(_LOOKED_AT)
        lines = start.decode("utf-8", errors="strict" if len(start) < _LOOKED_AT else "ignore").split("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return lines[:-1]


def _is_list_of_images(path: Path) -> bool:
    """Whether every line ends like the name of an image."""
    lines = _first_lines(path)
    suffixes = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".jfif")
    return lines is not None and all(line.lower().endswith(suffixes) for line in lines)


def _is_list_of_bad_images(path: Path) -> bool:
    """Whether every line is a JSON object with a path and a reason."""
    lines = _first_lines(path)
    try:
        return lines is not None and all(json.loads(line).keys() >= {"path", "reason"} for line in lines)
    except (ValueError, AttributeError, RecursionError):
        return False


def _is_page(path: Path) -> bool:
    """Whether the head of a web page says that we wrote it."""
    try:
        with path.open("rb") as file:
            return PAGE_MARK.encode() in file.read(_LOOKED_AT)
    except OSError:
        return False


def _is_features(path: Path) -> bool:
    """Whether the metadata at the end of a parquet file says that we wrote it."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _PARQUET_END))
            size, magic = file.read(4), file.read(4)
            length = int.from_bytes(size, "little")
            if magic != b"PAR1" or not 0 < length <= min(_FOOTER, path.stat().st_size):
                return False
            file.seek(-length - _PARQUET_END, os.SEEK_END)
            return EMBEDDING_KEY.encode() in file.read(length)
    except OSError:
        return False
