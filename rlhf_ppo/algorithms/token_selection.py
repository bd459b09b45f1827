"""Take tokens out of the policy loss: all but those of high entropy, or some with a large covariance."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ppo.algorithms.surrogate_config import ClipCovariance, TopEntropyTokens
from rlhf_ppo.batch import TrainBatch
from rlhf_ppo.distributed.collectives import Processes
from rlhf_ppo.functional import token_covariances, top_share_threshold
from rlhf_ppo.updates import MinibatchConfig, Update, UpdateRecord


class TokenSelectionUpdate:
    """Set the advantage of tokens to 0 before an update: they leave the policy gradient, and its divisor stays.

    Args:
        policy: The policy without Accelerate's wrapper.
        processes: Thresholds are those of all of them.
        seed: Seeds the draws of `ClipCovariance`.
    """

    def __init__(
        self,
        update: Update,
        config: TopEntropyTokens | ClipCovariance,
        *,
        policy: nn.Module,
        processes: Processes,
        minibatch_config: Callable[[], MinibatchConfig],
        seed: int,
    ) -> None:
        self.inner, self.config = update, config
        self.policy, self.processes, self.minibatch_config = policy, processes, minibatch_config
        self.seed, self.calls = seed, 0

    def __call__(self, batch: TrainBatch) -> UpdateRecord:
        """Select tokens of this process's rows, by thresholds over all processes, and run the update."""
        match self.config:
            case TopEntropyTokens(share=share):
                entropy = self._entropy(batch)
                kept = entropy >= top_share_threshold(self._gather(entropy[batch.mask]), share)
            case ClipCovariance() as config:
                kept = ~self._drawn(batch, config)
        self.calls += 1
        record = self.inner(replace(batch, advantages=batch.advantages.masked_fill(~kept, 0.0)))
        counts = torch.stack([(kept & batch.mask).sum(), batch.mask.sum()]).double()
        selected, actions = self.processes.reduce_sum(counts).tolist()
        record.extras["policy/selected_share"] = selected / max(actions, 1.0)
        return record

    def state_dict(self) -> dict[str, Any]:
        """State of the update, and the number of calls, which seeds the draws."""
        return {"update": self.inner.state_dict(), "calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["update"])
        self.calls = int(state["calls"])

    def _gather(self, values: Tensor) -> Tensor:
        """Values of all processes, 1-D, on this process's device."""
        return torch.cat(self.processes.gather_objects([values.cpu()])).to(values.device)

    @torch.no_grad()
    def _entropy(self, batch: TrainBatch) -> Tensor:
        entropy = torch.zeros_like(batch.advantages)
        for rows in self.minibatch_config().micro_batches(batch.inputs.costs()):
            found = self.policy(batch.inputs.select(rows), with_entropy=True).entropy
            entropy[rows.to(entropy.device), : found.shape[1]] = found.to(entropy.dtype)
        return entropy

    def _drawn(self, batch: TrainBatch, config: ClipCovariance) -> Tensor:
        """True at tokens that leave: drawn from those whose covariance is within the bounds."""
        reduce_sum = self.processes.reduce_sum
        covariances = token_covariances(batch.logprobs, batch.advantages, batch.mask, reduce_sum=reduce_sum)
        candidates = batch.mask & (covariances >= config.low) & (covariances <= config.high)
        number = math.floor(config.share * float(reduce_sum(batch.mask.sum().double())))
        generator = torch.Generator().manual_seed(
            self.seed + 7919 * self.calls + self.processes.accelerator.process_index
        )
        keys = torch.rand(batch.mask.shape, generator=generator).to(batch.mask.device)
        keys = keys.masked_fill(~candidates, math.inf)
        smallest = self._gather(keys[candidates]).sort().values[:number]
        if not len(smallest):
            return torch.zeros_like(batch.mask)
        return candidates & (keys <= smallest[-1])
