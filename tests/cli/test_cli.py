"""The command line: what users type, what they get, and the one line when it is wrong."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import localign
from localign.cli import COMMANDS, build_parser, main, parse, split_command

TINY = (
    "--backbone vit_tiny_patch16_224 --weights none "
    "--model-kwargs img_size=24 patch_size=8 embed_dim=24 depth=2 num_heads=2"
)
ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT.parent / "shared" / "golden" / "maskembed"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(draw.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert (
        main(shlex.split(f"align {TINY} --data {photos} --val {photos} --steps 3 --workers 0 --out {out}"))
        == 0
    )
    return out


def line_of(capsys: pytest.CaptureFixture[str], command: str, code: int = 2) -> str:
    """The error line of a command that must fail, without a traceback."""
    capsys.readouterr()
    assert main(shlex.split(command)) == code
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("localign: ")]
    assert len(errors) == 1
    assert errors[0] == lines[-1]
    assert "Traceback" not in " ".join(lines)
    return errors[0]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help_with_every_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    fields = [field.name for field in dataclasses.fields(COMMANDS[name].config())]
    assert all(f"--{field.replace('_', '-')}" in text for field in fields)
    assert "_" not in "".join(re.findall(r"--[a-z_-]+", text))


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_is_documented(name: str) -> None:
    helps = {a.dest: a.help for a in build_parser(name)._actions}
    fields = [field.name for field in dataclasses.fields(COMMANDS[name].config())]
    undocumented = [field for field in fields if not helps.get(field)]
    assert undocumented == []


def test_options_become_typed_fields() -> None:
    config = parse(
        "align",
        shlex.split("--model-kwargs depth=2 img_size=96 --steps=30 --compile --resume --betas [0.9,0.99]"),
    )
    assert config.model_kwargs == {"depth": 2, "img_size": 96}
    assert (config.steps, config.compile, config.resume, config.betas) == (30, True, "must", (0.9, 0.99))


def test_a_config_file_and_overrides_make_one_config(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("steps: 5\nlr: 0.01\nmodel_kwargs: {depth: 3}\n")
    config = parse("align", ["--config", str(file), "--lr", "0.02"])
    assert (config.steps, config.lr, config.model_kwargs) == (5, 0.02, {"depth": 3})


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("aline", "unknown command 'aline'; did you mean 'align'"),
        ("align --backbne x", "unknown option --backbne; did you mean '--backbone'"),
        ("align --steps x", "--steps takes int, null, not 'x'"),
        ("align --steps", "--steps needs a value"),
        ("align --crop foo", "--crop takes one of [published, rkrc, rrc, none], null, not 'foo'"),
        ("align --steps 3 --epochs 2", "--steps and --epochs contradict each other"),
        ("align --model-kwargs depth", "--model-kwargs takes name=value pairs"),
        ("align stray", "unexpected argument 'stray'"),
        ("align --backbone vit_tinny_patch16_224", "unknown backbone 'vit_tinny_patch16_224'; did you mean"),
        ("align --keep-ratio 0.3", "uniform masks draw their own number of visible patches"),
        ("align --device cuda:99", "there is no device cuda:99"),
        ("export", "export needs a run folder or the name of a backbone"),
        ("import", "import needs a file"),
        ("list cats", "--what takes one of [backbones, recipes]"),
        ("verify-reference", "needs the folder of reference numbers"),
        ("report /nonexistent", "/nonexistent"),
        ("probe nothing_like_this", "unknown backbone 'nothing_like_this'"),
    ],
)  # fmt: skip
def test_bad_use_is_one_line_and_exit_code_2(
    command: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in line_of(capsys, command)


def test_an_unknown_key_in_a_config_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("stepz: 5\n")
    assert "unknown key 'stepz'" in line_of(capsys, f"align --config {file}")


def test_bad_data_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, text = tmp_path / "empty", tmp_path / "text"
    empty.mkdir()
    text.mkdir()
    (text / "notes.txt").write_text("no image")
    out = tmp_path / "out"
    assert str(empty) in line_of(capsys, f"align {TINY} --data {empty} --steps 1 --out {out}")
    assert str(text) in line_of(capsys, f"align {TINY} --data {text} --steps 1 --out {out}")
    assert "missing" in line_of(capsys, f"align {TINY} --data {tmp_path / 'missing'} --steps 1 --out {out}")
    assert not out.exists()


def test_masks_that_do_not_fit_are_one_line(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"align {TINY} --data {photos} --steps 1 --mask block --out {tmp_path / 'out'}"
    assert "do not fit" in line_of(capsys, command)


def test_weights_that_do_not_fit_are_named(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = localign.load(
        "vit_tiny_patch16_224", weights="none", model_kwargs={"depth": 1, "embed_dim": 24}
    )
    state = {k: v.contiguous() for k, v in backbone.vit.state_dict().items()}
    state["extra.weight"] = state.pop("norm.bias")
    save_file(state, tmp_path / "w.safetensors")
    command = (
        f"export vit_tiny_patch16_224 --weights {tmp_path / 'w.safetensors'} --model-kwargs depth=1 embed_dim=24 "
        f"--out {tmp_path / 'out'}"
    )
    line = line_of(capsys, command)
    assert "missing 1 (norm.bias)" in line
    assert "extra 1 (extra.weight)" in line


class _Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, ("touch /tmp/localign-payload-ran",)


def test_a_pickle_with_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = Path("/tmp/localign-payload-ran")
    marker.unlink(missing_ok=True)
    file = tmp_path / "evil.pth.tar"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "args": _Payload()}, file)
    with file.open("rb") as handle, pytest.raises(pickle.UnpicklingError):
        torch.load(handle, weights_only=True)
    assert "refused" in line_of(capsys, f"import {file} --backbone in1k-vit-t --out {tmp_path / 'out'}")
    assert not marker.exists()


def test_an_alignment_leaves_a_whole_run_folder(run: Path) -> None:
    for name in ("config.yaml", "log.jsonl", "results.json", "report.html", "pictures.npz"):
        assert (run / name).stat().st_size > 0
    for name in ("model.safetensors", "config.json", "decoder.safetensors"):
        assert (run / "export" / name).stat().st_size > 0
    results = json.loads((run / "results.json").read_text())
    assert results["steps"] == 3
    assert results["images_per_second"] > 0
    assert results["versions"]["torch"] == str(torch.__version__)


def test_python_loads_a_run_and_its_decoder(run: Path) -> None:
    backbone = localign.load(run)
    images = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    tokens = backbone.tokens(backbone.normalise(images))
    assert tokens.shape == (2, 1 + 9, 24)
    student = localign.load(run, decoder=True)
    keep = torch.ones(2, 1, 9, dtype=torch.bool)
    assert student(backbone.normalise(images), keep).shape == (2, 10, 24)
    torch.testing.assert_close(student.encoder.backbone.tokens(backbone.normalise(images)), tokens)


def test_python_aligns_like_the_command(run: Path, photos: Path, tmp_path: Path) -> None:
    kwargs = {"img_size": 24, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    outcome = localign.align(
        "vit_tiny_patch16_224", data=str(photos), val=str(photos), weights="none", model_kwargs=kwargs,
        steps=3, workers=0, out=str(tmp_path / "run"),
    )  # fmt: skip
    ours, theirs = (load_file(p / "export" / "model.safetensors") for p in (outcome.folder, run))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_a_second_run_into_the_same_folder_is_refused(
    run: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"align {TINY} --data {photos} --val {photos} --steps 3 --workers 0 --out {run}"
    assert "already holds a run" in line_of(capsys, command)
    assert "lr: 0.0003 before, 0.5 now" in line_of(capsys, f"{command} --resume --lr 0.5")


def test_export_writes_what_the_run_exported(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), "--out", str(tmp_path / "again"), "--checkpoint", "best"]) == 0
    for name in ("model.safetensors", "decoder.safetensors"):
        ours, theirs = load_file(tmp_path / "again" / name), load_file(run / "export" / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_list_shows_the_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "backbones"]) == 0
    out = capsys.readouterr().out
    assert "siglip-vit-so400m" in out
    assert "scenes-vit" in out


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="../shared/golden/maskembed is not there")
def test_verify_reference_passes_and_can_fail(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify-reference", str(GOLDEN)]) == 0
    summary = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert summary["largest_error"] <= 1e-5
    assert main(["verify-reference", str(GOLDEN), "--tol", "1e-12"]) == 1


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="../shared/golden/maskembed is not there")
def test_import_gives_the_published_encoder(tmp_path: Path) -> None:
    kwargs = " ".join(
        f"{k}={v}" for k, v in json.loads((GOLDEN / "meta.json").read_text())["cls"]["vit"].items()
    )
    command = (
        f"import {GOLDEN / 'cls.pth.tar'} --backbone vit_base_patch16_224 --model-kwargs {kwargs} "
        f"--decoder --out {tmp_path / 'imported'}"
    )
    assert main(shlex.split(command)) == 0
    reference = load_file(GOLDEN / "cls.safetensors")
    student = localign.load(tmp_path / "imported", decoder=True)
    with torch.no_grad():
        encoded = student.encoder(reference["images"])
    torch.testing.assert_close(encoded, reference["student.encoder"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "heads", [["linear", "mlp"], ["linear,mlp"], ["linear,", "mlp"], ["[linear, mlp]"], ['["linear", "mlp"]']]
)
def test_a_list_is_written_as_one_likes(heads: list[str]) -> None:
    assert parse("probe", ["--heads", *heads, "--seeds", "2"]).heads == ("linear", "mlp")


def test_commands_of_two_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert split_command(["vlm", "train", "--seed", "1"]) == ("vlm train", ["--seed", "1"])
    assert parse("vlm check", ["a.json"]).data == ("a.json",)
    assert main(["vlm"]) == 2
    assert "localign vlm what? there is vlm train," in capsys.readouterr().err
    assert main(["vlm", "trian"]) == 2
    assert "localign vlm what?" in capsys.readouterr().err
