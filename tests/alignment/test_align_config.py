"""Options that contradict each other or have no effect are refused."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from localign.alignment import AlignConfig
from localign.errors import UserError


def test_defaults_are_the_published_method() -> None:
    config = AlignConfig()
    assert (config.target, config.loss, config.loss_tokens) == ("penultimate", "mse", "all")
    assert config.masks().masks_per_image == 3
    assert config.masks().kind == "uniform"
    assert (config.decoder_depth, config.decoder_layer_scale) == (2, 1e-6)


@pytest.mark.parametrize(
    ("objective", "target", "loss", "decoder", "mask"),
    [
        ("maskembed", "penultimate", "mse", "transformer", "uniform"),
        ("averaging", "cls", "mse", "none", "uniform"),
        ("additive", "cls", "mse", "none", "uniform"),
        ("clipself", "cls", "cosine", "none", None),
        ("mim", "penultimate", "mse", "none", "uniform"),
    ],
)
def test_an_objective_fills_in_its_defaults(
    objective: Any, target: str, loss: str, decoder: str, mask: str | None
) -> None:
    config = AlignConfig(objective=objective)
    assert (config.target, config.loss, config.decoder, config.mask) == (target, loss, decoder, mask)
    assert AlignConfig(**{f.name: getattr(config, f.name) for f in fields(config)}) == config


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "averaging", "mask": "block", "block_min_patches": 4, "loss": "cosine"},
        {"objective": "averaging", "target": "pooled", "complement": False, "all_visible": False},
        {"objective": "additive", "mask": "shapley", "complement": False},
        {"objective": "additive", "mask": "bernoulli", "keep_ratio": 0.25, "all_visible": False},
        {"objective": "clipself", "decoder": "transformer", "decoder_depth": 1, "loss": "mse"},
        {"objective": "mim", "target": "last", "loss_tokens": "hidden", "all_visible": False},
        {"objective": "maskembed", "mask": "shapley"},
    ],
)
def test_valid_combinations_are_accepted(options: dict[str, Any]) -> None:
    config = AlignConfig(**options)
    assert {name: getattr(config, name) for name in options} == options


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mask": "blocks"}, "unknown mask kind"),
        ({"mask": "bernoulli", "keep_ratio": 1.0}, "between 0 and 1"),
        ({"keep_ratio": 0.25}, "own number of visible patches"),
        ({"target": "cls", "loss_tokens": "hidden"}, "no patch tokens"),
        ({"target": "cls", "loss_tokens": "visible"}, "no patch tokens"),
        ({"target": "first"}, "--target takes"),
        ({"loss": "huber"}, "--loss takes"),
        ({"loss_tokens": "some"}, "--loss-tokens takes"),
        ({"attention": "flash"}, "--attention takes"),
        ({"soft_cap": "yes"}, "auto or none"),
        ({"scale_images": 0}, "at least 1"),
        ({"decoder_depth": 0}, "at least 1"),
        ({"decoder_layer_scale": 0.0}, "--decoder-layer-scale"),
        ({"steps": 3, "epochs": 1.0}, "contradict"),
        ({"objective": "maskedembed"}, "--objective takes maskembed, maskembed\\+, averaging"),
        ({"decoder": "mlp"}, "--decoder takes transformer, none"),
        ({"target": "pooled"}, "maskembed needs --target penultimate or last or cls, not pooled"),
        ({"decoder": "none"}, "maskembed needs --decoder transformer"),
        (
            {"objective": "averaging", "target": "last"},
            "averaging needs --target cls or pooled, not last",
        ),
        ({"objective": "averaging", "decoder": "transformer"}, "averaging needs --decoder none"),
        ({"objective": "averaging", "loss_tokens": "visible"}, "no patch tokens"),
        ({"objective": "averaging", "decoder_depth": 3}, "no decoder: --decoder-depth would have no effect"),
        ({"objective": "additive", "loss": "cosine"}, "additive needs --loss mse"),
        ({"objective": "additive", "mask": "shapley", "all_visible": False}, "needs --all-visible true"),
        ({"objective": "clipself", "loss_tokens": "hidden"}, "no patch tokens"),
        ({"objective": "clipself", "target": "penultimate"}, "clipself needs --target cls or pooled"),
        ({"objective": "clipself", "mask": "block"}, "no masks: --mask would"),
        ({"objective": "clipself", "mask": "uniform"}, "no masks: --mask would"),
        ({"objective": "clipself", "complement": False}, "no masks: --complement would"),
        (
            {"objective": "clipself", "keep_ratio": 0.3, "all_visible": False},
            "no masks: --keep-ratio, --all-visible would",
        ),
        ({"objective": "clipself", "decoder_layer_scale": 0.1}, "no decoder: --decoder-layer-scale would"),
        (
            {"objective": "clipself", "decoder": "transformer", "target": "pooled"},
            "with a decoder, use --target cls",
        ),
        ({"objective": "mim", "target": "cls"}, "mim needs --target penultimate or last, not cls"),
        ({"mask": "shapley", "keep_ratio": 0.25}, "own number of visible patches"),
        ({"block_min_patches": 4}, "--block-min-patches needs --mask block"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        AlignConfig(**options)
