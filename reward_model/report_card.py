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
)
from reward_model.model import RewardModel
from reward_model.text import Text, Texts, encode

Scorer = Callable[[Texts, Texts], list[float]]
BALANCED = 0.1
"""Pairs whose lengths differ by at most this share of the longer count as balanced."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Pairs (best and worst of each comparison that is no tie) with their scores and lengths."""

    pairs: list[Comparison]
    chosen: Tensor
    """Normalised scores [pairs]."""
    rejected: Tensor
    raw_differences: Tensor
    """Differences of raw scores: the log-odds that the loss was fitted to."""
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def differences(self) -> Tensor:
        """Normalised score of chosen less that of rejected."""
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
    scored = score_pairs(model, comparisons)
    differences = scored.raw_differences
    card: dict[str, Any] = {
        "pairs": len(scored.pairs),
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
        card["ensemble"] = agreement(model, scored)
    if judge is not None:
        card["best_of_n"] = _best_of_n(model, comparisons, judge)
    return card


def score_pairs(model: RewardModel | EnsembleRewardModel, comparisons: Sequence[Comparison]) -> Scored:
    """Score best and worst of every decided comparison."""
    pairs = [comparison for comparison in comparisons if not comparison.is_tie]
    if not pairs:
        raise ValueError(
            f"No decided comparison among {len(comparisons)}: accuracy needs a better and a worse completion."
        )
    prompts = [pair.prompt for pair in pairs]
    best, worst = [pair.completions[0] for pair in pairs], [pair.completions[-1] for pair in pairs]
    first = first_member(model)
    chosen, rejected = torch.tensor(model(prompts, best)), torch.tensor(model(prompts, worst))
    if isinstance(model, EnsembleRewardModel):
        raw = torch.tensor(model.raw_scores(prompts, best)) - torch.tensor(model.raw_scores(prompts, worst))
    else:
        raw = (chosen - rejected) / model.contract.normalisation.gain
    return Scored(
        pairs=pairs,
        chosen=chosen,
        rejected=rejected,
        raw_differences=raw,
        chosen_tokens=_token_counts(first, prompts, best),
        rejected_tokens=_token_counts(first, prompts, worst),
    )


def first_member(model: RewardModel | EnsembleRewardModel) -> RewardModel:
    """The model itself, or an ensemble's first member: whose tokenizer counts and whose stability is probed."""
    return model.members[0] if isinstance(model, EnsembleRewardModel) else model


def stability(model: RewardModel, scored: Scored, *, samples: int = 64) -> dict[str, float | None]:
    """Largest change of a raw score when only the packing of the batch changes, and the mean one without its EOS.

    The first two must be 0 up to rounding: a score is a function of the text alone.
    """
    rule = model.contract.text
    pairs = scored.pairs[:samples]
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


def agreement(model: EnsembleRewardModel, scored: Scored) -> dict[str, Any]:
    """Accuracy of each member, and how often two members agree on a pair."""
    prompts = [pair.prompt for pair in scored.pairs]
    best = torch.tensor(model.member_scores(prompts, [pair.completions[0] for pair in scored.pairs]))
    worst = torch.tensor(model.member_scores(prompts, [pair.completions[-1] for pair in scored.pairs]))
    differences = best - worst
    votes = (differences > 0).float()
    share = votes.mean(dim=0)
    count = len(votes)
    # of the ordered pairs of different members, those that vote alike
    alike = (count * (share**2 + (1 - share) ** 2) - 1) / (count - 1)
    return {
        "members": [asdict(pair_accuracy(row.tolist())) for row in differences],
        "pairwise_agreement": float(alike.mean()),
        "score_std": float(torch.cat((best, worst), dim=1).std(dim=0).mean()),
    }


def _token_counts(model: RewardModel, prompts: Texts, texts: Texts) -> Tensor:
    rule = model.contract.text
    pairs = zip(prompts, texts, strict=True)
    return torch.tensor([float(len(encode(model.tokenizer, rule, p, text, truncate=True))) for p, text in pairs])


def _by_source(scored: Scored) -> dict[str, Any]:
    sources = sorted({pair.source for pair in scored.pairs})
    rows = {name: [i for i, pair in enumerate(scored.pairs) if pair.source == name] for name in sources}
    return {name or "all": asdict(pair_accuracy(scored.raw_differences[rows[name]].tolist())) for name in sources}


def _by_quartile(scored: Scored, values: Tensor, unit: str) -> dict[str, Any]:
    """Accuracy in four buckets of equal size, keyed by their range."""
    table = {}
    for part in torch.tensor_split(torch.argsort(values, stable=True), min(4, len(values))):
        low, high = float(values[part[0]]), float(values[part[-1]])
        table[f"{low:.4g} to {high:.4g} {unit}"] = asdict(pair_accuracy(scored.raw_differences[part].tolist()))
    return table


def _by_margin(scored: Scored) -> dict[str, Any]:
    """Buckets of the labelled margin where the data has one, else of the model's own."""
    margins = torch.tensor([pair.margin for pair in scored.pairs])
    if len(set(margins.tolist())) > 1:
        return {"kind": "labelled", "buckets": _by_quartile(scored, margins, "labelled")}
    return {"kind": "predicted", "buckets": _by_quartile(scored, scored.differences.abs(), "std")}


def _length_bias(scored: Scored) -> dict[str, Any]:
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


def _best_of_n(
    model: RewardModel | EnsembleRewardModel, comparisons: Sequence[Comparison], judge: Scorer
) -> list[dict[str, float]]:
    """Mean judge score of the completion that the model ranks first among N; one pool where prompts do not repeat."""
    texts = {(c.prompt_key(), str(text)): (c.prompt, text) for c in comparisons for text in c.completions}
    by_prompt: dict[str, list[tuple[Text, Text]]] = {}
    for (key, _), sample in texts.items():
        by_prompt.setdefault(key, []).append(sample)
    pools = [pool for pool in by_prompt.values() if len(pool) > 1]
    largest = min(64, max(len(pool) for pool in pools))
    sizes = [2**power for power in range(int(math.log2(largest)) + 1)]
    curves = []
    for pool in pools:
        prompts, answers = [prompt for prompt, _ in pool], [answer for _, answer in pool]
        proxy, gold = torch.tensor(model(prompts, answers)), torch.tensor(judge(prompts, answers))
        curves.append([best_of_n(proxy, gold, n) for n in sizes if n <= len(pool)])
    curve = []
    for index, n in enumerate(sizes):
        values = [values[index] for values in curves if len(values) > index]
        curve.append(
            {"n": n, "kl": math.log(n) - (n - 1) / n, "judge": sum(values) / len(values), "prompts": len(values)}
        )
    return curve
