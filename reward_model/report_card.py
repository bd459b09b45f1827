"""What a reward model is worth, measured on held-out comparisons: accuracy by kind, calibration, biases, stability."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from reward_model.data import Comparison
from reward_model.ensemble import EnsembleRewardModel
from reward_model.metrics import (
    best_of_n,
    best_temperature,
    expected_calibration_error,
    length_slope,
    log_loss,
    pair_accuracy,
    reliability,
    wilson,
)
from reward_model.model import RewardModel
from reward_model.scoring import CompletionScores, score_completions
from reward_model.text import Text, Texts, encode

Scorer = Callable[[Texts, Texts], list[float]]
BALANCED = 0.1
"""Pairs whose lengths differ by at most this share of the longer count as balanced."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Best and worst of each comparison that is no tie."""

    comparisons: list[Comparison]
    chosen: Tensor
    """Scores [pairs]."""
    rejected: Tensor
    raw_differences: Tensor
    """Differences of raw scores: log-odds [pairs]."""
    member_votes: Tensor
    """True where a member prefers the chosen completion [members, pairs]."""
    spread: float
    """Standard deviation of a score over the members, mean over texts; nan without an ensemble."""
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def differences(self) -> Tensor:
        """Score of chosen less that of rejected [pairs]."""
        return self.chosen - self.rejected


def report_card(
    model: RewardModel | EnsembleRewardModel, comparisons: Sequence[Comparison], *, judge: Scorer | None = None
) -> dict[str, Any]:
    """Every measurement as one dictionary of plain numbers, lists and dictionaries (JSON).

    Args:
        model: The reward model or ensemble.
        comparisons: Held-out ones; ties are left out of accuracies.
        judge: An independent scorer; with it the best-of-N curve is drawn.

    Raises:
        ValueError: No comparison is decided.
    """
    everything = score_completions(model, comparisons)
    scored = decided_pairs(model, everything)
    differences = scored.raw_differences
    card: dict[str, Any] = {
        "pairs": len(scored.comparisons),
        "ties": sum(comparison.is_tie for comparison in comparisons),
        "accuracy": asdict(pair_accuracy(differences.tolist())),
        "log_loss": log_loss(differences),
        "calibration": {
            "ece": expected_calibration_error(differences),
            "temperature": best_temperature(differences),
            "reliability": reliability(differences),
        },
        "by_source": _by_source(scored),
        "by_length": _by_quartile(scored, (scored.chosen_tokens + scored.rejected_tokens) / 2, "tokens"),
        "by_margin": _by_margin(scored),
        "length_bias": _length_bias(scored),
        "scores": {"chosen": scored.chosen.tolist(), "rejected": scored.rejected.tolist()},
        "stability": stability(first_member(model), scored),
    }
    if isinstance(model, EnsembleRewardModel):
        card["ensemble"] = agreement(scored)
    if judge is not None:
        card["best_of_n"] = _best_of_n(everything, judge)
    return card


def decided_pairs(model: RewardModel | EnsembleRewardModel, scored: CompletionScores) -> Pairs:
    """Best and worst of every decided comparison.

    Raises:
        ValueError: All are ties.
    """
    decided = [index for index, comparison in enumerate(scored.comparisons) if not comparison.is_tie]
    if not decided:
        count = len(scored.comparisons)
        raise ValueError(f"All {count} comparisons are ties: accuracy needs a better and a worse completion.")
    comparisons = [scored.comparisons[index] for index in decided]
    best, worst = [scored.first[index] for index in decided], [scored.last[index] for index in decided]
    reader = first_member(model)
    return Pairs(
        comparisons=comparisons,
        chosen=scored.scores[best],
        rejected=scored.scores[worst],
        raw_differences=scored.raw_differences()[decided],
        member_votes=scored.members[:, best] > scored.members[:, worst],
        spread=float(scored.members.std(dim=0).mean()) if len(scored.members) > 1 else math.nan,
        chosen_tokens=_token_counts(reader, comparisons, 0),
        rejected_tokens=_token_counts(reader, comparisons, -1),
    )


def first_member(model: RewardModel | EnsembleRewardModel) -> RewardModel:
    """The model itself, or an ensemble's first member: whose tokenizer counts and whose stability is probed."""
    return model.members[0] if isinstance(model, EnsembleRewardModel) else model


