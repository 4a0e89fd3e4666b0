"""An exported model's weights are verified, its config runs no code, and a folder reaches no network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from localign.errors import UserError
from localign.planning.llms import text_config
from localign.vlm.evaluation.localign_model import LocalignModel
from localign.vlm.model.build import load_tokenizer, load_vlm
from localign.vlm.model.digests import WEIGHTS_LIST
from localign.vlm.model.loading import load_pretrained
from localign.vlm.model.modeling import LocalignVLM

OLD = Path(__file__).parents[2] / "compat" / "v0.1.0"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new export of the model that version 0.1.0 exported."""
    folder = tmp_path_factory.mktemp("vlm") / "export"
    shutil.copytree(OLD / "vlm-export", folder)
    LocalignVLM.from_pretrained(folder).save_pretrained(folder)
    return folder


@pytest.fixture
def export(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "export"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No question on the terminal, and no connection."""

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError(f"reached out: {arguments}")

    monkeypatch.setattr("builtins.input", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


def one_line(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line


def test_an_old_export_without_digests_loads() -> None:
    assert not (OLD / "vlm-export" / WEIGHTS_LIST).exists()
    load_vlm(OLD / "vlm-export")


def test_a_new_export_loads_as_it_was(export: Path) -> None:
    assert (export / WEIGHTS_LIST).is_file()
    new, _ = load_vlm(export)
    old, _ = load_vlm(OLD / "vlm-export")
    assert all(torch.equal(t, old.state_dict()[name]) for name, t in new.state_dict().items())


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bytes_are_one_line(export: Path, seed: int) -> None:
    path = export / "model.safetensors"
    content = np.frombuffer(path.read_bytes(), dtype=np.uint8).copy()
    start, count = [(0, 200), (len(content) // 2, 200), (len(content) - 64, 1), (8, 1)][seed]
    content[np.random.default_rng(seed).integers(start, len(content), count)] ^= 0x21
    path.write_bytes(content.tobytes())
    one_line(
        lambda: load_vlm(export), "damaged" if seed in (0, 3) else "the checksum of model.safetensors differs"
    )


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def other_values(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({name: t + 1 for name, t in state.items()}, folder / "model.safetensors", {"format": "pt"})


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (cut, "damaged"),
    "other values": (other_values, "checksum of model.safetensors differs"),
    "lost": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "one too many": (lambda f: shutil.copy(f / "model.safetensors", f / "x.safetensors"), "does not belong"),
    "no JSON": (lambda f: (f / WEIGHTS_LIST).write_text("{"), WEIGHTS_LIST),
    "list": (lambda f: (f / WEIGHTS_LIST).write_text("[]"), WEIGHTS_LIST),
    "no files": (lambda f: (f / WEIGHTS_LIST).write_text("{}"), "lists no files"),
    "wrong types": (lambda f: (f / WEIGHTS_LIST).write_text('{"files": {"a": [3]}}'), "no size and digest of a"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_line(export: Path, case: str) -> None:
    damage, said = DAMAGE[case]
    damage(export)
    one_line(lambda: load_vlm(export), said)


def test_saving_again_renews_the_digests(export: Path) -> None:
    model, _ = load_vlm(export)
    with torch.no_grad():
        next(iter(model.parameters())).add_(1)
    model.save_pretrained(export)
    load_vlm(export)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(export: Path, tmp_path: Path, value: float) -> None:
    model, _ = load_vlm(export)
    with torch.no_grad():
        next(iter(model.adapter.parameters())).view(-1)[0] = value
    one_line(lambda: model.save_pretrained(tmp_path / "new"), "adapter.", "not exported")
    assert not (tmp_path / "new").exists()


def changed(folder: Path, **entries: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    return folder


CODE: dict[str, dict[str, Any]] = {
    "auto map": {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    },
    "auto map of the Hub": {"model_type": "evil", "auto_map": {"AutoConfig": "a/b--evil.Config"}},
    "kernel": {"attn_implementation": "a/b"},
    "kernel within": {"text_config": {"_attn_implementation": "a/b:evil"}},
    "kernels of parts": {"attn_implementation": {"text_config": "a/b"}},
    "unknown type": {"model_type": "evil"},
}


@pytest.mark.parametrize("case", CODE)
@pytest.mark.parametrize("reader", ["plan", "evaluation", "tokenizer"])
def test_code_of_a_local_config_is_refused(tmp_path: Path, case: str, reader: str) -> None:
    folder = changed(Path(shutil.copytree(OLD / "llm", tmp_path / "llm")), **CODE[case])
    trace = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    calls: dict[str, Callable[[], object]] = {
        "plan": lambda: text_config(str(folder)),
        "evaluation": lambda: LocalignModel(folder, "x", torch.device("cpu"), torch.float32),
        "tokenizer": lambda: load_tokenizer(str(folder)),
    }
    try:
        calls[reader]()
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert reader == "tokenizer"  # the config's type is nothing to it
    assert not trace.exists()


TOWERS: dict[str, dict[str, Any]] = {
    "remote": {"architecture": "hf-hub:timm/vit_tiny_patch16_224"},
    "folder": {"architecture": "local-dir:/tmp"},
    "address": {"model_kwargs": {"pretrained_cfg": {"url": "http://127.0.0.1:9/x.pth"}}},
    "pickle": {"model_kwargs": {"checkpoint_path": "/tmp/x.pth"}},
    "huge": {"model_kwargs": {"embed_dim": 10**9}},
    "deep": {"model_kwargs": {"depth": 10**9}},
    "arguments": {"model_kwargs": 3},
    "mean": {"mean": [0.5]},
    "deviation": {"std": [0, 0, 0]},
    "text": {"std": "abc"},
}


@pytest.mark.parametrize("case", TOWERS)
def test_a_hostile_tower_is_one_line(export: Path, case: str) -> None:
    config = json.loads((export / "config.json").read_text())
    tower = config["towers"][0]
    kwargs = TOWERS[case].get("model_kwargs")
    tower |= TOWERS[case]
    if isinstance(kwargs, dict):
        tower["model_kwargs"] = {
            **json.loads((export / "config.json").read_text())["towers"][0]["model_kwargs"],
            **kwargs,
        }
    (export / "config.json").write_text(json.dumps(config))
    one_line(lambda: load_vlm(export))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b"version https://git-lfs.github.com/spec/v1\n"]
)
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_broken_file_of_a_language_model_is_one_line(tmp_path: Path, file: str, content: bytes) -> None:
    folder = Path(shutil.copytree(OLD / "llm", tmp_path / "llm"))
    (folder / file).write_bytes(content)
    load = AutoConfig if file == "config.json" else AutoTokenizer
    one_line(lambda: load_pretrained(load.from_pretrained, folder), "llm")
