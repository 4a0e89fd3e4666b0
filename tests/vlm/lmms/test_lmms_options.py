"""The engine lmms-eval without its package: options, refusals and task files."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from localign.cli import main
from localign.options.vlm.evaluation import IN_LMMS_EVAL
from localign.vlm.benchmarks.table import BENCHMARKS
from localign.vlm.lmms.registration import TASK_FOLDER
from localign.vlm.scoring.boxes import ORIGINAL
from localign.vlm.scoring.questions import MAX_NEW_TOKENS


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("m --benchmarks vsr --engine lmms-eval", "eval needs a model, --benchmarks and --data"),
        ("m --benchmarks vsr,pope --engine lmms-eval", "eval needs a model, --benchmarks and --data"),
        ("m --benchmarks pope --engine lmms-eval --data d", "--data has no effect on lmms-eval's own tasks"),
        ("m --benchmarks pope --engine lmms-eval --allow-partial", "--allow-partial has no effect"),
        ("m --benchmarks pope --engine lmms-eval --scoring published", "--scoring has no effect"),
        ("m --benchmarks pope --engine lmms-eval --boxes original:0-1", "--boxes has no effect"),
        ("m --benchmarks vsr --data d --task-folders t", "no effect without --engine lmms-eval"),
        ("m --benchmarks vsr --data d --engine lmms", "--engine takes one of"),
    ],
)
def test_options_without_effect_are_refused(
    options: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["vlm", "eval", *shlex.split(options)]) == 2
    line = capsys.readouterr().err.strip()
    assert said in line
    assert "\n" not in line


def test_without_the_package_one_line_names_the_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lmms_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    command = f"vlm eval m --benchmarks pope --engine lmms-eval --out {tmp_path / 'out'}"
    assert main(shlex.split(command)) == 2
    line = capsys.readouterr().err.strip()
    assert "install localign[lmms-eval]" in line
    assert "\n" not in line
    assert not (tmp_path / "out").exists()


class _Loader(yaml.SafeLoader):
    """Reads lmms-eval's tag ``!function`` as a string."""


def _name_of_function(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    assert isinstance(node, yaml.ScalarNode)
    return loader.construct_scalar(node)


_Loader.add_constructor("!function", _name_of_function)


def test_every_task_file_is_of_a_benchmark_of_ours() -> None:
    tasks: dict[str, Any] = {}
    for path in TASK_FOLDER.rglob("*.yaml"):
        content = yaml.load(path.read_text(), _Loader)
        tasks[content["task"]] = content
    assert sorted(tasks) == sorted(IN_LMMS_EVAL)
    assert set(tasks) <= set(BENCHMARKS)
    assert {content["class"] for content in tasks.values()} == {"localign.vlm.lmms.task.BenchmarkTask"}
    ocid = tasks["ocid-ref"]
    assert ocid["generation_kwargs"]["max_new_tokens"] == MAX_NEW_TOKENS
    assert ocid["dataset_kwargs"]["boxes"] == str(ORIGINAL)
