"""Small runs of the demo, the probe command and the pre-training, from end to end."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import localign
from localign.backbones import Backbone, load_backbone, save_backbone
from localign.cli import main
from localign.data.cached_scenes import CachedScenes
from localign.data.scenes import SceneConfig, SceneSource
from localign.demo.run import _check_same_demo
from localign.engine import run_folder
from localign.errors import UserError
from localign.options.demo import DemoConfig
from localign.options.probe import ProbeCommandConfig
from localign.probing.command import load_backbones
from localign.report.tables.rows import MetricKey, before_after

SMALL = (
    "--steps 4 --batch-size 8 --probe-steps 6 --probe-batch 8 --train-scenes 32 --test-scenes 24 "
    "--workers 0 --device cpu"
)
COCO = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco-sample"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A demo with few steps and small validation sets."""
    out = tmp_path_factory.mktemp("demo") / "run"
    align_config = DemoConfig.align_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("localign.demo.run.VALIDATION_SCENES", 24)
        patch.setattr(
            DemoConfig, "align_config", lambda *a: replace(align_config(*a), val_images=16, scale_images=16)
        )
        assert main(shlex.split(f"demo --out {out} --seeds 2 {SMALL}")) == 0
        yield out


def embedded_backbone() -> Backbone:
    backbone = localign.load("scenes-vit")
    assert isinstance(backbone, Backbone)
    return backbone


def test_the_embedded_backbone_fits_the_default_scenes() -> None:
    backbone = embedded_backbone()
    size = SceneConfig().image_size
    assert backbone.image_size == (size, size)
    folder = Path(localign.__file__).parent / "assets" / "scenes-vit"
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 3 * 2**20


def test_the_demo_compares_both_backbones_on_every_seed(demo: Path) -> None:
    results = json.loads((demo / "results.json").read_text())
    assert results["seeds"] == [0, 1]
    for name in ("baseline", "aligned"):
        assert len(results["probe"][name]) == 2
        for seed, probe in enumerate(results["probe"][name]):
            assert probe["config"]["seed"] == seed
            assert set(probe["results"]) == {"val", "test"}
            assert set(probe["results"]["test"]) == {"transformer", "linear"}
    baseline, aligned = ([p["config"] for p in results["probe"][name]] for name in ("baseline", "aligned"))
    assert baseline == aligned  # the same recipe for both
    assert (demo / "report.html").stat().st_size > 10_000
    assert "localign" in (demo / "explore.html").read_text()[:5000]


def test_an_unchanged_demo_costs_no_training(demo: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in demo.rglob("*.safetensors")}
    results = json.loads((demo / "results.json").read_text())
    assert main(shlex.split(f"demo --out {demo} --seeds 2 {SMALL}")) == 0
    assert {p: p.stat().st_mtime_ns for p in demo.rglob("*.safetensors")} == before
    assert json.loads((demo / "results.json").read_text())["probe"] == results["probe"]


@pytest.mark.slow
def test_one_seed_has_an_interval_over_images(
    tmp_path: Path, demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(demo, tmp_path / "demo")
    again = shlex.split(f"demo --out {tmp_path / 'demo'} {SMALL}")
    assert main(again) == 0
    assert "bootstrap interval of the difference over images" in " ".join(capsys.readouterr().out.split())
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    gain = next(d for d in results["differences"] if (d["head"], d["task"]) == ("linear", "local"))
    row = next(r for r in before_after(results) if r.key == MetricKey(gain["source"], "linear", "local"))
    low, high = gain["interval"]
    assert row.recall.half_width == pytest.approx((high - low) / 2)
    assert row.recall.difference == pytest.approx(gain["difference"])
    assert "over images, one seed" in (tmp_path / "demo" / "report.html").read_text()
    for path in (tmp_path / "demo").glob("probe-seed*.npz"):
        path.unlink()  # as in a demo of 0.1.0
    assert main(again) == 0
    assert "no interval can be given" in " ".join(capsys.readouterr().out.split())


def test_several_seeds_have_an_interval_over_seeds(demo: Path) -> None:
    results = json.loads((demo / "results.json").read_text())
    assert all(row.recall.seeds == 2 and row.recall.half_width is not None for row in before_after(results))


def test_the_full_demo_is_that_of_before() -> None:
    full, short = DemoConfig(full=True), DemoConfig()
    assert (full.steps, full.batch_size, full.train_scenes, full.test_scenes) == (1000, 64, 6000, 4000)
    assert (full.probe_config(0).steps, full.probe_config(0).until_converged) == (2000, False)
    assert short.probe_config(0).until_converged
    assert short.steps is not None
    assert short.steps < 1000
    assert DemoConfig(full=True, steps=7).steps == 7
    assert DemoConfig(probe_steps=5).probe_config(0).steps == 5


def test_a_full_demo_of_before_is_continued(tmp_path: Path) -> None:
    """Its folder has no option --full, and the sizes that --full has now."""
    saved = {k: v for k, v in run_folder.to_dict(DemoConfig(full=True)).items() if k != "full"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"command": "demo", "config": saved}))
    _check_same_demo(tmp_path, DemoConfig(full=True))
    with pytest.raises(UserError, match="steps: 1000 there"):
        _check_same_demo(tmp_path, DemoConfig())


