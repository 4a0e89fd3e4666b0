"""The package unpickles nothing but plain values, and constructs nothing from YAML."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml

import localign
from localign.text import plainyaml

SOURCES = sorted(Path(localign.__file__).parent.rglob("*.py"))
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
MAY_NAME_PICKLE = {"backbones/weights.py", "vlm/scoring/readers.py"}
"""One names the error of torch's safe reader, the other reads pickles without classes."""
RUNS_CODE = {"eval", "exec", "compile", "__import__"}
MAY_CALL_YAML_LOAD = {"text/plainyaml.py"}
"""With its own subclass of yaml.SafeLoader."""


def name_of(node: ast.expr) -> str:
    """``a.b.c`` of a call's function."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def given(call: ast.Call, keyword: str) -> object:
    """The value of a keyword argument if it is a constant, else None."""
    found = [k.value for k in call.keywords if k.arg == keyword]
    return found[0].value if found and isinstance(found[0], ast.Constant) else None


def problems(path: Path, tree: ast.Module) -> list[str]:
    """Calls and imports that could run code from a file."""
    file = path.relative_to(Path(localign.__file__).parent).as_posix()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = (
                [node.module or ""] if isinstance(node, ast.ImportFrom) else [n.name for n in node.names]
            )
            if {m.split(".")[0] for m in modules} & PICKLES and file not in MAY_NAME_PICKLE:
                found.append(f"{file}:{node.lineno} imports {modules}")
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func)
        unsafe = (
            (name == "torch.load" and given(node, "weights_only") is not True)
            or (name in ("np.load", "numpy.load") and given(node, "allow_pickle") is not False)
            or (name == "yaml.load" and file not in MAY_CALL_YAML_LOAD)
            or (
                name.startswith("yaml.")
                and name.endswith("load")
                and name not in ("yaml.safe_load", "yaml.load")
            )
            or name.startswith("yaml.load_all")
            or (name in ("pickle.load", "pickle.loads", "pickle.Unpickler"))
            or name in RUNS_CODE
            or name.startswith(("torch.hub.load", "os.system", "os.popen"))
            or given(node, "trust_remote_code") is True
            or given(node, "shell") is True
        )
        if unsafe:
            found.append(f"{file}:{node.lineno} calls {name}")
    return found


def test_the_package_reads_nothing_that_runs_code() -> None:
    assert len(SOURCES) > 100
    found = [p for path in SOURCES for p in problems(path, ast.parse(path.read_text(encoding="utf-8")))]
    assert not found, "\n".join(found)


def test_options_are_read_by_a_safe_loader() -> None:
    assert issubclass(plainyaml._OptionsLoader, yaml.SafeLoader)
    with pytest.raises(ValueError, match="could not determine a constructor"):
        plainyaml.load_options("a: !!python/name:os.system x")


def test_unsafe_calls_are_found() -> None:
    bad = "import pickle\ntorch.load(f)\nnp.load(f)\nyaml.load(t, L)\neval('1')\nmodel(trust_remote_code=True)\n"
    assert len(problems(SOURCES[0], ast.parse(bad))) == 6
    good = (
        "torch.load(f, weights_only=True)\nnp.load(f, allow_pickle=False)\nyaml.safe_load(t)\nmodel.eval()\n"
    )
    assert not problems(SOURCES[0], ast.parse(good))


MAY_LOAD_FROM_THE_HUB = {"vlm/model/loading.py", "backbones/building.py", "portable/modeling_localign_vit.py"}
"""One passes ``trust_remote_code=False`` for all callers, the others check names first."""


def hub_calls(path: Path, tree: ast.Module) -> list[str]:
    """Calls of loaders of transformers and timm that do not refuse code, or may follow a name of a file."""
    file = path.relative_to(Path(localign.__file__).parent).as_posix()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and file not in MAY_LOAD_FROM_THE_HUB:
            name = name_of(node.func)
            loads = name.endswith((".from_pretrained", "AutoModelForCausalLM.from_config", ".load_dataset"))
            loads = loads and not name.startswith(".")  # super(), which gets its caller's arguments
            if (loads and given(node, "trust_remote_code") is not False) or name == "timm.create_model":
                found.append(f"{file}:{node.lineno} calls {name}")
    return found


def test_no_loader_runs_a_repositorys_code() -> None:
    found = [p for path in SOURCES for p in hub_calls(path, ast.parse(path.read_text(encoding="utf-8")))]
    assert not found, "\n".join(found)
    bad = "AutoConfig.from_pretrained(n)\ntimm.create_model(n)\nAutoModelForCausalLM.from_config(c)\n"
    assert len(hub_calls(SOURCES[0], ast.parse(bad))) == 3
