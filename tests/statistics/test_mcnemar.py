"""McNemar's test: p-values by hand and by the normal approximation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from localign.errors import UserError
from localign.statistics.mcnemar import mcnemar


def by_question(scores: Sequence[float]) -> dict[str, float]:
    return {str(number): score for number, score in enumerate(scores)}


@pytest.mark.parametrize(
    ("fewer", "more", "p_value"),
    [
        (0, 0, 1.0),
        (0, 5, 2 / 32),
        (1, 9, 2 * (1 + 10) / 1024),
        (3, 7, 2 * (1 + 10 + 45 + 120) / 1024),
        (5, 5, 1.0),
    ],
)
def test_mcnemar_by_hand(fewer: int, more: int, p_value: float) -> None:
    first = [1.0] * fewer + [0.0] * more + [1.0, 0.0] * 4
    second = [0.0] * fewer + [1.0] * more + [1.0, 0.0] * 4
    found = mcnemar(by_question(first), dict(reversed(by_question(second).items())))
    assert found[:2] == (fewer, more)
    assert found.p_value == pytest.approx(p_value)


def test_mcnemar_of_many_questions_is_that_of_the_normal_distribution() -> None:
    fewer, more = 4_900, 5_100
    first, second = (dict(enumerate([float(i)] * fewer + [float(1 - i)] * more)) for i in (1, 0))
    found = mcnemar(*({str(name): score for name, score in side.items()} for side in (first, second)))
    z = (more - fewer - 1) / math.sqrt(fewer + more)
    assert found.p_value == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)


def test_models_that_answered_different_questions_are_not_compared() -> None:
    with pytest.raises(UserError, match="different questions"):
        mcnemar(by_question([0.0, 1.0]), by_question([0.0]))
