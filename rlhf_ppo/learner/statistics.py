"""The statistics of one step, under the metric names of TRL and lm-human-preferences.

`classic_statistics` returns exactly the 40 entries of TRL's classic `PPOTrainer.step()`, without the timings; the other
functions add metrics of this package. docs/metrics.md says what each means and which values are healthy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_ppo.batch import join_columns
from rlhf_ppo.functional import masked_mean, total_scores
from rlhf_ppo.rollout.experience import Responses, ScoredResponses
from rlhf_ppo.updates import UpdateRecord

BIAS_BINS = 5
"""Parts of a response in which the bias of the critic is measured."""

Statistics = dict[str, float | np.ndarray]


@dataclass(frozen=True, kw_only=True)
class StepData:
    """Tensors of one step, on one process or all, from which its statistics are computed."""

    scores: Float[Tensor, " batch"]
    kl: Float[Tensor, "batch time"]
    logprobs: Float[Tensor, "batch time"]
    ref_logprobs: Float[Tensor, "batch time"] | None
    non_score_rewards: Float[Tensor, "batch time"]
    mask: Bool[Tensor, "batch time"]
    query_lengths: Float[Tensor, " batch"]
    response_lengths: Float[Tensor, " batch"]

    @classmethod
    def of(cls, responses: Responses, scores: Tensor, scored: ScoredResponses, penalty: Tensor) -> "StepData":
        """Collect the tensors from the stages of an iteration.

        Args:
            scores: Normalized scores, [B] or [B, T].
            scored: Log-probabilities and KL under policy and reference.
            penalty: Non-score part of the rewards, [B, T].
        """
        return cls(
            scores=total_scores(scores, responses.mask), kl=scored.kl, logprobs=scored.logprobs,
            ref_logprobs=scored.ref_logprobs, non_score_rewards=penalty, mask=responses.mask,
            query_lengths=torch.tensor([float(len(prompt)) for prompt in responses.inputs.prompts]),
            response_lengths=torch.tensor([float(len(response)) for response in responses.inputs.responses]),
        )  # fmt: skip

    def cpu(self) -> "StepData":
        columns = {item.name: getattr(self, item.name) for item in fields(self)}
        return replace(self, **{name: column.cpu() for name, column in columns.items() if column is not None})

    def concatenate(self, others: Sequence["StepData"]) -> "StepData":
        """Concatenate the rows of this process and `others`."""
        return StepData(**join_columns([self, *others], [item.name for item in fields(self)]))


def classic_statistics(
    data: StepData, record: UpdateRecord, *, kl_coef: float, learning_rate: float, has_critic: bool = True
) -> Statistics:
    """The classic's statistics, without the timings.

    Without a reference there is none on the KL, without a critic none on values.

    Args:
        data: Rows of all processes.
        record: Metrics of the update, over all processes.
        kl_coef: The coefficient *used* in this step.
        learning_rate: That of the first parameter group.
    """
    rows, means = per_row_statistics(data), record.mean()
    names = _UPDATE_NAMES | _CRITIC_NAMES if has_critic else _UPDATE_NAMES
    ppo = {f"ppo/{name}": value for name, value in means.items() if name in names}
    if has_critic:
        variance = ppo["ppo/returns/var"]
        ppo["ppo/val/var_explained"] = 1.0 - ppo["ppo/val/error"] / variance if variance else float("nan")
    reference: Statistics = {}
    if data.ref_logprobs is not None:
        reference = {
            "objective/kl": float(rows["kl"].mean()),
            "objective/kl_dist": _array(rows["kl"]),
            "objective/ref_logprobs": _array(data.ref_logprobs),
            "objective/kl_coef": kl_coef,
        }
    return reference | {
        "objective/logprobs": _array(data.logprobs),
        "objective/entropy": float(rows["nll"].mean()),
        "ppo/mean_non_score_reward": float(rows["penalty"].sum() / rows["actions"].sum()),
        "ppo/mean_scores": float(rows["scores"].mean()),
        "ppo/std_scores": _std(rows["scores"]),
        "tokens/queries_len_mean": float(rows["query_lengths"].mean()),
        "tokens/queries_len_std": _std(rows["query_lengths"]),
        "tokens/queries_dist": _array(data.query_lengths),
        "tokens/responses_len_mean": float(rows["response_lengths"].mean()),
        "tokens/responses_len_std": _std(rows["response_lengths"]),
        "tokens/responses_dist": _array(data.response_lengths),
        **ppo,
        "ppo/policy/advantages": _array(torch.cat(record.advantages)),
        "ppo/policy/ratio": _array(record.ratio()),
        "ppo/learning_rate": learning_rate,
    }


def per_row_statistics(data: StepData) -> dict[str, Tensor]:
    """Everything that is averaged over rows, one number per row, each [B]."""
    return {
        "kl": row_sums(data.kl, data.mask),
        "nll": row_sums(-data.logprobs, data.mask),
        "penalty": row_sums(data.non_score_rewards, data.mask),
        "actions": data.mask.sum(dim=1).float(),
        "scores": data.scores.float(),
        "query_lengths": data.query_lengths,
        "response_lengths": data.response_lengths,
    }


def row_sums(values: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]) -> Float[Tensor, " batch"]:
    """Sum over the actions of each row; entries outside the mask, nan included, are not read."""
    return values.masked_fill(~mask, 0.0).sum(dim=1)


def extra_metrics(data: StepData, record: UpdateRecord) -> dict[str, float]:
    """Metrics beyond the classic's: k3 estimate of the KL, own tokens and turns, gradient norm, skipped updates."""
    reference: dict[str, float] = {}
    if data.ref_logprobs is not None:
        log_ratio = (data.ref_logprobs - data.logprobs).masked_fill(~data.mask, 0.0)
        k3 = torch.expm1(log_ratio) - log_ratio
        reference = {
            "objective/kl_k3": float(row_sums(k3, data.mask).mean()),
            "objective/kl_per_token": float(masked_mean(-log_ratio, data.mask)),
        }
    before = torch.nn.functional.pad(data.mask, (1, 0))[:, :-1]
    return reference | {
        "tokens/actions_mean": float(data.mask.sum(dim=1).float().mean()),
        "tokens/turns_mean": float((data.mask & ~before).sum(dim=1).float().mean()),
        **{f"ppo/{name}": value for name, value in record.mean().items() if name == "loss/pretraining"},
        "ppo/policy/grad_norm": record.mean().get("policy/grad_norm", float("nan")),
        "ppo/policy/ratio_max": float(record.ratio().max()) if record.ratios else float("nan"),
        "ppo/updates": float(len(record.metrics)),
        "ppo/updates_skipped": float(record.skipped),
        "ppo/stopped_early": float(record.stopped_early),
        **{f"ppo/{name}": value for name, value in record.extras.items()},
    }


