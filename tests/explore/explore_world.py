"""Tiny models, images, predictions and answers for pages of `localign explore`."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image

from localign.alignment.export import export_student
from localign.alignment.student import Student, build_student
from localign.backbones import Backbone, save_backbone
from localign.backbones.export import content_hash

SIDE, PATCH, WIDTH, CLASSES = 24, 4, 12, 3
PATCHES = (SIDE // PATCH) ** 2
HOSTILE = "<img src=x onerror=alert(1)></script>\u202e.png"
"""A file name that would run a script where it is not escaped; it may hold no slash."""
HOSTILE_FILE = HOSTILE.replace("/", "")


def tiny_vit(seed: int = 0, side: int | tuple[int, int] = SIDE, width: int = WIDTH) -> Backbone:
    """A ViT with a class token and 6 x 6 patches."""
    torch.manual_seed(seed)
    kwargs: dict[str, Any] = {
        "img_size": side,
        "patch_size": PATCH,
        "embed_dim": width,
        "depth": 2,
        "num_heads": 2,
    }
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **kwargs)
    for parameter in vit.parameters():  # far from constant maps
        torch.nn.init.normal_(parameter, std=0.4)
    return Backbone(vit, name="tiny", architecture="vit_tiny_patch16_224", model_kwargs=kwargs).eval()


def tiny_student(baseline: Backbone) -> Student:
    """A student that differs from its teacher."""
    torch.manual_seed(1)
    student = build_student(baseline, soft_cap=None, decoder_depth=1)
    for parameter in student.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return student.eval()


@dataclass(frozen=True)
class World:
    """Folders to give to the command."""

    root: Path
    baseline: Backbone
    student: Student

    @property
    def command(self) -> list[str]:
        """The models and images of a command line."""
        models = [f"baseline={self.root / 'baseline'}", f"aligned={self.root / 'aligned'}"]
        return ["explore", *models, "--images", str(self.root / "images")]

    @property
    def everything(self) -> list[str]:
        """A command line with predictions and answers."""
        folders = [f"baseline={self.root / 'eval0'}", f"aligned={self.root / 'eval1'}"]
        return [*self.command, "--probe", str(self.root / "probe"), "--vlm", *folders]


def make_world(root: Path, images: int = 4) -> World:
    """Write models, images, a probing run's pictures and two evaluations."""
    baseline = tiny_vit()
    student = tiny_student(baseline)
    save_backbone(baseline, root / "baseline")
    facts = {
        "method": "MaskEmbed",
        "teacher_sha256": content_hash(baseline.vit.state_dict()),
        "target_scale": 1.5,
        "run": {"target": "penultimate"},
    }
    export_student(student, root / "aligned", provenance=facts)
    draw = np.random.default_rng(0)
    (root / "images").mkdir()
    for number in range(images):
        name = HOSTILE_FILE if number == 0 else f"photo{number}.png"
        blocks = draw.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((40, 30), Image.Resampling.NEAREST).save(root / "images" / name)
    _write_predictions(root / "probe", draw)
    for model in (0, 1):
        _write_answers(root / f"eval{model}", root / "images", model)
    return World(root, baseline, student)


def _write_predictions(folder: Path, draw: np.random.Generator) -> None:
    folder.mkdir()
    truth = draw.random((2, PATCHES, CLASSES)) < 0.4
    truth[..., 0] |= ~truth.any(-1)
    probability = {
        f"probability_{name}": (truth * 0.3 + draw.random(truth.shape) * 0.6).astype(np.float16)
        for name in ("baseline", "aligned")
    }
    np.savez_compressed(
        folder / "pictures.npz",
        allow_pickle=False,
        images=draw.integers(0, 256, (2, 3, SIDE, SIDE), dtype=np.uint8),
        grid=np.asarray((SIDE // PATCH, SIDE // PATCH)),
        truth=truth,
        class_names=np.asarray(["unlabeled", "cat", "<b>dog"]),
        **probability,
    )


def answer(number: int, model: int, image: Path, **facts: Any) -> dict[str, Any]:
    """One line of an answers.jsonl. Models answer differently where the number is odd."""
    right = model == 1 or number % 2 == 0
    return {
        "benchmark": "pope", "version": 1, "id": f"q{number}", "image": str(image), "split": "adversarial",
        "message": f"Is there a <i>cat</i> in image {number}?", "prompt": "", "choices": [],
        "payload": {"answer": "yes"},
        "answer": "Yes." if right else "<b>No</b>", "frame": None, "score": float(right),
        "parsed": "yes" if right else "no", "truth": "yes", **facts,
    }  # fmt: skip


def _write_answers(folder: Path, images: Path, model: int) -> None:
    folder.mkdir()
    lines = [answer(n, model, images / "photo1.png") for n in range(4)]
    box = {
        "benchmark": "refcoco",
        "payload": {"box": [4, 3, 20, 15], "size": [40, 30]},
        "truth": [0.1, 0.1, 0.5, 0.5],
    }
    parsed = [0.1, 0.1, 0.5, 0.6] if model else [0.6, 0.6, 2.0, 0.9]
    lines.append(answer(5, model, images / "photo2.png", **box, answer=str(parsed), parsed=parsed))
    lines.append(answer(6, model, images / "gone.png"))
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def content_of(page: str) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The facts and arrays inside a page, read as the browser reads them."""
    scripts = dict(
        re.findall(r'<script type="application/[a-z-]+" id="(\w+)">(.*?)</script>', page, re.DOTALL)
    )
    content: dict[str, Any] = json.loads(scripts["content"])
    blob = base64.b64decode(scripts["blob"])
    arrays = {
        name: np.frombuffer(
            blob, np.dtype(place["dtype"]).newbyteorder("<"), int(np.prod(place["shape"])), place["offset"]
        ).reshape(place["shape"])
        for name, place in content["arrays"].items()
    }
    return content, arrays


def cosines(features: NDArray[Any]) -> NDArray[np.float64]:
    """Cosine similarity of all pairs of patches of each image: ``(k, n, d)`` to ``(k, n, n)``."""
    unit = features.astype(np.float64)
    unit = unit / np.linalg.norm(unit, axis=-1, keepdims=True)
    return np.asarray(unit @ unit.transpose(0, 2, 1))
