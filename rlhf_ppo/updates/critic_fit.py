"""Fit the critic alone: after a trust-region step, or before the policy trains (value pretraining)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor
from torch.optim import Optimizer

from rlhf_ppo.batch import PolicyInputs, PolicyOutput, TrainBatch, pad_rows
from rlhf_ppo.functional import value_loss
from rlhf_ppo.updates.minibatch import MinibatchConfig
from rlhf_ppo.updates.objective import GradientFunction, LossTerms
from rlhf_ppo.updates.sharding import assign_rows
from rlhf_ppo.updates.shuffle import Shuffle


class CriticFit:
    """Train the critic's parameters for some epochs on the batch's returns, with the policy frozen.

    A value head on the policy's trunk is trained on hidden states that are computed once; a separate critic is trained
    with all its weights. Works on one process, or several with unsharded models.

    Args:
        policy: The unwrapped policy: a `TokenPolicy` or a `ControlPolicy`.
        optimizer: The prepared optimizer; it steps the critic's parameters alone.
        config: Returns epochs, minibatch size and micro-batch limits.
        shuffle: Orders the rows, identically on all processes.
        clip_range_value: ε of the value loss; None: the plain squared error.
        compute_gradients: Replaces autograd, on one process; None: autograd.
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
        compute_gradients: GradientFunction | None = None,
    ) -> None:
        self.policy, self.optimizer, self.accelerator = policy, optimizer, accelerator
        self.parameters = [parameter for parameter in policy.critic_parameters() if parameter.requires_grad]
        self.config = config
        self.shuffle = shuffle
        self.clip_range_value = clip_range_value
        self.compute_gradients = compute_gradients
        critic_ids = {id(parameter) for parameter in self.parameters}
        self._policy_parameters = [parameter for parameter in policy.parameters() if id(parameter) not in critic_ids]

    def __call__(self, batch: TrainBatch) -> None:
        """Train the critic; `batch` holds the rows of all processes, in the same order everywhere."""
        if not self.parameters:
            return
        self.optimizer.zero_grad()  # what a loss outside of the update, or an interrupted one, has left
        config = self.config()
        if self.compute_gradients is not None:
            self._fit_without_autograd(self.compute_gradients, batch, config)
            return
        local_rows = assign_rows(batch.inputs.costs(), self.accelerator.num_processes)[self.accelerator.process_index]
        values = self._value_function(batch.inputs, local_rows, config)
        local_row_set, has_actions = set(local_rows.tolist()), batch.mask.any(dim=1).cpu()
        for _ in range(config.epochs):
            order = self.shuffle(len(batch), torch.device("cpu"))
            for rows in order.split(config.minibatch_size * self.accelerator.num_processes):
                if not has_actions[rows].any():
                    continue  # no action, so no loss: momentum alone would move the critic
                count = batch.mask[rows.to(batch.mask.device)].sum().float()
                local_minibatch = torch.tensor([row for row in rows.tolist() if row in local_row_set], dtype=torch.long)
                self._step(batch, local_minibatch, count, values, config)

    def state_dict(self) -> dict[str, Any]:
        return self.shuffle.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shuffle.load_state_dict(state)

    def _fit_without_autograd(
        self, compute_gradients: GradientFunction, batch: TrainBatch, config: MinibatchConfig
    ) -> None:
        for _ in range(config.epochs):
            for rows in self.shuffle(len(batch), torch.device("cpu")).split(config.minibatch_size):
                compute_gradients(self._objective, batch, rows)
                for parameter in self._policy_parameters:  # the optimizer skips parameters without a gradient
                    parameter.grad = None
                self._step_optimizer(config)

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
        for micro_batch in config.micro_batches(batch.inputs.costs()[rows]):
            indices = rows[micro_batch].tolist()
            loss, _ = value_loss(
                pad_rows(values(indices), width=batch.mask.shape[1]), batch.values[indices], batch.returns[indices],
                batch.mask[indices], clip_range=self.clip_range_value, count=count,
            )  # fmt: skip
            for total, gradient in zip(totals, torch.autograd.grad(loss, self.parameters), strict=True):
                total += gradient
        for parameter, total in zip(self.parameters, totals, strict=True):
            parameter.grad = self.accelerator.reduce(total, reduction="sum")
        self._step_optimizer(config)

    def _step_optimizer(self, config: MinibatchConfig) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm or math.inf)
        if bool(norm.isfinite()):  # otherwise no step: Adam's moments would keep what is not finite
            # Accelerate's wrapper would divide these gradients, which are not scaled, by float16's loss scale.
            scaled = self.accelerator.scaler is not None
            (getattr(self.optimizer, "optimizer", self.optimizer) if scaled else self.optimizer).step()
        self.optimizer.zero_grad()

    def _value_function(
        self, inputs: PolicyInputs, local_rows: Tensor, config: MinibatchConfig
    ) -> Callable[[list[int]], list[Tensor]]:
        """Return a function: rows -> V(s_0) ... V(s_{T-1}) of each, differentiable in the critic's parameters."""
        if getattr(self.policy, "separate_critic", None) is not None:
            return lambda rows: self.policy.critic_values(inputs.select(torch.tensor(rows)))
        states: dict[int, Tensor] = {}
        costs = inputs.costs()
        with torch.no_grad():
            for micro_batch in config.micro_batches(costs[local_rows]):
                rows = local_rows[micro_batch]
                states |= dict(zip(rows.tolist(), self.policy.critic_states(inputs.select(rows)), strict=True))

        def values(rows: list[int]) -> list[Tensor]:
            flat = self.policy.values_from_states(torch.cat([states[row] for row in rows]))
            return list(flat.split([len(states[row]) for row in rows]))

        return values