def stability(model: RewardModel, scored: Pairs, *, samples: int = 64) -> dict[str, float | None]:
    """Largest change of a raw score when only the packing of the batch changes, and the mean one without its EOS.

    The first two must be 0 up to rounding: a score is a function of the text alone.
    """
    rule = model.contract.text
    pairs = scored.comparisons[:samples]
    rows = [encode(model.tokenizer, rule, p.prompt, text, truncate=True) for p in pairs for text in p.completions[:1]]
    together = torch.tensor(model.score_ids(rows))
    alone = torch.tensor([model.score_ids([row])[0] for row in rows])
    left = model.left_padded_scores(rows)
    ends = rule.append_eos and all(len(row) > 1 for row in rows)
    bare = torch.tensor(model.score_ids([row[:-1] for row in rows])) if ends else None
    return {
        "batch_composition": float((together - alone).abs().max()),
        "padding_side": None if left is None else float((together - torch.tensor(left)).abs().max()),
        "eos": None if bare is None else float((together - bare).abs().mean()),
    }


def agreement(scored: Pairs) -> dict[str, Any]:
    """Accuracy of each member, and how often two members agree on a pair."""
    votes = scored.member_votes.double()
    share, count = votes.mean(dim=0), len(votes)
    # of the ordered pairs of different members, those that vote alike
    alike = (count * (share**2 + (1 - share) ** 2) - 1) / (count - 1)
    return {
        "members": [asdict(wilson(float(row.sum()), len(row))) for row in votes],
        "pairwise_agreement": float(alike.mean()),
        "score_std": scored.spread,
    }


def _token_counts(model: RewardModel, comparisons: Sequence[Comparison], index: int) -> Tensor:
    rule = model.contract.text
    rows = [encode(model.tokenizer, rule, c.prompt, c.completions[index], truncate=True) for c in comparisons]
    return torch.tensor([float(len(row)) for row in rows])


def _by_source(scored: Pairs) -> dict[str, Any]:
    sources = sorted({pair.source for pair in scored.comparisons})
    rows = {name: [i for i, pair in enumerate(scored.comparisons) if pair.source == name] for name in sources}
    return {name or "all": asdict(pair_accuracy(scored.raw_differences[rows[name]].tolist())) for name in sources}


def _by_quartile(scored: Pairs, values: Tensor, unit: str) -> dict[str, Any]:
    """Accuracy in four buckets of equal size, keyed by their range."""
    table = {}
    for part in torch.tensor_split(torch.argsort(values, stable=True), min(4, len(values))):
        low, high = float(values[part[0]]), float(values[part[-1]])
        table[f"{low:.4g} to {high:.4g} {unit}"] = asdict(pair_accuracy(scored.raw_differences[part].tolist()))
    return table


def _by_margin(scored: Pairs) -> dict[str, Any]:
    """Buckets of the labeled margin where the data has one, else of the model's own."""
    margins = torch.tensor([pair.margin for pair in scored.comparisons])
    if len(set(margins.tolist())) > 1:
        return {"kind": "labeled", "buckets": _by_quartile(scored, margins, "labeled")}
    return {"kind": "predicted", "buckets": _by_quartile(scored, scored.differences.abs(), "std")}


def _length_bias(scored: Pairs) -> dict[str, Any]:
    gap = scored.chosen_tokens - scored.rejected_tokens
    longer = torch.maximum(scored.chosen_tokens, scored.rejected_tokens)
    balanced = gap.abs() <= BALANCED * longer
    raw = scored.raw_differences
    return {
        "slope_per_10_tokens": 10 * length_slope(scored.differences, gap),
        "accuracy_balanced": asdict(pair_accuracy(raw[balanced].tolist())),
        "accuracy_chosen_longer": asdict(pair_accuracy(raw[(gap > 0) & ~balanced].tolist())),
        "accuracy_chosen_shorter": asdict(pair_accuracy(raw[(gap < 0) & ~balanced].tolist())),
        "accuracy_of_longer_is_better": asdict(pair_accuracy(gap.tolist())),
    }


def _best_of_n(scored: CompletionScores, judge: Scorer) -> list[dict[str, float]]:
    """Mean judge score of the completion that the model ranks first among N; one pool where there are no prompts."""
    pools: dict[str, dict[str, tuple[Text, Text, int]]] = {}
    for comparison, first in zip(scored.comparisons, scored.first, strict=True):
        pool = pools.setdefault(comparison.prompt_key(), {})
        for offset, text in enumerate(comparison.completions):
            pool[str(text)] = (comparison.prompt, text, first + offset)
    samples = [list(pool.values()) for pool in pools.values()]
    largest = min(64, max(map(len, samples)))
    sizes = [2**power for power in range(int(math.log2(largest)) + 1)]
    curves = []
    for sample in samples:
        gold = torch.tensor(judge([entry[0] for entry in sample], [entry[1] for entry in sample]))
        proxy = scored.scores[[entry[2] for entry in sample]]
        curves.append([best_of_n(proxy, gold, n) for n in sizes if n <= len(sample)])
    curve = []
    for index, n in enumerate(sizes):
        values = [values[index] for values in curves if len(values) > index]
        curve.append(
            {"n": n, "kl": math.log(n) - (n - 1) / n, "judge": sum(values) / len(values), "prompts": len(values)}
        )
    return curve
