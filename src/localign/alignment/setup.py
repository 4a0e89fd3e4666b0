"""Builds backbone, objective and student from the options of an alignment, and the student from a run folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from timm.layers.attention import Attention

from localign import rng
from localign.alignment.masks import MaskSampler
from localign.alignment.objectives import OBJECTIVES, Objective, ObjectiveOptions, PlusWeights
from localign.alignment.plus import PlusStudent, build_plus_student
from localign.alignment.published import PUBLISHED_SOFT_CAP
from localign.alignment.student import Student, build_student
from localign.alignment.teacher import Teacher
from localign.backbones import CATALOGUE, Backbone, create_backbone
from localign.backbones.export import content_hash
from localign.engine.checkpoints.replicated import Checkpoints
from localign.engine.distributed import choose_device
from localign.engine.run_folder import read_config as read_run_config
from localign.errors import UserError
from localign.options.align import AlignConfig, saved_align_config
from localign.options.names import EMBEDDED
from localign.weights import load_strict

DEFAULT_LR = 3e-4
PUBLISHED_BATCH = 1024
CPU_BATCH = 8
"""Default batch size on a CPU: small enough for a trial run on a laptop."""


def starting_backbone(config: AlignConfig, weights: str | None = None) -> Backbone:
    """The backbone that an alignment starts from.

    Args:
        config: Options of the alignment.
        weights: Replaces ``config.weights``; ``none`` gives the architecture with random weights.
    """
    return create_backbone(
        config.backbone,
        weights=weights or config.weights,
        image_size=config.image_size,
        model_kwargs=config.model_kwargs,
        seed=config.seed,
    )


def build_teacher(config: AlignConfig, backbone: Backbone) -> Teacher:
    """The frozen teacher: the starting weights, or the model that ``--teacher`` names.

    Args:
        config: Options of the alignment.
        backbone: The starting weights.

    Raises:
        UserError: The teacher does not exist, has no such output, or its tokens are not those of the backbone.
    """
    assert config.target is not None  # AlignConfig filled it in
    pooled = config.objective == "maskembed+"
    if config.teacher is None:
        return Teacher(backbone, config.target, pooled=pooled)
    if Path(config.teacher).is_file():
        name, weights = config.backbone, config.teacher
    else:
        name, weights = config.teacher, "pretrained"
    other = create_backbone(
        name,
        weights=weights,
        image_size=backbone.image_size,
        model_kwargs=config.model_kwargs if name == config.backbone else None,
        seed=config.seed,
    )
    mine, its = ((b.grid, b.patch_size, b.num_prefix_tokens) for b in (backbone, other))
    if mine != its:
        raise UserError(
            f"--teacher {config.teacher} does not fit: it has {_described(other)}, {backbone.name} has "
            f"{_described(backbone)}"
        )
    if pooled and config.preserve_weight and other.width != backbone.width:
        raise UserError(
            f"--preserve-weight needs a teacher of the student's width: {other.name} has {other.width} channels, "
            f"{backbone.name} {backbone.width}; set --preserve-weight 0"
        )
    teacher = Teacher(other, config.target, pooled=pooled, statistics=(backbone.mean, backbone.std))
    if config.max_patches is not None and teacher.statistics is not None:
        raise UserError(
            f"--teacher {config.teacher} normalises pixels differently from {backbone.name}, which --max-patches does "
            "not convert"
        )
    return teacher


def _described(backbone: Backbone) -> str:
    rows, columns = backbone.grid
    height, width = backbone.patch_size
    return (
        f"{rows}x{columns} patches of {height}x{width} pixels and {backbone.num_prefix_tokens} prefix tokens"
    )


def resolve_soft_cap(soft_cap: float | str | None, backbone: Backbone) -> float | None:
    """The bound of attention logits.

    ``auto`` gives 30 if the catalogue says so; for backbones outside the catalogue, if their attention supports it.
    Otherwise ``auto`` gives the backbone's own bound.
    """
    if soft_cap == "auto":
        entry = CATALOGUE.get(backbone.name)
        fits = entry.soft_cap if entry else type(backbone.vit.blocks[0].attn) is Attention
        return PUBLISHED_SOFT_CAP if fits else backbone.soft_cap
    return None if soft_cap in (None, "none") else float(soft_cap)


def default_lr(config: AlignConfig) -> float:
    """The learning rate of a run that does not set one."""
    entry = CATALOGUE.get(config.backbone)
    return entry.lr if entry else DEFAULT_LR


def resolve_align(config: AlignConfig) -> AlignConfig:
    """Fill in defaults: the backbone's published learning rate, and a batch size for the device."""
    on_cpu = choose_device(config.device).type == "cpu"
    return replace(
        config,
        lr=config.lr if config.lr is not None else default_lr(config),
        batch_size=config.batch_size or (CPU_BATCH if on_cpu else PUBLISHED_BATCH),
    )


