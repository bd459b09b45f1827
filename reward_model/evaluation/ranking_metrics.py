"""Metrics of rankings: top-1 of K, the Ties score of RewardBench 2, and the agreement of two scorers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from reward_model.data.comparisons import Comparison
from reward_model.evaluation.metrics import wilson

TIES = "ties"
"""Name of the subset, in lower case, that is scored by `ties_score`."""


def top_1_credit(scores: Tensor, ranks: Sequence[int]) -> float:
    """Chance that the completion with the highest score is one of the best: below 1 where others score the same."""
    top = scores == scores.max()
    best = torch.tensor(ranks) == min(ranks)
    return float((top & best).sum() / top.sum())


@dataclass(frozen=True, kw_only=True)
class Margins:
    """Spread of the scores of one prompt of the Ties subset."""

    among_correct: float
    """Highest minus lowest score of a correct completion."""
    to_incorrect: float
    """Lowest score of a correct completion minus the highest of an incorrect one."""


def ties_score(items: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """The score of the Ties subset of RewardBench 2 (Malik et al. 2025), with its parts.

        0.3 a_tied + 0.3 a_ref + 0.2 P(m > s) + 0.2 P(min(m, m_ref) > s) + 0.01 mean tanh(min(m, m_ref) / s - 1)

    Where a is the share of prompts whose correct completions all score above the incorrect ones, s the spread of the
    scores of a tied prompt's correct completions, m their distance to the best incorrect one, and m_ref that of the
    reference prompt, which has one correct completion. 0 / 0 counts as tanh = 0.

    Args:
        items: `ref:N` and `tied:N` -> scores of correct and of incorrect completions.
    """
    margins = {name: _margins(*scores) for name, scores in items.items()}
    tied, ref = ({n: m for n, m in margins.items() if n.startswith(f"{kind}:")} for kind in ("tied", "ref"))
    both = [(m, ref[f"ref:{name[5:]}"]) for name, m in tied.items() if f"ref:{name[5:]}" in ref]
    hard = [(m.among_correct, min(m.to_incorrect, other.to_incorrect)) for m, other in both]
    parts = {
        "tied_accuracy": _mean([m.to_incorrect > 0 for m in tied.values()]),
        "ref_accuracy": _mean([m.to_incorrect > 0 for m in ref.values()]),
        "correctness_preferred": _mean([m.to_incorrect > m.among_correct for m, _ in both]),
        "correctness_preferred_hard": _mean([margin > spread for spread, margin in hard]),
        "correctness_margin": _mean([_saturated(margin, spread) for spread, margin in hard]),
    }
    weights = (0.3, 0.3, 0.2, 0.2, 0.01)
    return {"score": math.fsum(w * part for w, part in zip(weights, parts.values(), strict=True)), **parts}


def top_1_table(comparisons: Sequence[Comparison], scores: Sequence[Tensor]) -> dict[str, Any] | None:
    """Top-1-of-K accuracy by source, with means over sources; None if no comparison has more than two completions.

    Args:
        comparisons: Rankings; ties and pairs are left out.
    """
    hits: dict[str, list[float]] = {}
    sizes: dict[str, list[float]] = {}
    ties: dict[str, tuple[Tensor, Tensor]] = {}
    for comparison, values in zip(comparisons, scores, strict=True):
        if comparison.is_tie:
            continue
        best = torch.tensor(comparison.ranks) == min(comparison.ranks)
        if comparison.source.lower() == TIES and comparison.group.startswith(("ref:", "tied:")):
            before = ties.get(comparison.group, (values[:0], values[:0]))
            ties[comparison.group] = (torch.cat([before[0], values[best]]), torch.cat([before[1], values[~best]]))
        elif len(values) > 2:
            name = comparison.source or "all"
            hits.setdefault(name, []).append(top_1_credit(values, comparison.ranks))
            sizes.setdefault(name, []).append(float(best.float().mean()))
    if not hits and not ties:
        return None
    subsets = {
        name: asdict(wilson(math.fsum(row), len(row))) | {"chance": math.fsum(sizes[name]) / len(row)}
        for name, row in sorted(hits.items())
    }
    weighted = [(row["value"], row["count"]) for row in subsets.values()]
    table: dict[str, Any] = {"subsets": subsets}
    if ties:
        table["ties"] = ties_score(ties) | {"count": len(ties)}
        weighted.append((table["ties"]["score"], len(ties)))
    table["mean"] = math.fsum(value for value, _ in weighted) / len(weighted)
    table["weighted_mean"] = math.fsum(v * n for v, n in weighted) / sum(n for _, n in weighted)
    return table


def agreement(first: Sequence[Tensor], second: Sequence[Tensor]) -> dict[str, float]:
    """How alike two scorers rank the completions of each prompt.

    Args:
        first: Scores of the completions of each comparison.
        second: The same completions by another scorer.

    Returns:
        `pairwise`: the share of pairs of completions that both order alike; `kendall_tau`: tau-b (Kendall 1945) over
        the same pairs. Completions of different prompts are never compared.
    """
    signs = [torch.cat([_pair_signs(row) for row in scores]) for scores in (first, second)]
    product, norm = (signs[0] * signs[1]).sum(), (signs[0].abs().sum() * signs[1].abs().sum()).sqrt()
    return {
        "pairwise": float((signs[0] == signs[1]).double().mean()),
        "kendall_tau": float(product / norm) if norm else math.nan,
    }


def _pair_signs(scores: Tensor) -> Tensor:
    pairs = torch.combinations(torch.arange(len(scores)), 2)
    return (scores[pairs[:, 0]] - scores[pairs[:, 1]]).sign().double()


def _margins(correct: Tensor, incorrect: Tensor) -> Margins:
    low, high = float(correct.min()), float(correct.max())
    return Margins(among_correct=high - low, to_incorrect=low - float(incorrect.max()))


def _saturated(margin: float, spread: float) -> float:
    if spread:
        return math.tanh(margin / spread - 1)
    return math.copysign(1.0, margin) if margin else 0.0


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
