"""Model cards: the ``README.md`` of an export, which says what the model is and how to load it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import timm
from huggingface_hub import ModelCardData, try_to_load_from_cache

from localign.backbones.backbone import Backbone
from localign.errors import UserError
from localign.files import replace_text
from localign.options.names import EMBEDDED
from localign.recipes.catalogue import CATALOGUE
from localign.text.plainyaml import load_yaml
from localign.text.printing import printable
from localign.text.reading import read_text

CARD_FILE = "README.md"
_MARK = "<!-- Written by localign; no longer replaced after an edit. "
"""Stands before the digest of everything above it: a card that somebody has edited does not match."""
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_IDENTIFIER = re.compile(r"[\w.+-]{1,60}")
_FOLDERS = re.compile(r"(?<![\w.])/(?:[^\s/]+/)*(?=[^\s/])")
"""The folders of an absolute path, which say where a machine keeps its data."""
_CARD_BYTES = 2**20
_SETTINGS = (
    "objective", "target", "loss", "mask", "keep_ratio", "decoder", "soft_cap", "stage", "adapter", "llm", "prompt",
    "resize", "features", "image_size", "train_blocks", "data", "epochs", "batch_size", "optimizer", "lr",
    "adapter_lr", "weight_decay", "lora_rank", "ema_decay", "seed",
)  # fmt: skip
"""Options of a run that a card shows."""


@dataclass(frozen=True)
class Base:
    """The weights that a model was made from."""

    name: str
    """As a card shows it; of a folder only the last part."""
    repository: str | None = None
    """``ORGANISATION/NAME`` on the Hub."""
    license: str | None = None
    """The Hub's identifier of the licence; None if it is not known."""


