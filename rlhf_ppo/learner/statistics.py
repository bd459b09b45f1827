"""The statistics of one step, under the names that the field has used since 2019.

`classic_statistics` returns exactly the 40 entries of TRL's classic `PPOTrainer.step()`; `OUR_METRICS` names what
`train()` adds. docs/metrics.md says what each means and where it should stay.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_ppo.batch import concatenate_rows
from rlhf_ppo.functional import masked_mean
from rlhf_ppo.rollout.experience import Responses, ScoredResponses
from rlhf_ppo.updates import UpdateRecord

TIMINGS = ("forward_pass", "compute_rewards", "compute_advantages", "optimize_step", "calc_stats", "total")

Statistics = dict[str, float | np.ndarray]


@dataclass(frozen=True, kw_only=True)
class StepData:
    """What the statistics of a step are made from."""

    scores: Float[Tensor, " batch"]
    kl: Float[Tensor, "batch time"]
    logprobs: Float[Tensor, "batch time"]
    ref_logprobs: Float[Tensor, "batch time"]
    non_score_rewards: Float[Tensor, "batch time"]
    mask: Bool[Tensor, "batch time"]
    query_lengths: Float[Tensor, " batch"]
    response_lengths: Float[Tensor, " batch"]

    @classmethod
    def of(cls, responses: Responses, scores: Tensor, scored: ScoredResponses, penalty: Tensor) -> "StepData":
        """Gathered from the stages of an iteration; `scores` are the normalized ones, [B] or [B, T]."""
        return cls(
            scores=scores if scores.dim() == 1 else scores.sum(dim=1), kl=scored.kl, logprobs=scored.logprobs,
            ref_logprobs=scored.ref_logprobs, non_score_rewards=penalty, mask=responses.mask,
            query_lengths=torch.tensor([float(len(prompt)) for prompt in responses.inputs.prompts]),
            response_lengths=torch.tensor([float(len(response)) for response in responses.inputs.responses]),
        )  # fmt: skip

    def cpu(self) -> "StepData":
        """The same facts in main memory."""
        return StepData(**{item.name: getattr(self, item.name).cpu() for item in fields(self)})

    def joined(self, others: Sequence["StepData"]) -> "StepData":
        """The rows of several processes, one below the other."""
        parts = [self, *others]
        return StepData(
            **{item.name: concatenate_rows([getattr(part, item.name) for part in parts]) for item in fields(self)}
        )


def classic_statistics(facts: StepData, record: UpdateRecord, *, kl_coef: float, learning_rate: float) -> Statistics:
    """The classic's statistics, without the timings.

    Args:
        facts: Rows of all processes.
        record: What the update did, already global.
        kl_coef: The coefficient *used* in this step.
        learning_rate: Of the first parameter group.
    """
    rows, means = per_row_statistics(facts), record.mean()
    ppo = {f"ppo/{name}": value for name, value in means.items() if name in _UPDATE_NAMES}
    variance = ppo["ppo/returns/var"]
    return {
        "objective/kl": float(rows["kl"].mean()),
        "objective/kl_dist": _array(rows["kl"]),
        "objective/logprobs": _array(facts.logprobs),
        "objective/ref_logprobs": _array(facts.ref_logprobs),
        "objective/kl_coef": kl_coef,
        "objective/entropy": float(rows["nll"].mean()),
        "ppo/mean_non_score_reward": float(rows["penalty"].sum() / rows["actions"].sum()),
        "ppo/mean_scores": float(rows["scores"].mean()),
        "ppo/std_scores": _deviation(rows["scores"]),
        "tokens/queries_len_mean": float(rows["query_lengths"].mean()),
        "tokens/queries_len_std": _deviation(rows["query_lengths"]),
        "tokens/queries_dist": _array(facts.query_lengths),
        "tokens/responses_len_mean": float(rows["response_lengths"].mean()),
        "tokens/responses_len_std": _deviation(rows["response_lengths"]),
        "tokens/responses_dist": _array(facts.response_lengths),
        **ppo,
        "ppo/policy/advantages": _array(torch.cat(record.advantages)),
        "ppo/policy/ratio": _array(record.ratio()),
        "ppo/val/var_explained": 1.0 - ppo["ppo/val/error"] / variance if variance else float("nan"),
        "ppo/learning_rate": learning_rate,
    }


def per_row_statistics(facts: StepData) -> dict[str, Tensor]:
    """One number a row for everything that is averaged over rows, each [B]."""
    return {
        "kl": row_sums(facts.kl, facts.mask),
        "nll": row_sums(-facts.logprobs, facts.mask),
        "penalty": row_sums(facts.non_score_rewards, facts.mask),
        "actions": facts.mask.sum(dim=1).float(),
        "scores": facts.scores.float(),
        "query_lengths": facts.query_lengths,
        "response_lengths": facts.response_lengths,
    }


def row_sums(values: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]) -> Float[Tensor, " batch"]:
    """Sum over the actions of each row, junk outside the mask never read."""
    return values.masked_fill(~mask, 0.0).sum(dim=1)


def extra_metrics(facts: StepData, record: UpdateRecord) -> dict[str, float]:
    """What the classic did not report: a KL that cannot be negative, guards, gradient norm."""
    log_ratio = (facts.ref_logprobs - facts.logprobs).masked_fill(~facts.mask, 0.0)
    k3 = torch.expm1(log_ratio) - log_ratio
    return {
        "objective/kl_k3": float(row_sums(k3, facts.mask).mean()),
        "objective/kl_per_token": float(masked_mean(facts.logprobs - facts.ref_logprobs, facts.mask)),
        "ppo/policy/grad_norm": record.mean().get("policy/grad_norm", float("nan")),
        "ppo/policy/ratio_max": float(record.ratio().max()) if record.ratios else float("nan"),
        "ppo/updates": float(len(record.metrics)),
        "ppo/updates_skipped": float(record.skipped),
        "ppo/stopped_early": float(record.stopped_early),
        **{f"ppo/{name}": value for name, value in record.extras.items()},
    }


def work_metrics(shares: Sequence[Mapping[str, int]]) -> dict[str, float]:
    """The policy's work in a step over all processes, and how evenly it was shared.

    Args:
        shares: The counts of each process, the same names in each, `trunk_tokens` among them.
    """
    tokens = [float(share["trunk_tokens"]) for share in shares]
    work = {f"work/{name}": float(sum(share[name] for share in shares)) for name in shares[0]}
    return work | {"work/imbalance": max(tokens) * len(tokens) / sum(tokens)}


def scalar_statistics(statistics: Mapping[str, object]) -> dict[str, float]:
    """The entries that are one number: what goes to metrics.jsonl and trackers."""
    return {name: float(value) for name, value in statistics.items() if isinstance(value, int | float | np.floating)}


def _array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().float().cpu().numpy()
    return array


def _deviation(values: Tensor) -> float:
    return float(values.float().std()) if len(values) > 1 else 0.0


_UPDATE_NAMES = frozenset(
    ("loss/policy", "loss/value", "loss/total", "policy/entropy", "policy/approxkl", "policy/policykl")
    + ("policy/clipfrac", "policy/advantages_mean", "returns/mean", "returns/var", "val/vpred", "val/error")
    + ("val/clipfrac", "val/mean", "val/var")
)
