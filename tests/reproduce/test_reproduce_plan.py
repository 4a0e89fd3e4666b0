"""Plans of `localign reproduce`: rows and settings are those of the paper, and equal runs are shared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from numpy.typing import NDArray
from PIL import Image

from localign.alignment import AlignConfig
from localign.backbones import CATALOGUE
from localign.errors import UserError
from localign.probing import LabelledSource
from localign.report.tables.published import TABLE1, TABLE4, TABLE5
from localign.reproduce import TARGETS, ReproduceConfig, worlds
from localign.reproduce.pieces import LabelledData
from localign.reproduce.plan import Planner, ReproductionPlan
from localign.reproduce.worlds import open_world


class NoImages(LabelledSource):
    """A labelled source for plans, which do not load images."""

    kind = "none"
    classes: tuple[str, ...] = ("unlabeled", "thing")

    def __len__(self) -> int:
        return 64

    def name(self, index: int) -> str:
        raise NotImplementedError

    def load_labelled(self, index: int) -> tuple[Image.Image, NDArray[Any]]:
        raise NotImplementedError

    def fingerprint(self) -> str:
        return "none"


def plan_of(**options: Any) -> ReproductionPlan:
    config = ReproduceConfig(**options)
    data = LabelledData(NoImages(), NoImages())
    return Planner(config, open_world(config.world, quick=config.quick), data).plan()


def aligned(plan: ReproductionPlan) -> dict[str, AlignConfig]:
    """Row -> config of its alignment, first seed."""
    first = {name: seeds[0].alignment for name, seeds in plan.probings.items()}
    return {name: alignment.config for name, alignment in first.items() if alignment is not None}


def test_the_rows_are_those_of_the_paper() -> None:
    assert [r.name for r in TARGETS["table1"].rows if r.name not in TABLE1] == []
    assert {r.name for r in TARGETS["table1"].rows} == TABLE1.keys()
    assert {r.name for r in TARGETS["table4"].rows} == TABLE4.keys()
    names = {r.name for r in TARGETS["table5"].rows}
    assert names == {*TABLE5, *(f"{n}-baseline" for n in TABLE5)}
    for table, paper in (("table1", TABLE1), ("table4", TABLE4)):
        against = {r.name: r.against for r in TARGETS[table].rows if r.recipe}
        assert against == {n: paper[n].teacher for n in against}


def test_rows_of_table_1_on_scenes_differ_in_method_alone() -> None:
    configs = aligned(plan_of(target="table1"))
    shared = (
        "backbone",
        "data",
        "steps",
        "epochs",
        "batch_size",
        "lr",
        "warmup_steps",
        "soft_cap",
        "seed",
        "crop",
    )
    assert all(len({getattr(c, name) for c in configs.values()}) == 1 for name in shared)
    assert {n: (c.objective, c.decoder, c.target, c.loss) for n, c in configs.items()} == {
        "clipself": ("clipself", "none", "cls", "cosine"),
        "clipself-decoder": ("clipself", "transformer", "cls", "cosine"),
        "additive": ("additive", "none", "cls", "mse"),
        "averaging-1": ("averaging", "none", "cls", "mse"),
        "averaging-3": ("averaging", "none", "cls", "mse"),
        "maskembed-1": ("maskembed", "transformer", "last", "mse"),
        "maskembed-3": ("maskembed", "transformer", "last", "mse"),
    }
    assert {n: c.masks().masks_per_image for n, c in configs.items() if c.mask} == {
        "additive": 3, "averaging-1": 1, "averaging-3": 3, "maskembed-1": 1, "maskembed-3": 3,
    }  # fmt: skip


def test_rows_of_table_4_on_scenes() -> None:
    plan = plan_of(target="table4")
    configs = aligned(plan)
    targets = [configs[f"target-{n}"].target for n in ("cls", "last", "penultimate")]
    assert targets == ["cls", "last", "penultimate"], "what a row states it keeps"
    default = configs["in1k-25"]
    assert configs["augment-crop"] == configs["target-last"] == default
    one_block = replace(default, keep_ratio=0.4, complement=False, all_visible=False)
    for name, expected in (
        ("masks-block", one_block),
        ("masks-uniform-complement-visible", replace(default, mask="uniform")),
    ):
        assert replace(configs[name], out=expected.out) == expected
    assert default.steps is not None
    assert configs["in1k-50"].steps == 2 * default.steps
    assert configs["in1k-2"].steps == round(0.08 * default.steps)
    assert (configs["augment-mixup"].mixup, configs["augment-cutmix"].cutmix) == (0.5, 1.0)
    assert {c.lr for c in configs.values()} == {default.lr}
    missing = TABLE4.keys() - plan.probings.keys()
    assert missing == {n for n in TABLE4 if n.startswith(("in21k", "clip"))}
    said = " ".join(plan.notes)
    assert all(name in said for name in missing), "what is left out is named"


def test_equal_rows_share_their_runs() -> None:
    plan = plan_of(target="table4", quick=True)
    rows = len(plan.rows)
    shared = len(plan.pieces())
    assert shared < 2 * rows - 1
    labels = [p.label for p in plan.pieces()]
    assert len(set(zip(labels, map(type, plan.pieces()), strict=True))) == shared


def test_the_published_runs_are_the_recipes(photographs: Path) -> None:
    options = {"world": "coco", "data": str(photographs), "train_data": str(photographs)}
    plan = plan_of(target="table5", **options)
    configs = aligned(plan)
    assert configs.keys() == CATALOGUE.keys() - {"moco-vit-b"}
    assert "moco-vit-b" in " ".join(plan.notes)
    large = configs["clip-vit-l"]
    assert (large.lr, large.batch_size, large.epochs, large.target) == (2e-4, 1024, 5, "penultimate")
    assert large.data == str(photographs), "there is no folder imagenet-21k in it"
    assert configs["mae-vit-b"].data == str(photographs / "imagenet-1k" / "train")
    assert configs["mae-vit-b"].warmup_epochs == 1
    assert all(len(p) == 1 for p in plan.probings.values())


def test_weight_files_take_the_place_of_downloads(photographs: Path) -> None:
    (photographs / "plain" / "moco-vit-b.pth.tar").touch()
    options = {"world": "coco", "data": str(photographs), "train_data": str(photographs)}
    plan = plan_of(target="table5", weights=str(photographs / "plain"), **options)
    configs = aligned(plan)
    assert configs["moco-vit-b"].weights == str(photographs / "plain" / "moco-vit-b.pth.tar")
    assert configs["clip-vit-b"].weights == "pretrained"


def test_a_quick_plan_of_published_runs_is_short(photographs: Path) -> None:
    options = {"world": "ade20k", "data": str(photographs), "train_data": str(photographs / "plain")}
    plan = plan_of(target="table1", quick=True, **options)
    assert all(p.steps <= 500 for p in plan.pieces())
    assert str(photographs / "plain") in " ".join(plan.notes)


def test_other_images_make_another_run(photographs: Path) -> None:
    options = {"world": "coco", "data": str(photographs), "train_data": str(photographs / "plain")}
    before = plan_of(target="fig7", **options)
    Image.new("RGB", (32, 32)).save(photographs / "plain" / "more.png")
    after = plan_of(target="fig7", **options)
    assert len({p.key for p in before.pieces()} & {p.key for p in after.pieces()}) == 1, "the probing before"


@pytest.mark.parametrize("name", ["coco", "ade20k"])
def test_published_runs_have_their_recipes_length_and_quick_ones_do_not(name: str) -> None:
    whole, quick = open_world(name), open_world(name, quick=True)
    assert not whole.align.keys() & {"steps", "epochs", "batch_size", "lr"}
    assert quick.align["epochs"] is None
    assert quick.align["steps"] <= 500


def test_a_quick_world_keeps_all_else() -> None:
    whole, quick = open_world("scenes"), open_world("scenes", quick=True)
    assert quick.align["steps"] < whole.align["steps"]
    assert quick.align.keys() == whole.align.keys()
    assert quick.rows.keys() >= whole.rows.keys()


def test_a_misspelt_option_of_a_world_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "worlds").mkdir()
    (tmp_path / "worlds" / "mine.yaml").write_text("align: {stepz: 3}\n")
    monkeypatch.setattr(worlds, "FOLDER", tmp_path)
    with pytest.raises(UserError, match="unknown options: stepz"):
        open_world("mine")
