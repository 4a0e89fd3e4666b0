"""`localign explore`: gathers what the page shows, and writes or serves it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localign.backbones import Backbone, create_backbone
from localign.engine.distributed import choose_device
from localign.engine.log import say
from localign.errors import UserError
from localign.explore.answers import Answers, read_common_answers
from localign.explore.content import Alignment, assemble
from localign.explore.images import MIB, gather_images, too_large
from localign.explore.masked import aligned_student
from localign.explore.predictions import read_predictions
from localign.files import replace_text
from localign.options.export import ExploreConfig
from localign.options.names import EMBEDDED
from localign.text.printing import printable


def run_explore(config: ExploreConfig) -> None:
    """Write the page, or serve pages of uploaded photographs.

    Raises:
        UserError: A model, image source, probing or evaluation cannot be read or does not fit, the page would be larger
            than ``--max-mib``, or the address cannot be served.
    """
    device = choose_device(config.device)
    answers = read_common_answers(config.named_answers(), config.questions) if config.vlm else None
    models = load_models(config)
    if config.serve:
        from localign.explore.serve import serve

        serve(config, models, find_alignment(config, models), device)
        return
    predictions = None if config.probe is None else read_predictions(config.probe, models, config.limit)
    shown = gather_images(config, models, predictions)
    alignment = find_alignment(config, models)
    page, facts = assemble(
        config, models, shown, device, alignment=alignment, predictions=predictions, answers=answers
    )
    size = len(page.encode()) / MIB
    say(f"page       {size:.1f} MiB ({facts})")
    if answers is not None:
        _say_unreadable(answers)
    if size > config.max_mib:
        raise UserError(too_large(size, config))
    replace_text(config.out, page)
    print(f"explore    {printable(config.out)}: open it in a browser; it needs no network")


def load_models(config: ExploreConfig) -> dict[str, Backbone]:
    """Raises UserError if a model cannot be loaded, or models see different parts of an image."""
    loaded: dict[str, Backbone] = {}
    options: dict[str, Any] = {
        "weights": config.weights,
        "model_kwargs": config.model_kwargs,
        "seed": config.seed,
    }
    for name, source in config.named_models().items():
        has_weights = Path(source).is_dir() or source == EMBEDDED
        own = {} if has_weights else options
        loaded[name] = create_backbone(source, image_size=config.image_size, **own).eval()
    first, *others = loaded.items()
    for name, backbone in others:
        (rows, columns), (other_rows, other_columns) = first[1].image_size, backbone.image_size
        if rows * other_columns != columns * other_rows:
            raise UserError(
                f"{printable(first[0])} takes images of {rows} x {columns} pixels and {printable(name)} of "
                f"{other_rows} x {other_columns}; they would see different parts of an image: give one --image-size"
            )
    return loaded


def find_alignment(config: ExploreConfig, models: Mapping[str, Backbone]) -> Alignment | None:
    """The first model that is an alignment of the page's first model; None, which is said, without one."""
    if not config.masks:
        return None
    baseline, *others = models
    reasons = []
    for name in others:
        found = aligned_student(config.named_models()[name], models[name], models[baseline])
        if not isinstance(found, str):
            return name, *found
        reasons.append(f"{printable(name)} {found}")
    say(f"no masked views: {'; '.join(reasons)}")
    return None


def _say_unreadable(answers: Answers) -> None:
    if answers.unreadable:
        say(f"{answers.unreadable} of {len(answers.questions)} questions have no image that can be read here")
