"""Lists of images leave their folder only with --allow-outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from localign.cli import main
from localign.data.sources import open_source
from localign.errors import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with an image, beside an image that does not belong to it."""
    for name in ("data/sub/a.png", "other/secret.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path / "data"


def write(root: Path, suffix: str, names: list[str]) -> str:
    lines = [json.dumps({"path": n}) for n in names] if suffix == ".jsonl" else names
    heading = ["path"] if suffix in (".csv", ".tsv") else []
    (root / f"list{suffix}").write_text("\n".join([*heading, *lines]) + "\n")
    return str(root / f"list{suffix}")


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize(
    "name", ["../other/secret.png", "sub/../../other/secret.png", "{parent}/other/secret.png"]
)
def test_paths_that_leave_the_folder_need_the_option(root: Path, suffix: str, name: str) -> None:
    spec = write(root, suffix, ["sub/a.png", name.format(parent=root.parent)])
    with pytest.raises(UserError, match=r"outside its folder, such as .*secret\.png.*--allow-outside"):
        open_source(spec)
    assert len(open_source(spec, allow_outside=True)) == 2


@pytest.mark.parametrize("name", ["sub/a.png", "./sub/a.png", "sub/../sub/a.png", "{root}/sub/a.png"])
def test_paths_inside_the_folder_need_no_option(root: Path, name: str) -> None:
    spec = write(root, ".txt", [name.format(root=root)])
    assert open_source(spec).load(0).size == (8, 8)


def test_links_in_the_folder_lead_anywhere(root: Path) -> None:
    (root / "linked").symlink_to(root.parent / "other")
    assert open_source(write(root, ".txt", ["linked/secret.png"])).load(0).size == (8, 8)


def test_mixtures_pass_the_option_on(root: Path) -> None:
    spec = write(root, ".txt", ["../other/secret.png"])
    (root / "mix.yaml").write_text(f"mixture: [{{data: {Path(spec).name}}}, {{data: sub}}]\n")
    with pytest.raises(UserError, match="--allow-outside"):
        open_source(str(root / "mix.yaml"))
    assert len(open_source(str(root / "mix.yaml"), allow_outside=True)) == 2


def test_commands_take_the_option(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "stats", write(root, ".txt", ["../other/secret.png"]), "--workers", "0"]
    assert main(command) == 2
    assert "--allow-outside" in capsys.readouterr().err
    assert main([*command, "--allow-outside"]) == 0
