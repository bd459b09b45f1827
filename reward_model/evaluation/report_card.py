"""Compute the report card: accuracy by group, calibration, biases, and stability of the scores."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from reward_model.data.comparisons import Comparison
from reward_model.evaluation.metrics import (
    best_of_n,
    best_temperature,
    expected_calibration_error,
    length_slope,
    log_loss,
    pair_accuracy,
    reliability,
    wilson,
)
from reward_model.evaluation.ranking_metrics import agreement, top_1_table
from reward_model.evaluation.scoring import CompletionScores, preferences, score_completions
from reward_model.models.ensemble import EnsembleRewardModel, first_member
from reward_model.models.model import RewardModel
from reward_model.models.text import Texts, encode
from rlhf_ppo.chat.messages import Text

Scorer = Callable[[Texts, Texts], list[float]]
BALANCED = 0.1
"""ScoredPairs count as balanced if their lengths differ by at most this share of the longer."""


@dataclass(frozen=True, kw_only=True)
class ScoredPairs:
    """Scores of the best and worst completion of each decided comparison."""

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
        """Score of chosen minus that of rejected [pairs]."""
        return self.chosen - self.rejected


def report_card(
    model: RewardModel | EnsembleRewardModel,
    comparisons: Sequence[Comparison],
    *,
    judge: Scorer | None = None,
    others: Mapping[str, Scorer] | None = None,
) -> dict[str, Any]:
    """Compute the report card: a dictionary of numbers, lists and dictionaries (JSON).

    Args:
        comparisons: Held-out comparisons; ties and preferences of 0.5 are left out.
        judge: Independent scorer for the best-of-N curve; None: no curve.
        others: Further scorers by name, to be compared with the model and with each other.

    Raises:
        ValueError: No comparison is decided.
    """
    completions = score_completions(model, comparisons)
    scored = decided_pairs(model, completions)
    differences, preference = scored.raw_differences, preferences(scored.comparisons)
    card: dict[str, Any] = {
        "pairs": len(scored.comparisons),
        "ties": sum(not comparison.is_decided for comparison in comparisons),
        "accuracy": asdict(pair_accuracy(differences.tolist())),
        "log_loss": log_loss(differences, preference),
        "calibration": {
            "ece": expected_calibration_error(differences, preference),
            "temperature": best_temperature(differences, preference),
            "reliability": reliability(differences, preference),
        },
        "by_source": _by_source(scored),
        "by_length": _by_quartile(scored, (scored.chosen_tokens + scored.rejected_tokens) / 2, "tokens"),
        "by_margin": _by_margin(scored),
        "length_bias": _length_bias(scored),
        "scores": {"chosen": scored.chosen.tolist(), "rejected": scored.rejected.tolist()},
        "stability": stability(first_member(model), scored),
    }
    if isinstance(model, EnsembleRewardModel):
        card["ensemble"] = member_agreement(scored)
    if (top_1 := top_1_table(completions.comparisons, completions.by_comparison())) is not None:
        card["top_1"] = top_1
    if others:
        card["agreement"] = _compare(completions, others)
    if judge is not None:
        card["best_of_n"] = _best_of_n(completions, judge)
    return card


def decided_pairs(model: RewardModel | EnsembleRewardModel, scored: CompletionScores) -> ScoredPairs:
    """Select best and worst completion of every decided comparison; a ValueError if none is decided."""
    decided = [index for index, comparison in enumerate(scored.comparisons) if comparison.is_decided]
    if not decided:
        count = len(scored.comparisons)
        raise ValueError(
            f"All {count} comparisons are ties or have a preference of 0.5: accuracy needs a better and a worse one."
        )
    comparisons = [scored.comparisons[index] for index in decided]
    best, worst = [scored.first[index] for index in decided], [scored.last[index] for index in decided]
    member = first_member(model)
    return ScoredPairs(
        comparisons=comparisons,
        chosen=scored.scores[best],
        rejected=scored.scores[worst],
        raw_differences=scored.raw_differences()[decided],
        member_votes=scored.members[:, best] > scored.members[:, worst],
        spread=float(scored.members.std(dim=0).mean()) if len(scored.members) > 1 else math.nan,
        chosen_tokens=_token_counts(member, comparisons, 0),
        rejected_tokens=_token_counts(member, comparisons, -1),
    )


def model_facts(model: RewardModel | EnsembleRewardModel) -> dict[str, str]:
    """The facts of a reward model that the report card shows, by name."""
    contract = first_member(model).contract
    return {
        "trained from": contract.base,
        "kind": f"ensemble of {len(model.members)}" if isinstance(model, EnsembleRewardModel) else "single",
        "template": contract.text.template,
        "end-of-text token": "appended" if contract.text.append_eos else "not appended",
        "longest text": f"{contract.text.max_length} tokens",
        "training comparisons": str(contract.data.get("train", "unknown")),
        "training data": str(contract.data.get("fingerprint", "unknown"))[:16],
        "normalized on": f"{contract.normalization.samples} samples ({contract.normalization.reference})",
    }


def stability(model: RewardModel, scored: ScoredPairs, *, samples: int = 64) -> dict[str, float | None]:
    """Change of raw scores without batching (largest), with left padding (largest), and without EOS (mean).

    The first two must be 0 up to rounding: a score is a function of the text alone.
    """
    rule = model.contract.text
    pairs = scored.comparisons[:samples]
    rows = [encode(model.tokenizer, rule, p.prompt, p.completions[0], truncate=True, tools=p.tools) for p in pairs]
    batched = torch.tensor(model.score_ids(rows))
    alone = torch.tensor([model.score_ids([row])[0] for row in rows])
    left = model.left_padded_scores(rows)
    can_remove_eos = rule.append_eos and all(len(row) > 1 for row in rows)
    without_eos = torch.tensor(model.score_ids([row[:-1] for row in rows])) if can_remove_eos else None
    return {
        "batch_composition": float((batched - alone).abs().max()),
        "padding_side": None if left is None else float((batched - torch.tensor(left)).abs().max()),
        "eos": None if without_eos is None else float((batched - without_eos).abs().mean()),
    }


def member_agreement(scored: ScoredPairs) -> dict[str, Any]:
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


def _compare(scored: CompletionScores, others: Mapping[str, Scorer]) -> dict[str, Any]:
    """Accuracy of the model and of each of `others`, and the agreement of every two of them."""
    scores = {"this model": scored.by_comparison()}
    for name, scorer in others.items():
        if isinstance(scorer, RewardModel | EnsembleRewardModel):
            scores[name] = score_completions(scorer, scored.comparisons).by_comparison()
        else:
            prompts = [comparison.prompt for comparison in scored.comparisons for _ in comparison.completions]
            texts = [text for comparison in scored.comparisons for text in comparison.completions]
            sizes = [len(comparison.completions) for comparison in scored.comparisons]
            scores[name] = list(torch.split(torch.tensor(scorer(prompts, texts), dtype=torch.float64), sizes))
    decided = [index for index, comparison in enumerate(scored.comparisons) if comparison.is_decided]
    return {
        "accuracy": {
            name: asdict(pair_accuracy([float(rows[index][0] - rows[index][-1]) for index in decided]))
            for name, rows in scores.items()
        },
        "pairs": [
            {"models": [one, other], **agreement(scores[one], scores[other])} for one, other in combinations(scores, 2)
        ],
    }


def _token_counts(model: RewardModel, comparisons: Sequence[Comparison], index: int) -> Tensor:
    rule = model.contract.text
    rows = [
        encode(model.tokenizer, rule, c.prompt, c.completions[index], truncate=True, tools=c.tools) for c in comparisons
    ]
    return torch.tensor([float(len(row)) for row in rows])


def _by_source(scored: ScoredPairs) -> dict[str, Any]:
    sources = sorted({pair.source for pair in scored.comparisons})
    rows = {name: [i for i, pair in enumerate(scored.comparisons) if pair.source == name] for name in sources}
    return {name or "all": asdict(pair_accuracy(scored.raw_differences[rows[name]].tolist())) for name in sources}


def _by_quartile(scored: ScoredPairs, values: Tensor, unit: str) -> dict[str, Any]:
    """Accuracy in four buckets of equal size, keyed by their range; those of an equal range are one."""
    table: dict[str, list[float]] = {}
    for part in torch.tensor_split(torch.argsort(values, stable=True), min(4, len(values))):
        low, high = float(values[part[0]]), float(values[part[-1]])
        table.setdefault(f"{low:.4g} to {high:.4g} {unit}", []).extend(scored.raw_differences[part].tolist())
    return {name: asdict(pair_accuracy(differences)) for name, differences in table.items()}


def _by_margin(scored: ScoredPairs) -> dict[str, Any]:
    """Accuracy by quartile of the labeled margin if the data has one, else of the predicted margin."""
    margins = torch.tensor([pair.margin for pair in scored.comparisons])
    if len(set(margins.tolist())) > 1:
        return {"kind": "labeled", "buckets": _by_quartile(scored, margins, "labeled")}
    return {"kind": "predicted", "buckets": _by_quartile(scored, scored.differences.abs(), "std")}


def _length_bias(scored: ScoredPairs) -> dict[str, Any]:
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
    """Mean judge score of the completion that the model ranks first among N; without prompts, all are one pool."""
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
