"""Check scored batches and parameters for nan and infinity, before an update uses them."""

import warnings

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from rlhf_ppo.distributed.collectives import Processes
from rlhf_ppo.rollout.experience import Responses, ScoredResponses


def check_finite_scores(
    scored: ScoredResponses, mask: Bool[Tensor, "batch time"], processes: Processes, model: nn.Module
) -> None:
    """Raise if a log-probability, KL or value of a batch is not finite; all processes raise if one does.

    Raises:
        FloatingPointError: Names a sample, what is not finite, and parameters that hold nan or infinity, if any.
    """
    problems = _nonfinite_samples(scored, mask)
    count = torch.tensor(float(len(problems)), device=mask.device)
    if float(processes.reduce_sum(count)) == 0:
        return
    problem = problems[0] if problems else "a sample of another process"
    parameters = nonfinite_parameters(model)
    cause = (
        f"the parameters {', '.join(parameters[:3])} hold nan or infinity: go back to an earlier checkpoint and lower "
        "the learning rate"
        if parameters
        else "a token that the model gives probability 0, or half precision overflowing: check that the tokens were "
        "sampled from this model, and prefer bfloat16 or float32 to float16"
    )
    raise FloatingPointError(
        f"expected finite log-probabilities and values, got {problem} ({len(problems)} of {len(mask)} samples of this "
        f"process): nothing has changed. Cause: {cause}."
    )


def check_learnable(responses: Responses, processes: Processes, *, has_critic: bool) -> None:
    """Raise if nothing can be learned from a batch, before anything has changed.

    Raises:
        ValueError: Every response is excluded from the loss, on all processes; or episodes come in several rows, and no
            critic stands for what follows a row.
    """
    if responses.excluded is not None and not processes.any_process(not bool(responses.excluded.all())):
        raise ValueError(
            "expected a response that takes part in the loss, got none: with mask_truncated, each of the batch was cut "
            "before a stop token. Raise max_new_tokens, check the stop tokens, or set mask_truncated=False."
        )
    has_segments = responses.continues is not None and bool(responses.continues.any())
    if not has_critic and processes.any_process(has_segments):
        raise ValueError(
            "expected an algorithm with a critic for episodes with several contexts, got one without: the reward of "
            "later segments would reach no action before them. Use PPOClip, or episodes of one context."
        )


def nonfinite_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that hold nan or infinity."""
    return [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]


def warn_of_negative_kl(kl: float, penalty: str) -> None:
    """Warn if the KL estimate is more negative than chance explains.

    Args:
        kl: Mean over responses, nats.
        penalty: The estimator, `PPOConfig.kl_penalty`.
    """
    # |log-ratio| and exact KL cannot be negative; only the k1 estimate of a wrong sampler can.
    if kl < -1.0 and penalty == "kl":
        warnings.warn(
            f"KL divergence is starting to become negative: {kl:.2f} nats per response. The responses are less "
            "likely under the policy than under the reference, so they were probably not sampled from the "
            "policy as it is scored: check temperature, top_k, top_p, min_length and the padding of generation.",
            stacklevel=5,
        )


def _nonfinite_samples(scored: ScoredResponses, mask: Tensor) -> list[str]:
    """One description per sample that has an entry that is not finite."""
    quantities = {
        "the policy's log-probabilities": scored.logprobs, "the KL": scored.kl, "the values": scored.values[:, :-1],
    }  # fmt: skip
    if scored.ref_logprobs is not None:
        quantities["the reference's log-probabilities"] = scored.ref_logprobs
    problems: dict[int, str] = {}
    for name, values in quantities.items():
        for row in (~values.isfinite() & mask).any(dim=1).nonzero().flatten().tolist():
            problems.setdefault(row, f"sample {row}, where {name} are not finite")
    return [problems[row] for row in sorted(problems)]
