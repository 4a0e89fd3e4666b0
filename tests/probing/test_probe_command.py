"""The probe command from end to end: what it writes, what it reuses, and its one line when something is wrong."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_folders import folder_of
from PIL import Image

from localign.backbones import create_backbone, save_backbone
from localign.cli import main, parse
from localign.errors import UserError
from localign.options.probe import ProbeCommandConfig
from localign.probing.command import load_backbones

TINY = (
    "--weights none --model-kwargs img_size=24 patch_size=8 embed_dim=24 depth=1 num_heads=2 "
    "--train-scenes 32 --test-scenes 20 --batch-size 8 --steps 4 --device cpu"
)
VIT = "vit_tiny_patch16_224"


def probe(command: str) -> dict[str, Any]:
    """Run the command, which must succeed; its results.json."""
    arguments = shlex.split(f"probe {command}")
    assert main(arguments) == 0
    results = Path(arguments[arguments.index("--out") + 1]) / "results.json"
    content: dict[str, Any] = json.loads(results.read_text())
    return content


def line_of(capsys: pytest.CaptureFixture[str], command: str) -> str:
    """The one line of a command that must fail with bad input."""
    capsys.readouterr()
    assert main(shlex.split(f"probe {command}")) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("localign: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("probe") / "run"
    names = f"first={VIT},second={VIT}"
    heads = "--heads [linear,transformer] --tasks [local,global,majority]"
    with pytest.MonkeyPatch.context() as patch:
        for function in ("write_probe_report", "build_report"):  # figures take most of the time
            patch.setattr(f"localign.probing.command.{function}", lambda folder: [])
        probe(f"{names} {TINY} {heads} --seeds 2 --cache disk --out {out}")
    return out


def test_results_have_one_outcome_per_backbone_and_seed(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    assert list(results["probe"]) == ["first", "second"]
    for outcomes in results["probe"].values():
        assert [o["seed"] for o in outcomes] == [0, 1]
        for outcome in outcomes:
            assert set(outcome["results"]["test"]) == {"linear", "transformer"}
            assert set(outcome["results"]["test"]["linear"]) == {"local", "global", "majority"}
            low, high = outcome["results"]["test"]["linear"]["local"]["macro_recall_interval"]
            assert 0 <= low <= high <= 1
    assert (results["command"], results["protocol"]) == ("probe", "fixed")
    assert results["config"]["seeds"] == 2
    assert len(results["classes"]) == len(results["probe"]["first"][0]["classes"])
    assert set(results["timings"]) == {"data", "first", "second", "total"}
    assert any("frozen backbones in eval mode" in note for note in results["notes"])


def test_equal_backbones_do_not_differ(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    assert len(results["differences"]) == 6
    for entry in results["differences"]:
        assert (entry["name"], entry["against"], entry["source"]) == ("second", "first", "test")
        assert entry["difference"] == 0
        assert entry["interval"] == [0, 0]


def test_pictures_show_what_the_local_transformer_says(run: Path) -> None:
    with np.load(run / "pictures.npz", allow_pickle=False) as arrays:
        assert arrays["images"].shape == (6, 3, 24, 24)
        assert arrays["images"].dtype == np.uint8
        assert arrays["truth"].shape == (6, 9, len(arrays["class_names"]))
        assert arrays["truth"].dtype == bool
        for name in ("first", "second"):
            assert arrays[f"probability_{name}"].shape == arrays["truth"].shape
            assert arrays[f"probability_{name}"].dtype == np.float16
        assert arrays["grid"].tolist() == [3, 3]
        assert arrays["patch_size"].tolist() == [8, 8]


def test_figures_tables_and_the_report_lie_beside(run: Path, tmp_path: Path) -> None:
    probe(f"{VIT} {TINY} --heads [linear] --tasks [local] --out {tmp_path}")
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert (tmp_path / "config.yaml").is_file()
    assert (tmp_path / "recalls.csv").is_file()
    assert list(tmp_path.glob("figures/*.png"))
    assert {p.name for p in (run / "cache" / "first").iterdir()} == {"train", "test"}


@pytest.mark.slow
def test_features_are_used_again_and_another_backbones_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"{TINY} --heads [linear] --tasks [local] --cache disk --cache-dir {tmp_path / 'cache'}"
    probe(f"vit={VIT} {options} --out {tmp_path / 'a'}")
    assert "writing" in capsys.readouterr().err
    probe(f"vit={VIT} {options} --seed 1 --out {tmp_path / 'b'}")
    assert "writing" not in capsys.readouterr().err
    kwargs = {"img_size": 24, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    other = create_backbone(VIT, weights="none", model_kwargs=kwargs, seed=5)
    save_backbone(other, tmp_path / "export")
    rest = options.replace(TINY, TINY[TINY.index("--train-scenes") :])
    line = line_of(capsys, f"vit={tmp_path / 'export'} {rest} --out {tmp_path / 'c'}")
    assert "holds features of another backbone" in line
    assert "give another --cache-dir" in line
    assert not (tmp_path / "c" / "results.json").exists()
    # In the run's own folder a stale cache is replaced instead.
    own = rest.replace(f"--cache-dir {tmp_path / 'cache'}", "")
    probe(f"vit={tmp_path / 'export'} {own} --out {tmp_path / 'd'}")
    changed = own.replace("--train-scenes 32", "--train-scenes 24")
    results = probe(f"vit={tmp_path / 'export'} {changed} --out {tmp_path / 'd'}")
    assert results["probe"]["vit"][0]["train"]["images"] == 24


def test_the_published_protocol_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = TINY.replace("--steps 4", "--epochs 3")
    results = probe(
        f"{VIT} {options} --protocol published --heads [linear] --tasks [global] --out {tmp_path / 'run'}"
    )
    assert results["protocol"] == "published"
    metrics = results["probe"][VIT][0]["results"]["test"]["linear"]["global"]
    assert 1 <= metrics["best_epoch"] <= 3
    assert any("optimistic" in note for note in results["notes"])
    assert "published protocol" in capsys.readouterr().out
    assert not (tmp_path / "run" / "pictures.npz").exists()  # no local head


@pytest.mark.slow
def test_two_ranks_come_to_the_results_of_one(tmp_path: Path) -> None:
    options = f"{VIT} {TINY} --heads [linear,transformer] --cache device --cache-dtype float32"
    one = probe(f"{options} --out {tmp_path / 'one'}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "localign", *shlex.split(f"probe {options} --out {tmp_path / 'two'}")],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Macro recall") == 1
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    for head, tasks in one["probe"][VIT][0]["results"]["test"].items():
        for task, metrics in tasks.items():
            other = two["probe"][VIT][0]["results"]["test"][head][task]
            assert metrics["class_positives"] == other["class_positives"]
            # Rounding may move a logit on the threshold to its other side: a decision or two of many.
            assert metrics["accuracy"] == pytest.approx(other["accuracy"], abs=0.01)


def labelled_folder(folder: Path, values: tuple[int, ...]) -> Path:
    """Two images a split, each with a label map of one value."""
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True)
        for i, value in enumerate(values):
            Image.fromarray(np.full((24, 24, 3), 40 * i, np.uint8)).save(
                folder / "images" / split / f"{i}.png"
            )
            Image.fromarray(np.full((24, 24), value, np.uint8)).save(folder / "masks" / split / f"{i}.png")
    (folder / "classes.json").write_text(json.dumps({"0": "unlabeled", "1": "cat", "2": "dog"}))
    return folder


def test_labels_that_say_nothing_are_refused_before_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = TINY.replace("--train-scenes 32 --test-scenes 20", "").replace(
        "--batch-size 8", "--batch-size 2"
    )
    empty = labelled_folder(tmp_path / "empty", (0, 0))
    line = line_of(capsys, f"{VIT} {options} --data {empty} --out {tmp_path / 'run'}")
    assert "has a positive label" in line
    assert "'unlabeled'" in line
    assert not (tmp_path / "run").exists()


def test_classes_that_do_not_occur_have_no_recall(tmp_path: Path) -> None:
    labelled = labelled_folder(tmp_path / "labelled", (1, 2))
    options = TINY.replace("--train-scenes 32 --test-scenes 20", "").replace(
        "--batch-size 8", "--batch-size 2"
    )
    results = probe(f"{VIT} {options} --data {labelled} --heads [linear] --out {tmp_path / 'run'}")
    recalls = results["probe"][VIT][0]["results"]["test"]["linear"]["local"]["class_recall"]
    assert recalls[0] is None
    assert None not in recalls[1:]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("a,,b", "--backbone takes names or NAME=path"),
        ("=x", "--backbone takes names or NAME=path"),
        ("a=x,a=y", "two backbones have the name 'a'"),
        ("x/a,x-a", "two backbones have the name 'x-a'"),
        ("--steps 3 --epochs 2", "--steps and --epochs contradict each other"),
        ("--cache none --cache-dir x", "--cache-dir has no effect with --cache none"),
        ("--cache ram", "--cache takes one of [auto, none, disk, device]"),
        ("--data folder --train-scenes 3", "--train-scenes and --test-scenes apply to --data scenes only"),
        ("--heads [liner]", "unknown probing head 'liner'"),
        ("--tasks [locale]", "unknown probing task 'locale'"),
        ("--seeds 0", "seeds must be at least 1"),
        ("--protocol best", "--protocol takes one of [fixed, published]"),
        ("--things-only", "--things-only applies to COCO-Stuff only"),
        ("--data /nonexistent", "/nonexistent"),
        ("nothing_like_this", "unknown backbone 'nothing_like_this'"),
    ],
)
def test_bad_use_is_one_line(
    options: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in line_of(capsys, f"{options} --out {tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_backbones_keep_their_order_and_names() -> None:
    config = ProbeCommandConfig(backbone="clip-vit-b, mine=runs/a=b ,runs/c")
    assert config.named_backbones() == {"clip-vit-b": "clip-vit-b", "mine": "runs/a=b", "runs/c": "runs/c"}


def test_options_apply_to_folders_of_transformers(tmp_path: Path) -> None:
    _, folder = folder_of("dinov2", tmp_path)
    (backbone,) = load_backbones(ProbeCommandConfig(backbone=str(folder), image_size=48)).values()
    assert backbone.grid == (6, 6)
    kept, drawn = (
        load_backbones(ProbeCommandConfig(backbone=f"x={folder}", weights=weights))["x"].vit.cls_token
        for weights in ("pretrained", "none")
    )
    assert not torch.equal(kept, drawn)


def test_an_image_size_applies_to_exports_and_names(tmp_path: Path) -> None:
    small = create_backbone("vit_tiny_patch16_224", weights="none", image_size=32, model_kwargs={"depth": 1})
    save_backbone(small, tmp_path / "export")
    _, folder = folder_of("dinov2", tmp_path / "tower")
    names = f"a={tmp_path / 'export'},b={folder}"
    for size, grids in ((48, [(3, 3), (6, 6)]), ((32, 64), [(2, 4), (4, 8)])):
        loaded = load_backbones(ProbeCommandConfig(backbone=names, image_size=size)).values()
        assert [backbone.grid for backbone in loaded] == grids
    with pytest.raises(UserError, match="--model-kwargs applies to names only"):
        load_backbones(ProbeCommandConfig(backbone=str(tmp_path / "export"), model_kwargs={"depth": 2}))


# -- other layers ------------------------------------------------------------------------------------------


DEEP = TINY.replace("depth=1", "depth=3")


def test_a_layer_gives_the_tokens_that_a_language_model_reads() -> None:
    whole = load_backbones(options(DEEP))[VIT].eval()
    cut = load_backbones(options(f"{DEEP} --layer -2"))[VIT].eval()
    images = whole.normalise(torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8))
    with torch.no_grad():
        assert torch.equal(cut.tokens(images), whole.tokens(images, layer=-2, norm=False))
        for last in ("--layer -1", "--layer 2"):
            same = load_backbones(options(f"{DEEP} {last}"))[VIT].eval()
            assert torch.equal(same.tokens(images), whole.tokens(images))


def options(command: str) -> ProbeCommandConfig:
    found = parse("probe", [VIT, *shlex.split(command)])
    assert isinstance(found, ProbeCommandConfig)
    return found


def test_cached_features_of_two_layers_are_not_mixed_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for function in ("write_probe_report", "build_report"):
        monkeypatch.setattr(f"localign.probing.command.{function}", lambda folder: [])
    own = f"{VIT} {DEEP} --heads [linear] --tasks [local] --cache disk --cache-dir {tmp_path}/cache"
    last = probe(f"{own} --out {tmp_path}/last")
    said = line_of(capsys, f"{own} --layer -2 --out {tmp_path}/other")
    assert "holds features of another backbone" in said
    penultimate = probe(f"{own.replace('/cache', '/new')} --layer -2 --out {tmp_path}/penultimate")
    (key,) = {
        json.dumps(json.loads((tmp_path / "new" / VIT / split / "cache.json").read_text())["key"]["layer"])
        for split in ("train", "test")
    }
    assert key == "1"
    assert penultimate["notes"][0].endswith(
        "Tokens are those of block -2, without the final norm unless that is the last block."
    )
    assert penultimate["config"]["layer"] == -2
    results = [content["probe"][VIT][0]["results"] for content in (last, penultimate)]
    assert results[0] != results[1]


def test_a_layer_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for layer in (3, -4):
        said = line_of(capsys, f"{VIT} {DEEP} --layer {layer} --out {tmp_path}/out")
        assert f"{VIT} has 3 blocks; there is no layer {layer}" in said
