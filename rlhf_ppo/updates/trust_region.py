"""TRPO's natural-gradient update (Schulman et al. 2015), for policies up to about 100 M parameters.

One step on the whole batch: gradient of the surrogate, conjugate gradient on Fisher products, line search on the exact
mean KL(π_old || π_θ). The value head is fitted afterwards, on fixed hidden states: a value loss that changed a shared
trunk would move the policy out of the trust region.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from rlhf_ppo.batch import TrainBatch
from rlhf_ppo.distributed.collectives import Processes
from rlhf_ppo.functional import (
    LineSearchResult,
    conjugate_gradient,
    fisher_vector_product,
    flatten,
    line_search,
    masked_mean,
    step_weights,
    trust_region_step,
    unflatten,
)
from rlhf_ppo.functional.trust_region import MatrixVectorProduct
from rlhf_ppo.updates.critic_fit import CriticFit
from rlhf_ppo.updates.minibatch import MinibatchConfig
from rlhf_ppo.updates.nonfinite import DryRunStep, NonFiniteUpdateError
from rlhf_ppo.updates.objective import (
    CompareWith,
    GradientFunction,
    LossTerms,
    Objective,
    UpdateRecord,
    no_comparison,
    read_scalars,
    sum_metrics,
)
from rlhf_ppo.updates.sharding import all_gather_batch
from rlhf_ppo.updates.shuffle import UpdateState
from rlhf_ppo.updates.trust_region_config import FisherPolicy, TrustRegionConfig, check_parameters, check_processes


class TrustRegionUpdate(UpdateState):
    """One natural-gradient step of the policy, then epochs of the value head alone.

    Works on one process, or several with unsharded models. If the line search accepts no step, the policy's parameters
    stay the same, bit for bit. Peak memory beyond a PPO pass: a few vectors as long as the trainable parameters (short
    with LoRA), the response tokens' hidden states, a copy of the LM head if it is trained, and the graph of one
    micro-batch of at most `policy.chunk_size` padded tokens, or one row.

    Args:
        policy: The prepared policy, a `FisherPolicy`.
        optimizer: The prepared optimizer; it steps the value head alone, with its learning rate.
        objective: The surrogate, to minimize; without value term.
        config: Returns micro-batch limits, and `epochs` and `minibatch_size` of the value head's fit.
        seed: Seeds the choice of rows for the Fisher products and the row order; the same on all processes.
        clip_range_value: ε of the value loss; None: the plain squared error.
        compare_with: Returns further arguments of the policy for a micro-batch: the policy to measure an exact KL to.
        compute_gradients: Replaces autograd in the value head's fit; None: autograd.

    Raises:
        ValueError: Parameters are sharded, in low precision or all frozen; or attention has no second derivative.
    """

    def __init__(
        self,
        *,
        policy: nn.Module,
        optimizer: Optimizer,
        accelerator: Accelerator,
        objective: Objective,
        region: TrustRegionConfig,
        config: Callable[[], MinibatchConfig],
        seed: int,
        clip_range_value: float | None = None,
        compare_with: CompareWith = no_comparison,
        compute_gradients: GradientFunction | None = None,
    ) -> None:
        super().__init__(seed)
        check_processes(accelerator)
        module: Any = accelerator.unwrap_model(policy)
        critic = module.critic_parameters()
        critic_ids = {id(parameter) for parameter in critic}
        self.parameters = [item for item in module.parameters() if item.requires_grad and id(item) not in critic_ids]
        check_parameters(self.parameters)
        module.check_twice_differentiable()
        self.policy: FisherPolicy = module
        self.optimizer, self.accelerator = optimizer, accelerator
        self._sum = Processes(accelerator).reduce_sum
        self.objective, self.region = objective, region
        self._read_config = config
        self.config = config()
        self.compare_with = compare_with
        self.critic = CriticFit(
            policy=module, optimizer=optimizer, accelerator=accelerator, config=config, shuffle=self.shuffle,
            clip_range_value=clip_range_value, compute_gradients=compute_gradients,
        )  # fmt: skip

    def __call__(self, batch: TrainBatch) -> UpdateRecord:
        """One step of the policy, then the fit of the value head."""
        self.config = self._read_config()
        batch = all_gather_batch(batch, self.accelerator)
        rows = torch.arange(len(batch), device=batch.mask.device)
        micro_batches, count = self._micro_batches(batch, rows), batch.mask.sum().float()
        result, (gradient, terms) = None, self._gradient(micro_batches, count)
        if self._is_usable(norm := float(gradient.norm()), batch, rows):
            result, terms = self._search(batch, micro_batches, count, gradient, terms)
        record = UpdateRecord.of_batch(batch, terms, micro_batches, self.accelerator, **{"policy/grad_norm": norm})
        record.skipped = int(result is None or not result.accepted)
        record.extras = {
            "policy/accepted": float(result is not None and result.accepted),
            "policy/backtracks": float(0 if result is None else result.backtracks),
            "policy/reached_kl": 0.0 if result is None else result.kl,
            "policy/improvement": 0.0 if result is None else result.improvement,
        }
        self.critic(batch)
        return record

    def fisher_product(self, batch: TrainBatch, rows: Tensor) -> MatrixVectorProduct:
        """The map v -> (F + damping) v over `rows` of the batch, one micro-batch at a time; equal on all processes."""
        micro_batches = self._micro_batches(batch, rows, token_budget=self.policy.chunk_size)
        count = batch.mask[rows].sum().clamp(min=1)

        def micro_batch_product(micro_batch: TrainBatch) -> MatrixVectorProduct:
            outputs, metric = self.policy.outputs_and_metric(micro_batch.inputs, step_weights(micro_batch.mask, count))
            return fisher_vector_product(outputs, self.parameters, metric=metric)

        with torch.enable_grad():
            # The graph is kept only if it is the only one: several would not fit into memory.
            cached = micro_batch_product(micro_batches[0]) if len(micro_batches) == 1 else None

        def product(vector: Tensor) -> Tensor:
            total = torch.zeros_like(vector)
            with torch.enable_grad():
                for micro_batch in micro_batches:
                    total += (cached or micro_batch_product(micro_batch))(vector)
            return self._sum(total) + self.region.damping * vector

        return product

    def _gradient(self, micro_batches: list[TrainBatch], count: Tensor) -> tuple[Tensor, list[LossTerms]]:
        """Flat gradient of the objective over all micro-batches, summed over processes, and its loss terms."""
        total, all_terms = torch.zeros_like(flatten(self.parameters)), []
        for micro_batch in micro_batches:
            terms = self._terms(micro_batch, count)
            gradients = torch.autograd.grad(terms.loss, self.parameters, allow_unused=True)
            total += flatten(gradients, like=self.parameters)
            all_terms.append(LossTerms(loss=terms.loss.detach(), metrics=terms.metrics, ratio=terms.ratio))
        return self._sum(total), all_terms

    def _terms(self, micro_batch: TrainBatch, count: Tensor) -> LossTerms:
        return self.objective(
            self.policy(micro_batch.inputs, with_entropy=True, **self.compare_with(micro_batch)), micro_batch, count
        )

    @torch.no_grad()
    def _search(
        self,
        batch: TrainBatch,
        micro_batches: list[TrainBatch],
        count: Tensor,
        gradient: Tensor,
        before: list[LossTerms],
    ) -> tuple[LineSearchResult | None, list[LossTerms]]:
        """Line search along the natural gradient; returns its result, and the loss terms after the accepted step."""
        start = flatten(self.parameters).clone()
        n_rows = math.ceil(self.region.curvature_fraction * len(batch))
        rows = self.shuffle(len(batch), batch.mask.device)[:n_rows]
        product = self.fisher_product(batch, rows)
        direction = conjugate_gradient(product, -gradient, iterations=self.region.cg_iterations)
        # Damping stabilizes the direction; it is not part of the KL, and would make the step many times too short.
        fisher_direction = product(direction) - self.region.damping * direction
        del product
        curvature = float(direction.dot(fisher_direction))
        if not (math.isfinite(curvature) and curvature > 0):
            return None, before
        step = trust_region_step(direction, fisher_direction, self.region.max_kl)
        kl_functions = self.policy.kl_from_current([micro_batch.inputs for micro_batch in micro_batches])
        loss_before, after, region = self._loss(before), before, self.region

        def evaluate(candidate: Tensor) -> tuple[float, float]:
            nonlocal after
            self._write(candidate)
            after = [self._terms(micro_batch, count) for micro_batch in micro_batches]
            kls = [
                masked_mean(kl(), micro_batch.mask, count)
                for kl, micro_batch in zip(kl_functions, micro_batches, strict=True)
            ]
            return loss_before - self._loss(after), float(self._sum(torch.stack(kls).sum()))

        result = line_search(
            evaluate, start, step,
            max_kl=1.5 * region.max_kl, shrink=region.shrink, max_backtracks=region.max_backtracks,
        )  # fmt: skip
        self._write(result.parameters)
        return result, after if result.accepted else before

    def _loss(self, terms: list[LossTerms]) -> float:
        return float(sum_metrics(terms, self.accelerator)["loss/total"])

    def _write(self, vector: Tensor) -> None:
        for parameter, value in zip(self.parameters, unflatten(vector, self.parameters), strict=True):
            parameter.copy_(value)

    def dry_run(self, batch: TrainBatch, rows: Tensor) -> DryRunStep:
        """Compute the policy's loss and gradient on `rows`, without taking a step."""
        gradient, terms = self._gradient(self._micro_batches(batch, rows), batch.mask[rows].sum().float())
        module: Any = self.policy
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        gradients = zip(self.parameters, unflatten(gradient, self.parameters), strict=True)
        nonfinite = [names[id(parameter)] for parameter, value in gradients if not value.isfinite().all()]
        metrics = read_scalars(sum_metrics(terms, self.accelerator) | {"policy/grad_norm": gradient.norm()})
        return DryRunStep(metrics, nonfinite)

    def _is_usable(self, norm: float, batch: TrainBatch, rows: Tensor) -> bool:
        """Whether the gradient norm is finite and positive; counts non-finite norms in a row."""
        broken = not math.isfinite(norm)
        self.skips_in_a_row = self.skips_in_a_row + 1 if broken else 0
        if broken and self.skips_in_a_row >= self.config.most_skips_in_a_row:
            raise NonFiniteUpdateError(
                f"expected finite gradients, got norm {norm} in {self.skips_in_a_row} updates in a row: nothing was "
                "learned from them, the policy is that of the last finite one. Look for extreme scores.",
                batch=batch, rows=rows, metrics={"loss/total": norm, "policy/grad_norm": norm},
            )  # fmt: skip
        if broken:
            warnings.warn(f"Skipped a step whose gradient norm is {norm}; the policy did not move.", stacklevel=4)
        return not broken and norm > 0

    def _micro_batches(self, batch: TrainBatch, rows: Tensor, *, token_budget: int | None = None) -> list[TrainBatch]:
        budgets = [budget for budget in (self.config.token_budget, token_budget) if budget is not None]
        config = replace(self.config, token_budget=min(budgets, default=None))
        return config.local_micro_batches(batch, rows, self.accelerator)
