"""Score all completions of comparisons, and compute held-out metrics and the normalization from the scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reward_model.data.comparisons import Comparison
from reward_model.evaluation.metrics import log_loss, pair_accuracy
from reward_model.models.contract import Normalization
from reward_model.models.ensemble import EnsembleRewardModel
from reward_model.models.model import RewardModel
from rlhf_ppo.chat.messages import Text


@dataclass(frozen=True, kw_only=True)
class CompletionScores:
    """Scores of all completions of some comparisons, concatenated in order."""

    comparisons: list[Comparison]
    raw: Float[Tensor, "members completions"]
    """Raw scores of each member; one member if the model is no ensemble."""
    members: Float[Tensor, "members completions"]
    """Normalized scores of each member."""
    scores: Float[Tensor, " completions"]
    """Final scores, as the model returns them."""
    first: list[int]
    """Index of each comparison's best completion."""
    last: list[int]
    """Index of each comparison's worst completion."""

    def by_comparison(self) -> list[Tensor]:
        """Final scores of the completions of each comparison."""
        return list(torch.split(self.scores, [len(comparison.completions) for comparison in self.comparisons]))

    def raw_differences(self) -> Float[Tensor, " comparisons"]:
        """Raw score of best minus worst, mean over members: the log-odds of the preference in the loss."""
        raw = self.raw.mean(dim=0)
        return raw[self.first] - raw[self.last]


def score_completions(model: RewardModel | EnsembleRewardModel, comparisons: Sequence[Comparison]) -> CompletionScores:
    """Score every completion of `comparisons` once with every member."""
    prompts: list[Text] = []
    texts: list[Text] = []
    tools: list[Sequence[Any]] = []
    first, last = [], []
    for comparison in comparisons:
        first.append(len(texts))
        texts += comparison.completions
        prompts += [comparison.prompt] * len(comparison.completions)
        tools += [comparison.tools] * len(comparison.completions)
        last.append(len(texts) - 1)
    members = model.members if isinstance(model, EnsembleRewardModel) else [model]
    raw = torch.tensor([member.raw_scores(prompts, texts, tools) for member in members], dtype=torch.float64)
    scales = [member.contract.normalization for member in members]
    normalized = torch.stack([scale.gain * row + scale.bias for scale, row in zip(scales, raw, strict=True)])
    scores = normalized[0]
    if isinstance(model, EnsembleRewardModel):
        scores = model.combine(normalized)
    return CompletionScores(
        comparisons=list(comparisons), raw=raw, members=normalized, scores=scores, first=first, last=last
    )


def held_out_metrics(scored: CompletionScores) -> dict[str, float]:
    """Accuracy of best against worst with its interval, margin and log loss of decided comparisons, from raw scores."""
    decided = [index for index, comparison in enumerate(scored.comparisons) if comparison.is_decided]
    if not decided:
        return {}
    differences = scored.raw_differences()[decided]
    accuracy = pair_accuracy(differences.tolist())
    return {
        "accuracy": accuracy.value,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "pairs": float(accuracy.count),
        "margin": float(differences.mean()),
        "log_loss": log_loss(differences, preferences([scored.comparisons[index] for index in decided])),
    }


def preferences(comparisons: Sequence[Comparison]) -> Float[Tensor, " comparisons"]:
    """The probability of each comparison that its best completion is the better one."""
    return torch.tensor([comparison.preference for comparison in comparisons], dtype=torch.float64)


def fit_normalization(raw: Sequence[float], reference: str) -> Normalization:
    """Fit gain and bias such that the raw scores of reference samples get mean 0 and standard deviation 1.

    Args:
        reference: Origin of the samples, for the contract.

    Raises:
        ValueError: All scores are equal, or there are fewer than two.
    """
    values = torch.tensor(raw, dtype=torch.float64)
    std = float(values.std()) if len(values) > 1 else 0.0
    if std == 0.0:
        raise ValueError(
            f"The raw scores of the {len(values)} reference samples are all equal: no scale can be read from them. "
            "Give at least two different samples."
        )
    return Normalization(gain=1 / std, bias=-float(values.mean()) / std, reference=reference, samples=len(values))
