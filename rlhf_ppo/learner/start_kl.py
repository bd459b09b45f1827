"""Check on the first batch that a policy with adapters agrees with its reference (KL 0)."""

import torch
from jaxtyping import Bool
from torch import Tensor

from rlhf_ppo.distributed.collectives import Processes
from rlhf_ppo.models import PreTrainedModelWrapper
from rlhf_ppo.models.adapters import REFERENCE_ADAPTER
from rlhf_ppo.rollout.experience import ScoredResponses


class StartKLCheck:
    """Checks once, on the first batch, that policy and reference agree, if the model is its own reference.

    A model that PPO saved earlier no longer agrees with its reference, so it is not checked.

    Args:
        processes: All raise if the mean over all of them is too large.
        is_own_reference: Whether the reference is the model itself, with its adapters off or another one on.
    """

    def __init__(self, model: PreTrainedModelWrapper, processes: Processes, *, is_own_reference: bool) -> None:
        self.model, self.processes = model, processes
        self.continues_ppo = is_own_reference and model.value_head_was_loaded
        """Whether the policy was saved by PPO, and so no longer agrees with its reference."""
        self.is_due = is_own_reference and not self.continues_ppo
        """Whether the check is still to be made; loading a checkpoint sets it to False."""

    def __call__(self, scored: ScoredResponses, mask: Bool[Tensor, "batch time"]) -> None:
        """Compare the log-probabilities of policy and reference at every action.

        Raises:
            ValueError: They differ by more than rounding; nothing has changed.
        """
        if not self.is_due or scored.ref_logprobs is None:
            return
        gaps = (scored.logprobs - scored.ref_logprobs).abs().masked_fill(~mask, 0.0)
        total, count = self.processes.reduce_sum(torch.stack([gaps.sum(), mask.sum().to(gaps.dtype)])).tolist()
        gap = total / max(count, 1.0)
        if not gap <= self._tolerance():
            has_adapter = REFERENCE_ADAPTER in self.model.pretrained_model.peft_config
            reference = f"the adapter {REFERENCE_ADAPTER!r}" if has_adapter else "the base with its adapters off"
            raise ValueError(
                f"expected policy and reference to agree before anything is learned (KL 0), got log-probabilities that "
                f"differ by {gap:.3g} nats a token: the reference is {reference}, not the model that "
                "training starts from, and the KL penalty would pull towards it. Finish changes of the "
                "adapter before the trainer is built, or pass the model that training starts from as `ref_model`."
            )
        self.is_due = False

    def _tolerance(self) -> float:
        """Tolerated mean difference, nats per token: passes of one model are equal up to rounding."""
        dtypes = {parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point()}
        is_mixed = self.processes.accelerator.mixed_precision != "no"
        return 0.1 if is_mixed or not dtypes <= {torch.float32, torch.float64} else 1e-3
