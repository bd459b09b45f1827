"""The first batch of a policy with adapters: its KL to the reference must be 0, or the reference is another model."""

import torch
from jaxtyping import Bool
from torch import Tensor

from rlhf_ppo.distributed.collectives import Processes
from rlhf_ppo.models import PreTrainedModelWrapper
from rlhf_ppo.models.adapters import REFERENCE_ADAPTER
from rlhf_ppo.rollout.experience import ScoredResponses


class StartKLCheck:
    """Looks at the first batch that is learned from, once; due only where the model is its own reference.

    A model saved by PPO that goes on from there has left its reference long ago: nothing is due.

    Args:
        model: The policy.
        processes: All of them refuse if the mean over all of them is too large.
        own_reference: Whether the reference is the model itself, with its adapters off or another one on.
    """

    def __init__(self, model: PreTrainedModelWrapper, processes: Processes, *, own_reference: bool) -> None:
        self.model, self.processes = model, processes
        self.goes_on = own_reference and model.value_head_was_loaded
        """Whether the policy was saved by PPO, and left its reference then."""
        self.is_due = own_reference and not self.goes_on
        """Whether nothing was learned yet; a checkpoint that is loaded sets it to False."""

    def __call__(self, scored: ScoredResponses, mask: Bool[Tensor, "batch time"]) -> None:
        """Compare policy and reference at every action.

        Raises:
            ValueError: They differ; nothing has changed.
        """
        if not self.is_due:
            return
        gaps = (scored.logprobs - scored.ref_logprobs).abs().masked_fill(~mask, 0.0)
        total, count = self.processes.reduce_sum(torch.stack([gaps.sum(), mask.sum().to(gaps.dtype)])).tolist()
        gap = total / max(count, 1.0)
        if not gap <= self._tolerance():
            with_copy = REFERENCE_ADAPTER in self.model.pretrained_model.peft_config
            raise ValueError(
                f"expected policy and reference to agree before anything is learned (KL 0), got log-probabilities that "
                f"differ by {gap:.3g} nats a token: the reference is "
                f"{f'the adapter {REFERENCE_ADAPTER!r}' if with_copy else 'the base with its adapters off'}, not the "
                "model that training starts from, and the KL penalty would pull towards it. Build the trainer when the "
                "adapter is where training starts and leave it alone until then, or pass that model as `ref_model`."
            )
        self.is_due = False

    def _tolerance(self) -> float:
        """Nats a token. Both are passes of one model, equal to rounding."""
        kinds = {parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point()}
        rounds = self.processes.accelerator.mixed_precision != "no" or not kinds <= {torch.float32, torch.float64}
        return 0.1 if rounds else 1e-3