def bias_metrics(sums: Float[Tensor, "two bins"]) -> dict[str, float]:
    """Mean of V - R in each part of the responses, from the sums of `value_bias_by_position` over processes."""
    errors, counts = sums.double().unbind()
    means = (errors / counts.clamp(min=1)).tolist()
    return {f"ppo/val/bias_{part}": mean for part, mean in enumerate(means, start=1)}


def work_metrics(work_counts: Sequence[Mapping[str, int]]) -> dict[str, float]:
    """Token and pass counts of a step, summed over processes, and their imbalance (largest over mean).

    Args:
        work_counts: Counts of each process, with the same names in each, `trunk_tokens` among them.
    """
    tokens = [float(counts["trunk_tokens"]) for counts in work_counts]
    work = {f"work/{name}": float(sum(counts[name] for counts in work_counts)) for name in work_counts[0]}
    return work | {"work/imbalance": max(tokens) * len(tokens) / sum(tokens)}


def scalar_statistics(statistics: Mapping[str, object]) -> dict[str, float]:
    """The entries that are one number, for metrics.jsonl and trackers."""
    return {name: float(value) for name, value in statistics.items() if isinstance(value, int | float | np.floating)}


def _array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().float().cpu().numpy()
    return array


def _std(values: Tensor) -> float:
    return float(values.float().std()) if len(values) > 1 else 0.0


_UPDATE_NAMES = frozenset(
    ("loss/policy", "loss/total", "policy/entropy", "policy/approxkl", "policy/policykl", "policy/clipfrac")
    + ("policy/advantages_mean", "returns/mean", "returns/var")
)
_CRITIC_NAMES = frozenset(("loss/value", "val/vpred", "val/error", "val/clipfrac", "val/mean", "val/var"))
