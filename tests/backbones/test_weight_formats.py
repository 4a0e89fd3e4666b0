"""Files that are not weights are called what they are, bounds come before memory, and wrappers' prefixes come off."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import resource
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

from localign.backbones.create import _load_weight_file
from localign.backbones.weights import read_file, read_state_dict
from localign.errors import UserError
from localign.vlm.scoring.readers import read_pickle


def torch_bytes(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def tar_bytes() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.pth"))
    return buffer.getvalue()


def zip_bytes(name: str, content: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


STATE = {"a": torch.ones(2)}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 346000000\n"
INDEX = json.dumps(
    {"metadata": {"total_size": 1}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
).encode()
PAGE = b"<!DOCTYPE html><html><head><title>403 Forbidden</title></head></html>"
WRONG: dict[str, tuple[str, bytes, str]] = {
    "LFS pointer": ("w.safetensors", POINTER, "Git LFS pointer"),
    "LFS pointer as pth": ("w.pth", POINTER, "Git LFS pointer"),
    "page": ("w.safetensors", PAGE, "web page"),
    "page after a BOM": ("w.pth", b"\xef\xbb\xbf\n" + PAGE.lower(), "web page"),
    "error of a bucket": ("w.pth", b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>", "web page"),
    "index": ("model.safetensors.index.json", INDEX, "index of a checkpoint in several files"),
    "index called safetensors": ("model.safetensors", INDEX, "index of a checkpoint in several files"),
    "index called bin": ("pytorch_model.bin", INDEX, "index of a checkpoint in several files"),
    "JSON": ("w.pth", b'{"error": "Invalid credentials"}', "JSON text"),
    "gzip called safetensors": ("w.safetensors", gzip.compress(save(STATE)), "packed with gzip"),
    "gzip called pth": ("w.pth", gzip.compress(torch_bytes(STATE)), "packed with gzip"),
    "zstd": ("w.pth", b"\x28\xb5\x2f\xfd" + b"\0" * 99, "packed with zstd"),
    "tar": ("w.pth.tar", tar_bytes(), "tar archive"),
    "HDF5": ("w.h5", b"\x89HDF\r\n\x1a\n" + b"\0" * 99, "HDF5"),
    "torch file called safetensors": ("w.safetensors", torch_bytes(STATE), "ending .pth"),
    "pickle called safetensors": ("w.safetensors", pickle.dumps({"a": 1}), "ending .pth"),
    "safetensors called pth": ("w.pth", save(STATE), "ending .safetensors"),
    "npz": ("w.npz", zip_bytes("a.npy", b"x"), "without torch's data.pkl"),
    "empty": ("w.pth", b"", "is empty"),
    "GGUF": ("w.gguf", b"GGUF\3\0\0\0", "GGUF"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_is_called_what_it_is(tmp_path: Path, case: str) -> None:
    name, content, said = WRONG[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_state_dict(tmp_path / name)
    line = str(caught.value)
    assert said in line, line
    assert name in line
    assert "\n" not in line


def recompressed(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return buffer.getvalue()


def legacy_storage(count: int) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue().replace(b"K\x03", b"J" + struct.pack("<i", count), 1)


ARRAY = b"\x80\x02}X\x01\x00\x00\x00ac__builtin__\nbytearray\n\x8a\x05\x00\xe4\x0b\x54\x02\x85Rs."
"""``{"a": bytearray(10**10)}`` as torch's reader takes it."""


def array_in_archive() -> bytes:
    content, buffer = torch_bytes({"a": torch.ones(1)}), io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, ARRAY if entry.filename.endswith("data.pkl") else old.read(entry))
    return buffer.getvalue()


EXPANDED = torch.zeros(1).expand(200_000, 5_000)
HUGE: dict[str, Callable[[], Any]] = {
    "compressed zeros": lambda: recompressed(torch_bytes({"a": torch.zeros(25_000_000)})),
    "legacy storage of 8 GB": lambda: legacy_storage(2**31 - 1),
    "array of bytes": array_in_archive,
    "array of bytes in an old file": lambda: ARRAY,
    "expanded": lambda: torch_bytes({"a": EXPANDED}),
    "sparse": lambda: torch_bytes({"a": torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (2**40,))}),
    "meta": lambda: torch_bytes({"a": torch.empty(2**40, device="meta")}),
    "safetensors header": lambda: struct.pack("<Q", 2**40) + b"{" + b" " * 99,
    "safetensors shape": lambda: safe_header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
    "safetensors overflow": lambda: safe_header({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]}}),
}  # fmt: skip


def safe_header(header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * 4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", HUGE)
def test_what_would_take_gigabytes_is_one_line_and_takes_none(tmp_path: Path, case: str) -> None:
    path = tmp_path / ("w.safetensors" if case.startswith("safetensors") else "w.pth")
    path.write_bytes(HUGE[case]())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)
    if sys.platform == "linux":
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_an_array_of_bytes_is_read(tmp_path: Path) -> None:
    for legacy in (False, True):
        content = {"a": torch.ones(2), "b": bytearray(b"abc")}
        torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
        assert read_file(tmp_path / "w.pth")["b"] == b"abc"


