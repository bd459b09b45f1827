"""The critic fitted alone: after a trust-region step, and before the policy learns (value pretraining)."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor
from torch.optim import Optimizer

from rlhf_ppo.batch import PolicyInputs, PolicyOutput, TrainBatch, pad_rows, split_into_micro_batches
from rlhf_ppo.functional import value_loss
from rlhf_ppo.updates.minibatch import MinibatchConfig
from rlhf_ppo.updates.objective import Gradients, LossTerms
from rlhf_ppo.updates.sharding import assign_rows
from rlhf_ppo.updates.shuffle import Shuffle


class CriticFit:
    """Epochs of the critic's own parameters towards the batch's returns; the policy does not move.

    A value head on the policy's trunk is fitted on hidden states that are computed once. A critic with a trunk of its
    own learns with all its weights. Works on one process or several with whole copies of the model.

    Args:
        policy: Itself, without its wrapper: a `TokenPolicy`, or one of joints.
        optimizer: The prepared optimizer; it steps the critic's parameters alone.
        accelerator: Of both.
        config: Sizes of passes, epochs, rows of an optimizer step.
        shuffle: Of rows. The same on all processes.
        clip_range_value: Of the value loss; None: the plain squared error.
        gradients: Another way to the gradients, on one process; None: autograd.
    """

    def __init__(
        self,
        *,
        policy: Any,
        optimizer: Optimizer,
        accelerator: Accelerator,
        config: Callable[[], MinibatchConfig],
        shuffle: Shuffle,
        clip_range_value: float | None,
        gradients: Gradients | None = None,
    ) -> None:
        self.policy, self.optimizer, self.accelerator = policy, optimizer, accelerator
        self.parameters = [parameter for parameter in policy.critic_parameters() if parameter.requires_grad]
        self.config = config
        self.shuffle = shuffle
        self.clip_range_value = clip_range_value
        self.gradients = gradients
        theirs = {id(parameter) for parameter in self.parameters}
        self._others = [parameter for parameter in policy.parameters() if id(parameter) not in theirs]

    def __call__(self, batch: TrainBatch) -> None:
        """Fit; `batch` holds the rows of all processes, in one order."""
        if not self.parameters:
            return
        config = self.config()
        if self.gradients is not None:
            self._fit_by(self.gradients, batch, config)
            return
        share = assign_rows(batch.inputs.costs(), self.accelerator.num_processes)[self.accelerator.process_index]
        values = self._values(batch.inputs, share, config)
        own = set(share.tolist())
        for _ in range(config.epochs):
            order = self.shuffle(len(batch), torch.device("cpu"))
            for rows in order.split(config.minibatch_size * self.accelerator.num_processes):
                count = batch.mask[rows.to(batch.mask.device)].sum().float()
                mine = torch.tensor([row for row in rows.tolist() if row in own], dtype=torch.long)
                self._step(batch, mine, count, values, config)

    def state_dict(self) -> dict[str, Any]:
        """Of the shuffles."""
        return self.shuffle.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.shuffle.load_state_dict(state)

    def _fit_by(self, gradients: Gradients, batch: TrainBatch, config: MinibatchConfig) -> None:
        for _ in range(config.epochs):
            for rows in self.shuffle(len(batch), torch.device("cpu")).split(config.minibatch_size):
                gradients(self._objective, batch, rows)
                for parameter in self._others:  # without a gradient the optimizer leaves them alone
                    parameter.grad = None
                self.optimizer.step()
                self.optimizer.zero_grad()

    def _objective(self, output: PolicyOutput, micro_batch: TrainBatch, count: Tensor) -> LossTerms:
        loss, _ = value_loss(
            output.values[:, :-1], micro_batch.values, micro_batch.returns, micro_batch.mask,
            clip_range=self.clip_range_value, count=count,
        )  # fmt: skip
        return LossTerms(loss=loss, metrics={}, ratio=loss.detach()[None])

    def _step(
        self,
        batch: TrainBatch,
        rows: Int[Tensor, " rows"],
        count: Tensor,
        values: Callable[[list[int]], list[Tensor]],
        config: MinibatchConfig,
    ) -> None:
        totals = [torch.zeros_like(parameter) for parameter in self.parameters]
        micro_batches = split_into_micro_batches(
            batch.inputs.costs()[rows], size=config.micro_batch_size, token_budget=config.token_budget
        )
        for micro_batch in micro_batches:
            chosen = rows[micro_batch].tolist()
            loss, _ = value_loss(
                pad_rows(values(chosen), width=batch.mask.shape[1]), batch.values[chosen], batch.returns[chosen],
                batch.mask[chosen], clip_range=self.clip_range_value, count=count,
            )  # fmt: skip
            for total, gradient in zip(totals, torch.autograd.grad(loss, self.parameters), strict=True):
                total += gradient
        for parameter, total in zip(self.parameters, totals, strict=True):
            parameter.grad = self.accelerator.reduce(total, reduction="sum")
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _values(
        self, inputs: PolicyInputs, share: Tensor, config: MinibatchConfig
    ) -> Callable[[list[int]], list[Tensor]]:
        """Rows -> V(s_0) ... V(s_{T-1}) of each, with the gradient of the critic's parameters."""
        if getattr(self.policy, "separate_critic", None) is not None:
            return lambda rows: self.policy.critic_values(inputs.select(torch.tensor(rows)))
        states: dict[int, Tensor] = {}
        costs = inputs.costs()
        with torch.no_grad():
            for micro_batch in split_into_micro_batches(
                costs[share], size=config.micro_batch_size, token_budget=config.token_budget
            ):
                rows = share[micro_batch]
                states |= dict(zip(rows.tolist(), self.policy.critic_states(inputs.select(rows)), strict=True))

        def values(rows: list[int]) -> list[Tensor]:
            flat = self.policy.values_of(torch.cat([states[row] for row in rows]))
            return list(flat.split([len(states[row]) for row in rows]))

        return values
