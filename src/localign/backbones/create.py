"""Build a backbone from a name."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import timm
from timm.models import get_pretrained_cfg
from timm.models.naflexvit import NaFlexVit
from torch import nn

from localign import rng
from localign.backbones.backbone import Backbone
from localign.backbones.building import REMOTE, build_vit, image_sides, remote_config, set_image_size
from localign.backbones.export import CONFIG_FILE, load_backbone
from localign.backbones.families.naflex import plain_vit
from localign.backbones.families.reading import is_of_transformers, load_transformers_backbone, stated_size
from localign.backbones.hub import model_folder
from localign.backbones.moco import read_moco_v3
from localign.backbones.preprocessing import Preprocessing
from localign.backbones.weights import StateDict, common_prefixes, read_state_dict
from localign.engine.log import say
from localign.errors import UserError, did_you_mean
from localign.options.names import EMBEDDED, AttentionBackend
from localign.portable.native_localign_vlm import PositionInterpolation
from localign.recipes.catalogue import CATALOGUE
from localign.text.printing import printable
from localign.text.reading import read_json_object
from localign.weights import check_finite, check_fit, load_strict, without_ignored

# Weight files may have a classifier; a backbone has none.
_CLASSIFIER = ("head.", "head_dist.", "fc.")


def create_backbone(
    name: str | Path,
    *,
    weights: str = "pretrained",
    image_size: int | Sequence[int] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    attention: AttentionBackend = "auto",
    seed: int = 0,
) -> Backbone:
    """Build a backbone.

    Args:
        name: A catalogue name, ``scenes-vit``, any timm name, ``hf-hub:...``, ``local-dir:...``, a run or export
            folder, or a folder or hub repository (``openai/clip-vit-base-patch16``) in transformers' or timm's format.
        weights: ``"pretrained"``, ``"none"`` (random weights that depend on ``seed``), or a safetensors or torch file
            with timm's parameter names or in an original format that timm converts.
        image_size: Input side, or (height, width), pixels; positions are resampled, see
            :func:`~localign.backbones.building.set_image_size`. Default: that of the weights, or in a folder of
            transformers what its image processor gives (224 for DINOv2, whose positions are for 518).
        model_kwargs: Further arguments of timm's constructor, for example ``{"depth": 2}``.
        attention: Back-end of soft-capped attention, if the backbone has it.
        seed: Seed of random weights.

    Returns:
        The backbone in eval mode.

    Raises:
        UserError: The name is unknown (the error suggests similar names), the weights do not fit or cannot be
            downloaded, or the image size does not fit the patches.
    """
    name, kwargs = str(name), dict(model_kwargs or {})
    sides = None if image_size is None else image_sides(image_size)
    folder = None if name.startswith(REMOTE) or name == EMBEDDED else model_folder(name)
    config = {} if folder is None else read_json_object(folder / CONFIG_FILE)
    if folder is not None and is_of_transformers(config):
        if weights not in ("pretrained", "none"):
            raise UserError(f"{name} has weights of its own; --weights FILE applies to timm names only")
        with rng.seeded_globals(seed, "backbone weights"):
            backbone = load_transformers_backbone(
                folder,
                config,
                name=name,
                model_kwargs=kwargs,
                attention=attention,
                weights=weights == "pretrained",
            )
        if sides is None and "img_size" not in kwargs:
            sides = _fitting(stated_size(folder), backbone)
        return backbone if sides is None else set_image_size(backbone, sides)
    if folder is not None and "localign" not in config:  # timm reads its own folders
        name, folder = (f"local-dir:{name}" if Path(name).is_dir() else f"hf-hub:{name}"), None
    if name == EMBEDDED or folder is not None:
        if kwargs or weights != "pretrained":
            raise UserError(f"{name} is an exported backbone: its weights and arguments are fixed")
        backbone = load_backbone(_embedded_path() if folder is None else folder, attention=attention)
        return backbone if sides is None else set_image_size(backbone, sides)
    entry = CATALOGUE.get(name)
    architecture = entry.timm_name if entry else name
    if sides is not None:
        kwargs["img_size"] = sides[0] if sides[0] == sides[1] else sides
    elif entry:
        kwargs["img_size"] = entry.image_size
    if not name.startswith(REMOTE):
        _check_timm_name(architecture)
    if entry and entry.loader == "moco-v3" and weights == "pretrained":
        raise UserError(
            f"timm has no weights of {name}; give the authors' checkpoint file with --weights vit-b-300ep.pth.tar"
        )
    with rng.seeded_globals(seed, "backbone weights"):
        vit = build_vit(architecture, kwargs, pretrained=weights == "pretrained")
    if weights not in ("pretrained", "none"):
        moco = entry is not None and entry.loader == "moco-v3"
        _load_weight_file(vit, Path(weights), moco=moco)
    interpolation: PositionInterpolation = "bicubic"
    naflex = isinstance(vit, NaFlexVit)
    if naflex:
        interpolation = vit.embeds.pos_embed_interp_mode
        vit, architecture, kwargs = plain_vit(vit, name)
    elif name.startswith(REMOTE):  # store everything that a rebuild needs, as the folder may move
        architecture = vit.pretrained_cfg["architecture"]
        kwargs = {**_saved_arguments(vit), **kwargs, "img_size": vit.patch_embed.img_size}
    backbone = backbone_of(
        vit, name=name, architecture=architecture, model_kwargs=kwargs, attention=attention
    )
    backbone.position_interpolation = interpolation
    if naflex and sides is not None:
        set_image_size(backbone, sides)
    if name.startswith(REMOTE):  # timm's own names keep the published evaluation, which is the same for all
        backbone.preprocessing = Preprocessing.of_timm(remote_config(name), name)
    return backbone


def _saved_arguments(vit: Any) -> dict[str, Any]:
    """Constructor arguments from a remote model's configuration.

    timm's own ``save_for_hf`` writes ``num_classes`` and ``in_chans`` among them, which every rebuild sets itself.
    """
    saved = dict(getattr(vit, "pretrained_model_args", None) or {})
    return {k: v for k, v in saved.items() if k not in ("num_classes", "in_chans")}


def _embedded_path() -> Path:
    path = Path(str(files("localign"))) / "assets" / EMBEDDED
    if not (path / CONFIG_FILE).is_file():
        raise UserError(
            f"this installation has no embedded backbone; make it with: localign pretrain --out {path}"
        )
    return path


def backbone_of(
    vit: Any,
    *,
    name: str,
    architecture: str,
    model_kwargs: Mapping[str, Any],
    attention: AttentionBackend = "auto",
) -> Backbone:
    """Wrap a timm model, with the pixel statistics of its pre-trained configuration, in eval mode."""
    cfg = vit.pretrained_cfg
    return Backbone(
        vit,
        name=name,
        architecture=architecture,
        model_kwargs=dict(model_kwargs),
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        attention=attention,
    ).eval()


def _check_timm_name(name: str) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        known = [EMBEDDED, *CATALOGUE, *timm.list_models()]
        raise UserError(
            f"unknown backbone {name!r}{did_you_mean(name, known)}; `localign list backbones` lists all names"
        )
    if tag:
        try:
            get_pretrained_cfg(name, allow_unregistered=False)
        except RuntimeError as error:
            tags = ", ".join(timm.list_pretrained(f"{architecture}.*")) or "none"
            raise UserError(f"{architecture} has no weights tagged {tag!r}; known: {tags}") from error


def _load_weight_file(vit: nn.Module, path: Path, *, moco: bool) -> None:
    state = read_moco_v3(path) if moco else read_state_dict(path)
    prefix, fitting = _without_prefix(vit, state, path)
    if prefix:
        used = sum(name.startswith(prefix) for name in state)
        say(f"{printable(path.name)}: the {used} of {len(state)} tensors below {printable(prefix)} are used")
    load_strict(vit, fitting, path, ignore=_CLASSIFIER)
    check_finite(vit.state_dict(), path)


def _without_prefix(vit: nn.Module, state: StateDict, path: Path) -> tuple[str, StateDict]:
    """The prefix without which the names and shapes of a file's tensors fit, and these tensors.

    Wrappers put their names before a model's: ``teacher.backbone.``, ``visual.trunk.``. Of several that fit, the
    averaged weights of a teacher are taken.

    Raises:
        UserError: Nothing fits (the line is about the prefix that fits best), or several models fit.
    """
    wanted = vit.state_dict().keys()
    fits: dict[str, StateDict] = {}
    errors: dict[str, tuple[int, UserError]] = {}
    for prefix in ("", *common_prefixes(state, len(wanted) // 2)):
        if any(prefix.startswith(shorter) for shorter in fits):
            continue
        part = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        try:
            fits[prefix] = _converted(vit, part, path)
        except UserError as error:
            errors[prefix] = len(wanted & part.keys()), error
    if len(fits) > 1:
        averaged = [prefix for prefix in fits if "teacher" in prefix or "ema" in prefix]
        if len(averaged) != 1:
            raise UserError(
                f"{printable(path)} holds several models that fit, below {', '.join(map(printable, fits))}; keep one"
            )
        return averaged[0], fits[averaged[0]]
    if not fits:
        raise max(errors.values(), key=lambda pair: pair[0])[1]
    return next(iter(fits.items()))


def _converted(vit: nn.Module, state: StateDict, path: Path) -> StateDict:
    """Tensors that fit the model. timm converts original formats (OpenAI CLIP, ...) and resizes position embeddings.

    Raises:
        UserError: They do not fit.
    """
    convert = getattr(sys.modules[type(vit).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        try:
            state = convert(state, vit)
        except (
            KeyError,
            RuntimeError,
            ValueError,
            TypeError,
            AttributeError,
            IndexError,
            AssertionError,
        ) as error:
            raise UserError(f"{path} does not fit {type(vit).__name__}: {printable(repr(error))}") from error
    check_fit(vit, without_ignored(vit, state, _CLASSIFIER), path)
    return state


def _fitting(size: tuple[int, int] | None, backbone: Backbone) -> tuple[int, int] | None:
    """A size that whole patches cover, or None."""
    fits = size is not None and not any(s % p for s, p in zip(size, backbone.patch_size, strict=True))
    return size if fits else None