def build_objective(config: AlignConfig, teacher: Teacher) -> Objective:
    """The objective of an alignment.

    Raises:
        UserError: Its masks or crops do not fit the teacher's grid.
    """
    assert config.loss is not None  # AlignConfig filled in both
    assert config.decoder is not None
    masks = None if config.mask is None else MaskSampler.of(config.masks())
    weights = PlusWeights(config.readout, config.readout_weight, config.pooled_weight, config.preserve_weight)
    options = ObjectiveOptions(config.loss, config.decoder, config.loss_tokens, masks, weights)
    return OBJECTIVES[config.objective](options, teacher)


def fresh_student(config: AlignConfig, backbone: Backbone, teacher_width: int | None = None) -> Student:
    """The student at step 0, a function of the config's seed.

    Args:
        config: Options of the alignment.
        backbone: The starting weights.
        teacher_width: Channels of the teacher; default the backbone's.
    """
    decodes = config.decoder == "transformer"
    with rng.seeded_globals(config.seed, "student"):
        student = (build_plus_student if config.objective == "maskembed+" else build_student)(
            backbone,
            soft_cap=resolve_soft_cap(config.soft_cap, backbone),
            attention=config.attention,
            decoder=decodes,
            decoder_depth=config.decoder_depth,
            layer_scale=config.decoder_layer_scale,
            # A zero head outputs zero vectors, for which the gradient of the cosine loss is not usable.
            head="identity" if config.loss == "cosine" and not decodes else "zero",
            teacher_width=teacher_width,
            decoder_width=config.decoder_width,
            decoder_mlp=config.decoder_mlp,
            reinit_blocks=config.reinit_blocks,
        )
    if isinstance(student, PlusStudent):
        # Ranks would wait for gradients of layers that no term of the loss uses.
        student.readout.requires_grad_(config.readout_weight > 0)
        student.pooled_head.requires_grad_(config.pooled_weight > 0)
    if config.train_blocks is not None:
        student.train_last_blocks(config.train_blocks)
    return student


def student_of_run(folder: str | Path, checkpoint: str = "last") -> tuple[Student, dict[str, Any]]:
    """The student of an alignment run's checkpoint, without its data.

    Args:
        folder: A run folder of `localign align`.
        checkpoint: ``last``, ``best`` (lowest validation loss), or a step.

    Returns:
        The student in eval mode, with averaged weights if the run has them, and facts about the run.

    Raises:
        UserError: The run or checkpoint does not exist or is damaged.
    """
    folder = Path(folder)
    saved = read_run_config(folder)
    if saved["command"] != "align":
        raise UserError(f"{folder} is a run of `localign {saved['command']}`, not of `localign align`")
    config = saved_align_config(saved["config"])
    checkpoints = Checkpoints(folder / "checkpoints")
    step = _checkpoint_step(checkpoints, checkpoint, folder)
    loaded = checkpoints.load(step)
    # Only the architecture is needed, so a backbone given by name downloads no weights.
    local = config.backbone == EMBEDDED or Path(config.backbone).is_dir()
    weights = loaded.ema or loaded.model
    decodes = config.decoder == "transformer"
    if decodes and config.decoder_mlp == "auto":
        gated = "decoder.blocks.0.mlp.fc1_g.weight" in weights  # localign 0.1 gave every decoder plain MLPs
        config = replace(config, decoder_mlp="gated" if gated else "plain")
    target_width = len(weights["decoder.head.weight" if decodes else "encoder.head.weight"])
    backbone = starting_backbone(config, weights=None if local else "none")
    student = fresh_student(config, backbone, target_width)
    load_strict(student, weights, checkpoints.path(step))
    facts = {"run": saved["config"], "steps": step, **loaded.state["task"]}
    return student.eval(), facts


def with_starting_pooling(student: Student, folder: str | Path) -> Backbone:
    """The aligned blocks of a run's student, with the final norm and pooling of the model that the run started from.

    Args:
        student: Of the run.
        folder: The run folder.

    Raises:
        UserError: The starting weights cannot be read, or are others than those the run started from.
    """
    folder = Path(folder)
    config = saved_align_config(read_run_config(folder)["config"])
    start = starting_backbone(config)
    checkpoints = Checkpoints(folder / "checkpoints")
    began_with = checkpoints.state(checkpoints.steps()[-1])["fingerprint"]["starting weights"]
    if content_hash(start.vit.state_dict())[:16] != began_with:
        raise UserError(f"{folder} started from other weights than {config.backbone} has now")
    aligned = student.encoder.backbone
    twin = start.copy(soft_cap=aligned.soft_cap)
    state, kept = twin.vit.state_dict(), ("norm.", "fc_norm.", "attn_pool.")
    own = aligned.vit.state_dict()
    load_strict(twin.vit, {k: v if k.startswith(kept) else own[k] for k, v in state.items()}, folder)
    return twin.eval()


def _checkpoint_step(checkpoints: Checkpoints, wanted: str, folder: Path) -> int:
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"{folder} has no checkpoint yet")
    marked = checkpoints.best()
    best = marked["step"] if marked is not None else None
    if wanted == "best" and best is None:
        raise UserError(f"{folder} has no best checkpoint, because the run had no validation")
    step = {"last": str(steps[-1]), "best": str(best)}.get(wanted, wanted)
    if step not in map(str, steps):
        raise UserError(
            f"{folder} has no checkpoint {wanted!r}; known: last, best, {', '.join(map(str, steps))}"
        )
    return int(step)