def test_a_compressed_file_of_ordinary_size_is_read(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(recompressed(torch_bytes(STATE)))
    assert torch.equal(read_state_dict(tmp_path / "w.pth")["a"], STATE["a"])


PICKLES: dict[str, bytes] = {
    "memo index": b"\x80\x02]r" + struct.pack("<I", 2**31) + b".",
    "largest memo index": b"\x80\x02]r" + struct.pack("<I", 2**32 - 1) + b".",
    "string": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"a.",
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"a.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"N.",
    "text memo index": b"]p99999999999\n.",
    "unicode": b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"a.",
    "code": pickle.dumps(os.getcwd),
    "empty": b"",
    "no end": b"\x80\x02]",
    "nothing on the stack": b".",
    "LFS pointer": POINTER,
}


HARMLESS: dict[str, Any] = {"memo index": [], "largest memo index": [], "text memo index": [], "frame": None}
"""A number that only the reader in C believes."""


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_takes_no_more_memory_than_its_file(tmp_path: Path, case: str) -> None:
    path = tmp_path / "refs.p"
    path.write_bytes(PICKLES[case])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if case in HARMLESS:
        assert read_pickle(path) == HARMLESS[case]
    else:
        with pytest.raises(UserError) as caught:
            read_pickle(path)
        assert "\n" not in str(caught.value)
    if sys.platform == "linux":
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_of_all_protocols_are_read(tmp_path: Path, protocol: int) -> None:
    value = [
        {"split": "val", "sentences": [{"sent": "rötes r\\x00"}], "box": (1.5, 2, 10**30, None, True)}
    ] * 2
    if protocol < 6:
        (tmp_path / "refs.p").write_bytes(pickle.dumps(value, protocol=min(protocol, 5)))
    assert read_pickle(tmp_path / "refs.p") == value


# -- prefixes --------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Stands for a ViT: names with and without dots."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.LayerNorm(4)


def random_state(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(t.shape, generator=generator) for name, t in Net().state_dict().items()}


PREFIXES = [
    "teacher.backbone.", "model.", "module.", "visual.trunk.", "student.", "_orig_mod.", "module.model.", "encoder.",
    "net.module._orig_mod.", "model.vision_tower.vision_tower.", "backbone.0.", "module.student.backbone.",
]  # fmt: skip


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_common_prefix_comes_off_and_is_named(
    tmp_path: Path, prefix: str, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {prefix + name: tensor for name, tensor in random_state(1).items()}
    state |= {"logit_scale": torch.ones(1), "text.blocks.0.weight": torch.ones(4, 4)} if prefix else {}
    path = tmp_path / f"w{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(
        {"epoch": 1, "state_dict": state}, path
    )
    net = Net()
    if prefix in ("module.", "_orig_mod."):  # off already, so the other tensors are left over
        with pytest.raises(UserError, match=r"extra 2 \(logit_scale, text"):
            _load_weight_file(net, path, moco=False)
        return
    _load_weight_file(net, path, moco=False)
    assert all(torch.equal(t, random_state(1)[name]) for name, t in net.state_dict().items())
    said = capsys.readouterr().err
    assert "9 of 11 tensors" in said
    assert prefix.removeprefix("module.") in said


def test_names_that_fit_are_taken_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(random_state(2), tmp_path / "w.safetensors")
    net = Net()
    _load_weight_file(net, tmp_path / "w.safetensors", moco=False)
    assert torch.equal(net.state_dict()["blocks.1.weight"], random_state(2)["blocks.1.weight"])
    assert capsys.readouterr().err == ""


def test_of_teacher_and_student_the_teacher_is_taken(tmp_path: Path) -> None:
    state = {f"student.backbone.{k}": t for k, t in random_state(1).items()}
    state |= {f"teacher.backbone.{k}": t for k, t in random_state(2).items()}
    save_file(state, tmp_path / "w.safetensors")
    net = Net()
    _load_weight_file(net, tmp_path / "w.safetensors", moco=False)
    assert torch.equal(net.cls_token, random_state(2)["cls_token"])


def test_two_models_that_fit_are_refused(tmp_path: Path) -> None:
    state = {f"left.{k}": t for k, t in random_state(1).items()}
    state |= {f"right.{k}": t for k, t in random_state(2).items()}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"several models that fit, below left\., right\."):
        _load_weight_file(Net(), tmp_path / "w.safetensors", moco=False)


def test_nothing_that_fits_is_named_by_the_best_prefix(tmp_path: Path) -> None:
    state = {f"teacher.{k}": t for k, t in random_state(1).items() if k != "norm.bias"}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"missing 1 \(norm\.bias\)$"):
        _load_weight_file(Net(), tmp_path / "w.safetensors", moco=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_of_a_diverged_training_are_refused(tmp_path: Path, value: float) -> None:
    state = random_state(1)
    state["blocks.2.bias"][3] = value
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"1 of 9 tensors hold NaN or infinity: 1 \(blocks\.2\.bias\)"):
        _load_weight_file(Net(), tmp_path / "w.safetensors", moco=False)


@pytest.mark.parametrize("sections", [["model", "teacher"], ["state_dict", "student"], ["teacher"]])
def test_a_state_dict_within_sections_is_found(tmp_path: Path, sections: list[str]) -> None:
    content: Any = STATE
    for section in reversed(sections):
        content = {section: content, "epoch": 1}
    torch.save(content, tmp_path / "w.pth")
    assert list(read_state_dict(tmp_path / "w.pth")) == ["a"]


@pytest.mark.parametrize("kind", ["folder", "FIFO", "missing"])
def test_what_is_no_file_is_one_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "w.pth"
    if kind == "folder":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    with pytest.raises(UserError, match="no weight file at"):
        read_file(path)
