"""Numbers that are not finite, found before they can reach a weight."""

import warnings

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from rlhf_ppo.distributed.collectives import Processes
from rlhf_ppo.rollout.experience import ScoredResponses


def check_finite_scores(
    scored: ScoredResponses, mask: Bool[Tensor, "batch time"], processes: Processes, model: nn.Module
) -> None:
    """Refuse a batch that policy or reference cannot score; every process refuses if one does.

    Raises:
        FloatingPointError: Names the sample, what is not finite, and the parameters that are to blame, if any.
    """
    broken = _broken_samples(scored, mask)
    count = torch.tensor(float(len(broken)), device=mask.device)
    if float(processes.reduce_sum(count)) == 0:
        return
    said = broken[0] if broken else "a sample of another process"
    parameters = broken_parameters(model)
    cause = (
        f"the parameters {', '.join(parameters[:3])} hold nan or infinity: go back to an earlier checkpoint and lower "
        "the learning rate"
        if parameters
        else "a token that the model gives probability 0, or half precision overflowing: check that the tokens were "
        "drawn from this model, and prefer bfloat16 or float32 to float16"
    )
    raise FloatingPointError(
        f"expected finite log-probabilities and values, got {said} ({len(broken)} of {len(mask)} samples of this "
        f"process): nothing has changed. Cause: {cause}."
    )


def broken_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that hold nan or infinity."""
    return [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]


def warn_of_negative_kl(kl: float, penalty: str) -> None:
    """Say so when the KL estimate is below what chance makes of zero."""
    # |log-ratio| and exact KL cannot be negative; only the k1 estimate of a wrong sampler can.
    if kl < -1.0 and penalty == "kl":
        warnings.warn(
            f"KL divergence is starting to become negative: {kl:.2f} nats a response. The responses are less "
            "likely under the policy than under the reference, so they were probably not drawn from the policy "
            "as it is scored: check temperature, top_k, top_p, min_length and the padding of generation.",
            stacklevel=4,
        )


def _broken_samples(scored: ScoredResponses, mask: Tensor) -> list[str]:
    parts = {
        "the policy's log-probabilities": scored.logprobs, "the reference's log-probabilities": scored.ref_logprobs,
        "the KL": scored.kl, "the values": scored.values[:, :-1],
    }  # fmt: skip
    found: dict[int, str] = {}
    for name, values in parts.items():
        for row in (~values.isfinite() & mask).any(dim=1).nonzero().flatten().tolist():
            found.setdefault(row, f"sample {row}, where {name} are not finite")
    return [found[row] for row in sorted(found)]
