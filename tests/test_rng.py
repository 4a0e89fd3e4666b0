"""Random draws depend only on (seed, purpose, index)."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch

from localign import rng


def test_keys_are_the_same_on_every_machine() -> None:
    assert rng.key(0, "mask") == rng.key(0, "mask")
    for other in (rng.key(1, "mask"), rng.key(0, "crop"), rng.key(0, "mask", 0), rng.key(0, "mask", 0, 0)):
        assert other != rng.key(0, "mask")
        assert 0 <= other < 2**64
    assert rng.key(0, "x", 1, 23) != rng.key(0, "x", 12, 3)
    digest = hashlib.blake2b(b"0|mask|5", digest_size=8).digest()
    assert rng.key(0, "mask", 5) == int.from_bytes(digest, "little")


def test_generators_repeat_and_differ_by_index() -> None:
    first, again, other = (rng.generator(3, "a", i).random(4) for i in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_each_row_of_uniform_draws_depends_only_on_its_position() -> None:
    positions = torch.tensor([0, 7, 2**40, 3])
    draws = rng.uniform(1, "mask", positions, 5)
    assert draws.shape == (4, 5)
    assert draws.dtype == torch.float64
    for row, position in enumerate(positions):
        assert torch.equal(rng.uniform(1, "mask", position[None], 5)[0], draws[row])
    assert torch.equal(
        rng.uniform(1, "mask", positions, 3), draws[:, :3]
    )  # more columns do not change earlier ones
    assert not torch.equal(rng.uniform(2, "mask", positions, 5), draws)
    assert not torch.equal(rng.uniform(1, "other", positions, 5), draws)


def test_uniform_draws_are_uniform_and_uncorrelated() -> None:
    draws = rng.uniform(0, "test", torch.arange(20000), 8)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = torch.histc(draws.float(), 20, 0, 1).double()
    expected = draws.numel() / 20
    assert (
        (counts - expected) ** 2 / expected
    ).sum() < 43.8  # 19 degrees of freedom: exceeded once in a thousand
    columns = torch.corrcoef(draws.T) - torch.eye(8)
    assert columns.abs().max() < 0.03
    neighbours = torch.corrcoef(torch.stack([draws[:-1].flatten(), draws[1:].flatten()]))[0, 1]
    assert abs(float(neighbours)) < 0.01
    purposes = torch.stack([draws.flatten(), rng.uniform(0, "test2", torch.arange(20000), 8).flatten()])
    assert abs(float(torch.corrcoef(purposes)[0, 1])) < 0.01


def test_the_bits_are_those_of_splitmix64() -> None:
    """Compare with the definition on Python integers."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    golden, purpose = 0x9E3779B97F4A7C15, rng.key(9, "mask")
    for position in (0, 1, 12345):
        row = mix((mix((position + purpose) % 2**64) + golden) % 2**64)
        expected = [(mix((row + c * golden) % 2**64) >> 11) * 2.0**-53 for c in (1, 2, 3)]
        assert rng.uniform(9, "mask", torch.tensor([position]), 3)[0].tolist() == expected


def test_seeded_globals_seeds_and_restores_all_three() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    undisturbed = draw(), draw()
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    before = draw()
    with rng.seeded_globals(5, "augment", 3):
        inside = draw()
    assert (before, draw()) == undisturbed
    try:
        with rng.seeded_globals(5, "augment", 3):
            assert draw() == inside
            raise ValueError
    except ValueError:
        pass
    with rng.seeded_globals(5, "augment", 4):
        assert draw() != inside


def test_pairs_are_mixed_in_order() -> None:
    a, b = torch.arange(1000), torch.arange(1000) + 5
    assert not torch.equal(rng.mix_pairs(a, b), rng.mix_pairs(b, a))
    assert len(set(rng.mix_pairs(a, b).tolist())) == 1000
