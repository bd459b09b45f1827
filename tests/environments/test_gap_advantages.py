"""The table of docs/environments.md: advantages across an observation, by our `gae` and by the formulas of others."""

import re
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from rlhf_ppo.functional import gae

PAGE = Path(__file__).parents[2] / "docs" / "environments.md"
MASK = torch.tensor([[1, 1, 0, 0, 0, 1, 1]]).bool()
VALUES = torch.tensor([[0.2, 0.3, 0.9, 0.9, 0.9, 0.5, 0.6, 0.0]], dtype=torch.float64)


def advantages(values: torch.Tensor, *, mask: torch.Tensor | None, own: torch.Tensor) -> list[float]:
    """Of the four own tokens, for a reward of 1 at the last step."""
    last = torch.zeros_like(values[:, 1:], dtype=torch.bool)
    last[:, -1] = True
    result, _ = gae(last.double(), values, last, last & False, gamma=1.0, lam=0.95, mask=mask)
    four: list[float] = result[own].tolist()
    return four


def published() -> list[list[float]]:
    rows = re.findall(r"^\| .* \| (\.\d{4}) \| (\.\d{4}) \| (\.\d{4}) \| (\.\d{4}) \|$", PAGE.read_text("utf-8"), re.M)
    return [[float(number) for number in row] for row in rows]


def test_advantages_across_an_observation_are_those_without_it() -> None:
    short = torch.ones(1, 4).bool()
    without = advantages(VALUES[:, [0, 1, 5, 6, 7]], mask=None, own=short)
    ours = advantages(VALUES, mask=MASK, own=MASK)
    assert_close(ours, without, atol=1e-12, rtol=0)
    # By hand: δ = .1, .2, .1, .4 and Â_t = δ_t + .95 Â_{t+1}.
    by_hand = [0.4]
    for delta in (0.1, 0.2, 0.1):
        by_hand.insert(0, delta + 0.95 * by_hand[0])
    assert ours == pytest.approx(by_hand, abs=1e-12)
    assert published()[:2] == [[round(number, 4) for number in ours]] * 2


def test_the_formulas_of_others_give_the_numbers_on_the_page() -> None:
    """Zeros in place of the observation's values, and no mask at all."""
    zeros = VALUES.clone()
    zeros[:, :-1][~MASK] = 0.0
    others = [advantages(values, mask=None, own=MASK) for values in (zeros, VALUES)]
    assert published()[2:] == [[round(number, 4) for number in row] for row in others]