@dataclass(frozen=True)
class Card:
    """The facts of a model card."""

    title: str
    what: str
    """One paragraph."""
    format: str
    """A key of the snippets: ``timm``, ``clip``, ..., ``onnx``, ``torch-export``, ``localign``, ``llava``."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """As ``config.json`` has it."""
    measured: str = ""
    """The section on measurements, from :func:`measured`."""
    repository: str | None = None
    """Where the Hub will have the model; else the snippet loads the folder ``title``."""


def backbone_card(
    backbone: Backbone,
    folder: Path,
    format: str,
    provenance: Mapping[str, Any],
    *,
    measured: str = "",
    repository: str | None = None,
) -> Card:
    """The card of an exported backbone; see :class:`Card`."""
    height, width = backbone.image_size
    rows, columns = backbone.grid
    prefix = backbone.num_prefix_tokens
    plural = "" if prefix == 1 else "s"
    capped = backbone.soft_cap is not None and format in ("timm", "onnx", "torch-export")
    cap = f" Its attention logits are soft-capped at {backbone.soft_cap:g}." if capped else ""
    if backbone.soft_cap is not None and not capped:
        cap = f" It was trained with attention logits soft-capped at {backbone.soft_cap:g}; this format has no cap."
    return Card(
        title=folder.absolute().name,
        what=f"A vision transformer ({_plain(backbone.name)}) of {backbone.depth} blocks and width "
        f"{backbone.width}, for images of {height} x {width} pixels: {prefix} prefix token{plural}, then "
        f"{rows} x {columns} patches.{cap}",
        format=format,
        provenance=provenance,
        measured=measured,
        repository=repository,
    )


def write_card(folder: Path, card: Card) -> bool:
    """Write ``README.md``, the same for the same facts.

    Args:
        folder: The export, complete.
        card: The facts.

    Returns:
        False if the folder has a README.md that localign did not write or that somebody has edited; it stays.
    """
    path = folder / CARD_FILE
    if path.exists() and not is_own_card(path):
        return False
    replace_text(path, card_text(card))
    return True


def is_own_card(path: Path) -> bool:
    """Whether localign wrote a card and nobody has edited it since."""
    try:
        body, _, mark = read_text(path, limit=_CARD_BYTES).rpartition(_MARK)
    except UserError:
        return False
    return bool(body) and mark == _digest(body)


def _digest(body: str) -> str:
    return f"{hashlib.sha256(body.encode()).hexdigest()[:16]} -->\n"


def card_text(card: Card) -> str:
    """The text of a card, with its mark."""
    bases = _bases(card)
    parts = (
        f"---\n{_front_matter(card, bases)}\n---\n",
        f"# {_plain(card.title)}\n",
        f"{card.what}\n",
        _origin(bases),
        f"## Load it\n\n{_place(card)}\n\n```python\n{snippet(card)}\n```\n",
        _training(card),
        card.measured or "## Measured\n\nNothing was measured with this export.\n",
    )
    body = "\n".join(part for part in parts if part) + "\n"
    return f"{body}{_MARK}{_digest(body)}"


# -- where it comes from -----------------------------------------------------------------------------------


def base_of(name: str, weights: str = "pretrained") -> Base:
    """What is known about a backbone or language model that a run started from. Nothing is downloaded.

    Args:
        name: A name, folder or repository, as ``--backbone`` takes it.
        weights: As ``--weights`` takes it.
    """
    shown = name.rstrip("/").rsplit("/", 1)[-1] if Path(name).is_dir() or Path(name).is_absolute() else name
    if weights == "none":
        return Base(f"{shown}, with random weights")
    if weights != "pretrained":
        return Base(f"{shown}, with the weights in {Path(weights).name}")
    if name == EMBEDDED:
        return Base(f"{name}, which comes with localign", license="apache-2.0")
    if Path(name).is_dir():
        folders = [Path(name) / "export", Path(name)]
        facts = next((f for folder in folders if (f := front_matter(folder / CARD_FILE))), {})
        return Base(
            f"the folder {shown}", _first_match(_REPOSITORY, facts.get("base_model")), _license(facts)
        )
    repository = name.removeprefix("hf-hub:").removeprefix("hf_hub:").partition("@")[0]
    if _REPOSITORY.fullmatch(repository):
        cached = try_to_load_from_cache(repository, CARD_FILE)
        facts = front_matter(Path(cached)) if isinstance(cached, str) else {}
        return Base(repository, repository, _license(facts))
    entry = CATALOGUE.get(name)
    if entry is not None and entry.loader != "timm":
        return Base(name)
    timm_name = entry.timm_name if entry is not None else name
    known = timm.get_pretrained_cfg(timm_name, allow_unregistered=True)
    if known is None:
        return Base(shown)
    return Base(timm_name, _first_match(_REPOSITORY, known.hf_hub_id), _license({"license": known.license}))


def front_matter(path: Path) -> dict[str, Any]:
    """The YAML at the head of a card; {} if there is none, or none that can be read."""
    try:
        start, _, rest = read_text(path, limit=_CARD_BYTES).partition("---\n")
        content = load_yaml(rest.partition("\n---")[0]) if not start.strip() else {}
    except (UserError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _license(facts: Mapping[str, Any]) -> str | None:
    found = facts.get("license")
    if found == "unknown":
        return None
    return found if isinstance(found, str) and _IDENTIFIER.fullmatch(found) else None


def _first_match(pattern: re.Pattern[str], value: object) -> str | None:
    values = value if isinstance(value, list) else [value]
    return next((v for v in values if isinstance(v, str) and pattern.fullmatch(v)), None)


def _run(card: Card) -> Mapping[str, Any]:
    run = card.provenance.get("run")
    return run if isinstance(run, Mapping) else {}


def _bases(card: Card) -> list[Base]:
    """The backbones, then the language model."""
    facts, run = card.provenance, _run(card)
    # An imported export has a source, too, which is a file.
    backbones = (
        run.get("backbone") or (facts.get("method") and facts.get("backbone")) or facts.get("source") or ()
    )
    weights = str(run.get("weights") or facts.get("weights") or "pretrained")
    names = [backbones] if isinstance(backbones, str) else list(backbones)
    found = [base_of(str(name), weights) for name in names]
    if run.get("llm"):
        found.append(base_of(str(run["llm"]), str(run.get("llm_weights") or "pretrained")))
    return found


def _origin(bases: Sequence[Base]) -> str:
    if not bases:
        return "Base model: not recorded. Licence: unknown: see the base model.\n"
    return (
        "\n".join(
            f"- Base model: {_code(base.name)}. Licence of its weights: "
            f"{base.license or 'unknown: see the base model'}."
            for base in bases
        )
        + "\n"
    )


def _front_matter(card: Card, bases: Sequence[Base]) -> str:
    vlm = card.format in ("localign", "llava")
    licenses = {base.license for base in bases}
    repositories = [base.repository for base in bases if base.repository is not None]
    data = ModelCardData(
        library_name={"onnx": "onnx", "torch-export": "pytorch"}.get(card.format, "transformers"),
        pipeline_tag="image-text-to-text" if vlm else "image-feature-extraction",
        tags=["localign", "vision-language" if vlm else "vit"],
        base_model=repositories[0] if len(repositories) == 1 else repositories or None,
        license=licenses.pop() if len(licenses) == 1 and None not in licenses else "unknown",
    )
    return data.to_yaml().strip()


def _training(card: Card) -> str:
    run, facts = _run(card), card.provenance
    rows = [("method", facts.get("method")), ("command", facts.get("command")), ("steps", facts.get("steps"))]
    rows += [(name, run.get(name)) for name in _SETTINGS]
    rows += [(name, facts.get(name)) for name in ("localign", "torch", "timm")]
    shown = [(name, _setting(value)) for name, value in rows if value not in (None, "", [], ())]
    table = "\n".join(f"| {name} | {_code(value)} |" for name, value in shown)
    return f"## Made with\n\n| setting | value |\n|---|---|\n{table}\n" if shown else ""


def _setting(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_setting, value))
    text = str(value)
    return Path(text).name if Path(text).is_absolute() else text  # paths of a machine say nothing elsewhere


def _plain(value: object) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", printable(value))


def _code(value: object) -> str:
    return "`" + printable(value).replace("`", "'").replace("|", "\\|") + "`"


# -- how to load it ----------------------------------------------------------------------------------------

_AUTO = """from transformers import AutoImageProcessor, AutoModel
processor, model = AutoImageProcessor.from_pretrained({place}), AutoModel.from_pretrained({place}{trust})
tokens = model(**processor(images=image, return_tensors="pt")).last_hidden_state"""
_CLIP = """from transformers import AutoImageProcessor, AutoModel
processor, model = AutoImageProcessor.from_pretrained({place}), AutoModel.from_pretrained({place})
tokens = model.post_layernorm(model(**processor(images=image, return_tensors="pt")).last_hidden_state)"""
_ONNX = """import onnxruntime
session = onnxruntime.InferenceSession({file})
tokens = session.run(None, {{"pixel_values": pixel_values}})[0]"""
_TORCH = """import torch
model = torch.export.load({file}).module()
tokens = model(pixel_values)"""
_VLM = """from transformers import pipeline
ask = pipeline("image-text-to-text", model={place}{trust})
chat = [{{"role": "user", "content": [{{"type": "image", "image": image}}, {{"type": "text", "text": question}}]}}]
print(ask(text=chat, max_new_tokens=64)[0]["generated_text"][-1]["content"])"""
_SNIPPETS = {"clip": _CLIP, "onnx": _ONNX, "torch-export": _TORCH, "localign": _VLM, "llava": _VLM}
_FILES = {"onnx": "model.onnx", "torch-export": "model.pt2"}


def snippet(card: Card) -> str:
    """Python that loads the model."""
    file = _FILES.get(card.format, "")
    place = json.dumps(card.repository or card.title, ensure_ascii=True)
    inside = f"{card.title}/{file}"
    trust = ", trust_remote_code=True" if card.format in ("timm", "localign") else ""
    text = _SNIPPETS.get(card.format, _AUTO).format(place=place, file=json.dumps(inside), trust=trust)
    if file and card.repository:
        fetched = f'hf_hub_download({place}, "{file}")'
        text = "from huggingface_hub import hf_hub_download\n" + text.replace(json.dumps(inside), fetched)
    return text


def _place(card: Card) -> str:
    given = {
        "onnx": "`pixel_values` are float32 images of the size in `config.json`, normalised with its mean and "
        "standard deviation.",
        "torch-export": "`pixel_values` are float32 images of the size in `config.json`, normalised with its mean "
        "and standard deviation.",
        "localign": "`image` is a PIL image, `question` a string. The folder's own code runs.",
        "llava": "`image` is a PIL image, `question` a string.",
        "timm": "`image` is a PIL image. The folder's own code runs; it needs timm. The tokens are those after the "
        "final norm: prefix tokens, then patches.",
    }.get(card.format, "`image` is a PIL image. The tokens are prefix tokens, then patches.")
    return given if card.repository else f"In the folder that holds {_code(card.title)}: {given}"


# -- what was measured -------------------------------------------------------------------------------------


def measured(results: Mapping[str, Any], sha256: str, where: object) -> str:
    """The section on measurements: each head before and after, with the paired difference.

    Args:
        results: ``results.json`` of ``localign probe``.
        sha256: Digest of the exported backbone's weights.
        where: The folder of the results, for error lines.

    Raises:
        UserError: The folder holds no probing, or none of these weights.
    """
    probe = results.get("probe")
    try:
        if results.get("command") != "probe" or not isinstance(probe, dict):
            raise UserError(f"{printable(where)} holds no results of `localign probe`")
        ours = [name for name, outcomes in probe.items() if outcomes[0]["backbone_sha256"] == sha256]
        if not ours:
            raise UserError(
                f"{printable(where)} did not probe these weights, but {', '.join(map(printable, probe))}; run "
                "`localign probe BEFORE,RUN` on the exported checkpoint"
            )
        rows = [_difference_row(entry, probe) for entry in results["differences"] if entry["name"] in ours]
        rows = rows or _rows_alone(probe[ours[0]])
        notes = [_FOLDERS.sub("", str(note)) for note in results.get("notes", ())]
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise UserError(
            f"{printable(where)} holds a damaged results.json: {printable(repr(error))}"
        ) from None
    head = "| images | task | head | before | after | difference, 95 % interval |\n|---|---|---|---|---|---|"
    said = "\n".join(f"- {_plain(note)}" for note in notes)
    return (
        "## Measured\n\nMacro recall of heads on the frozen tokens, by `localign probe`, in percent.\n\n"
        + "\n".join((head, *rows))
        + f"\n\n{said}\n"
    )


def _difference_row(entry: Mapping[str, Any], probe: Mapping[str, Any]) -> str:
    source, head, task = entry["source"], entry["head"], entry["task"]
    before, after = (
        fmean(outcome["results"][source][head][task]["macro_recall"] for outcome in probe[name])
        for name in (entry["against"], entry["name"])
    )
    gain = f"{100 * entry['difference']:+.1f}"
    if entry["interval"] is not None:
        low, high = entry["interval"]
        gain += f" [{100 * low:+.1f}, {100 * high:+.1f}]"
    if entry.get("converged") is False:
        gain += " (heads not converged)"
    cells = (_plain(source), _plain(task), _plain(head), f"{100 * before:.1f}", f"{100 * after:.1f}", gain)
    return f"| {' | '.join(cells)} |"


def _rows_alone(outcomes: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for source, heads in outcomes[0]["results"].items():
        for head, tasks in heads.items():
            for task in tasks:
                recall = fmean(o["results"][source][head][task]["macro_recall"] for o in outcomes)
                after = f"{100 * recall:.1f}"
                if (interval := tasks[task].get("macro_recall_interval")) is not None:
                    after += f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
                rows.append(f"| {_plain(source)} | {_plain(task)} | {_plain(head)} | - | {after} | - |")
    return rows