def test_a_demo_with_other_settings_is_refused(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(f"demo --out {demo} --seeds 2 {SMALL} --lr 0.5")) == 2
    assert "lr: 0.001 there, 0.5 now" in capsys.readouterr().err


def test_cached_scenes_equal_drawn_scenes(tmp_path: Path) -> None:
    cached, source = CachedScenes(split="val", length=5), SceneSource(split="val", length=5)
    for index in range(5):
        assert np.array_equal(np.asarray(cached.load(index)), np.asarray(source.load(index)))
        assert np.array_equal(cached.load_labelled(index)[1], source.load_labelled(index)[1])
    assert cached.fingerprint() == source.fingerprint()
    assert cached.pair_presence().sum() == sum(len(source.scene(i).objects) for i in range(5))


def test_pretraining_exports_a_backbone_that_aligns(tmp_path: Path) -> None:
    small = "--steps 3 --batch-size 8 --warmup-steps 1 --scenes 16 --val-scenes 16 --workers 0 --width 24 --depth 2"
    assert main(shlex.split(f"pretrain --out {tmp_path / 'pre'} {small}")) == 0
    backbone = load_backbone(tmp_path / "pre" / "export")
    assert (backbone.width, backbone.depth, backbone.num_prefix_tokens) == (24, 2, 1)
    assert "val_recall" in json.loads((tmp_path / "pre" / "results.json").read_text())["final"]
    outcome = localign.align(
        str(tmp_path / "pre" / "export"), steps=2, batch_size=4, workers=0, val_images=8, scale_images=8,
        out=str(tmp_path / "run"),
    )  # fmt: skip
    assert outcome.results["steps"] == 2


@pytest.mark.slow
@pytest.mark.skipif(not COCO.is_dir(), reason="../shared/data/coco-sample is not there")
def test_probing_real_photographs_with_label_maps(tmp_path: Path) -> None:
    kwargs = "img_size=32 patch_size=8 embed_dim=24 depth=1 num_heads=2"
    command = (
        f"probe vit_tiny_patch16_224 --weights none --model-kwargs {kwargs} --data {COCO} --steps 3 --batch-size 8 "
        f"--heads [linear] --out {tmp_path / 'probe'}"
    )
    assert main(shlex.split(command)) == 0
    results = json.loads((tmp_path / "probe" / "results.json").read_text())
    (probe,) = results["probe"]["vit_tiny_patch16_224"]
    assert 0 <= probe["results"]["test"]["linear"]["local"]["macro_recall"] <= 1


def test_probing_needs_images_and_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    assert main(["probe", "scenes-vit", "--data", str(tmp_path)]) == 2
    assert "it needs images/, masks/ and classes.json" in capsys.readouterr().err


def test_features_of_a_photograph(tmp_path: Path) -> None:
    Image.fromarray(np.full((50, 60, 3), 90, np.uint8)).save(tmp_path / "a.jpg")
    backbone = embedded_backbone()
    image = Image.open(tmp_path / "a.jpg").resize(backbone.image_size[::-1])
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]
    tokens = backbone.tokens(backbone.normalise(pixels))
    assert tokens.shape == (1, backbone.num_prefix_tokens + backbone.num_patches, backbone.width)


def test_options_for_names_do_not_apply_to_exported_folders(tmp_path: Path) -> None:
    embedded = embedded_backbone()
    save_backbone(embedded, tmp_path / "kept")
    named = f"fresh=vit_tiny_patch16_224,kept={tmp_path / 'kept'}"
    small = {"img_size": 48, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    both = load_backbones(ProbeCommandConfig(backbone=named, weights="none", model_kwargs=small))
    assert both["fresh"].depth == 1
    for name, value in embedded.state_dict().items():
        torch.testing.assert_close(both["kept"].state_dict()[name], value)
    with pytest.raises(UserError, match="--weights applies to names only"):
        load_backbones(ProbeCommandConfig(backbone=str(tmp_path / "kept"), weights="none"))
