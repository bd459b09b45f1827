"""Metrics of pairs, as pure functions of score differences between chosen and rejected completions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Share:
    """A proportion with its 95 % Wilson interval."""

    value: float
    low: float
    high: float
    count: int


def wilson(successes: float, count: int, *, z: float = 1.959964) -> Share:
    """Proportion of successes with the interval of Wilson (1927), which is valid near 0 and 1 and for small counts."""
    if count == 0:
        return Share(value=math.nan, low=math.nan, high=math.nan, count=0)
    share = successes / count
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Share(value=share, low=max(0.0, center - half), high=min(1.0, center + half), count=count)


def pair_accuracy(differences: Sequence[float]) -> Share:
    """Share of pairs whose chosen completion scores higher; equal scores count one half."""
    wins = sum(1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in differences)
    return wilson(wins, len(differences))


def log_loss(differences: Tensor, preference: Tensor | None = None) -> float:
    """Mean negative log-likelihood of the preferences under Bradley-Terry, in nats (coin: 0.693).

    Args:
        differences: d = r_chosen - r_rejected, raw.
        preference: p, the probability that `chosen` is better: -p log σ(d) - (1 - p) log σ(-d); None is 1.
    """
    target = torch.ones_like(differences) if preference is None else preference.to(differences)
    return float(F.binary_cross_entropy_with_logits(differences, target))


def expected_calibration_error(differences: Tensor, preference: Tensor | None = None, *, bins: int = 10) -> float:
    """Mean gap between confidence and accuracy over equally filled bins (Naeini et al. 2015).

    The confidence of a pair is σ(|d|), in [0.5, 1]; it is right if the chosen completion scores higher. With soft
    labels it is right by the probability that the completion with the higher score is better.
    """
    table = reliability(differences, preference, bins=bins)
    total = sum(row[2] for row in table)
    return sum(abs(row[0] - row[1]) * row[2] for row in table) / total if total else math.nan


def reliability(
    differences: Tensor, preference: Tensor | None = None, *, bins: int = 10
) -> list[tuple[float, float, int]]:
    """(mean confidence, accuracy, pairs) of equally filled bins of growing confidence."""
    confidence = torch.sigmoid(differences.abs().double())
    order = torch.argsort(confidence)
    target = torch.ones_like(confidence) if preference is None else preference.double()
    higher = torch.where(differences > 0, target, 1 - target)
    right = torch.where(differences == 0, 0.5, higher)[order]
    parts = zip(torch.tensor_split(confidence[order], bins), torch.tensor_split(right, bins), strict=True)
    return [(float(c.mean()), float(r.mean()), len(c)) for c, r in parts if len(c)]


def best_temperature(differences: Tensor, preference: Tensor | None = None) -> float:
    """T > 0 under which σ(d / T) fits the preferences best (Guo et al. 2017); below 1 the scores are underconfident.

    Found by bisection: the log loss is convex in 1/T. Infinite if no scale fits (its slope at 1/T = 0 is not negative).
    """
    values = differences.double()
    target = torch.ones_like(values) if preference is None else preference.double()
    low, high = 0.0, 1e4
    if float((values * (target - 0.5)).mean()) <= 0:
        return math.inf
    for _ in range(100):
        middle = (low + high) / 2
        slope = float((values * (torch.sigmoid(middle * values) - target)).mean())
        low, high = (middle, high) if slope < 0 else (low, middle)
    return 1 / high


def length_slope(differences: Tensor, length_gaps: Tensor) -> float:
    """Score gain per token of extra length: least squares of d on the length gap, through the origin.

    A pair and its mirror image are equivalent, so there is no intercept. With labels that do not depend on length, a
    slope away from 0 is a bias.
    """
    gaps, values = length_gaps.double(), differences.double()
    norm = float((gaps**2).sum())
    return float((gaps * values).sum()) / norm if norm else 0.0


def best_of_n(proxy: Tensor, gold: Tensor, n: int) -> float:
    """Expected gold score of the sample with the highest proxy score among `n` drawn from a pool without replacement.

    The estimator of Nakano et al. (2021, app. I): the i-th lowest of m samples by proxy is the highest in
    C(i-1, n-1) of the C(m, n) draws.
    """
    order = torch.argsort(proxy, stable=True)
    count = len(order)
    chances = torch.tensor([math.comb(i, n - 1) / math.comb(count, n) for i in range(count)], dtype=torch.float64)
    return float((chances * gold.double()[order]).sum())
