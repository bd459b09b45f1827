"""The natural-gradient update within a trust region (Schulman et al. 2015), for policies up to about 100 M parameters.

One step on the whole batch: gradient of the surrogate, conjugate gradient on Fisher products, line search on the exact
mean KL(π_old || π_θ). The value head is fitted afterwards, on hidden states that no longer change: a value loss that
moved a shared trunk would move the policy too, and out of the trust region.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer

from rlhf_ppo.batch import TrainBatch
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
from rlhf_ppo.updates.critic import CriticFit
from rlhf_ppo.updates.minibatch import MinibatchConfig
from rlhf_ppo.updates.nonfinite import DryRunStep, NonFiniteUpdateError
from rlhf_ppo.updates.objective import (
    CompareWith,
    Gradients,
    LossTerms,
    Objective,
    UpdateRecord,
    batch_statistics,
    no_comparison,
)
from rlhf_ppo.updates.region import FisherPolicy, TrustRegion, check_parameters, check_processes
from rlhf_ppo.updates.sharding import all_gather_batch, local_micro_batches
from rlhf_ppo.updates.shuffle import UpdateState


class TrustRegionUpdate(UpdateState):
    """One natural-gradient step of the policy, then epochs of the value head alone.

    Works on one process or several with whole copies of the model. Where the line search accepts nothing, the policy's
    parameters are those from before, bit for bit. Peak memory beyond a PPO pass: a handful of vectors as long as the
    trainable parameters (LoRA keeps them short), the response tokens' hidden states, a copy of the LM head when it is
    trained, and the graph of one micro-batch of at most `policy.chunk_size` padded tokens, or one row.

    Args:
        policy: The prepared policy, a `FisherPolicy`.
        optimizer: The prepared optimizer; it steps the value head alone, with its learning rate.
        accelerator: Of both.
        objective: The surrogate, to minimize; without value term.
        region: The trust region.
        config: Sizes of passes; `epochs` and `minibatch_size` are those of the value head's fit.
        seed: Of the choice of curvature rows and of the shuffles. The same on all processes.
        clip_range_value: Of the value loss; None: the plain squared error.
        compare_with: Further arguments of the policy for a micro_batch: whom to measure an exact KL to.
        gradients: Another way to the gradients of the value head's fit; None: autograd.

    Raises:
        ValueError: Parameters are sharded, of low precision or all frozen; or attention has no second derivative.
    """

    def __init__(
        self,
        *,
        policy: nn.Module,
        optimizer: Optimizer,
        accelerator: Accelerator,
        objective: Objective,
        region: TrustRegion,
        config: Callable[[], MinibatchConfig],
        seed: int,
        clip_range_value: float | None = None,
        compare_with: CompareWith = no_comparison,
        gradients: Gradients | None = None,
    ) -> None:
        super().__init__(seed)
        check_processes(accelerator)
        module: Any = accelerator.unwrap_model(policy)
        critic = module.critic_parameters()
        theirs = {id(parameter) for parameter in critic}
        self.parameters = [item for item in module.parameters() if item.requires_grad and id(item) not in theirs]
        check_parameters(self.parameters)
        module.check_curvature()
        self.policy: FisherPolicy = module
        self.optimizer, self.accelerator = optimizer, accelerator
        self.objective, self.region = objective, region
        self._read_config = config
        self.config = config()
        self.compare_with = compare_with
        self.critic = CriticFit(
            policy=module, optimizer=optimizer, accelerator=accelerator, config=config, shuffle=self.shuffle,
            clip_range_value=clip_range_value, gradients=gradients,
        )  # fmt: skip

    def __call__(self, batch: TrainBatch) -> UpdateRecord:
        """One step of the policy, then the fit of the value head."""
        self.config = self._read_config()
        batch = all_gather_batch(batch, self.accelerator)
        everything = torch.arange(len(batch), device=batch.mask.device)
        micro_batches, count = self._micro_batches(batch, everything), batch.mask.sum().float()
        found, (gradient, terms) = None, self._gradient(micro_batches, count)
        if self._usable(norm := float(gradient.norm()), batch, everything):
            found, terms = self._search(batch, micro_batches, count, gradient, terms)
        record = UpdateRecord(skipped=int(found is None or not found.accepted))
        statistics = batch_statistics(batch, everything) | {"policy/grad_norm": norm}
        record.metrics.append(self._reduced(terms) | statistics)
        record.ratios.extend(term.ratio for term in terms)
        record.advantages.append(batch.advantages[batch.mask])
        record.extras = {
            "policy/accepted": float(found is not None and found.accepted),
            "policy/backtracks": float(0 if found is None else found.backtracks),
            "policy/reached_kl": 0.0 if found is None else found.kl,
            "policy/improvement": 0.0 if found is None else found.improvement,
        }
        self.critic(batch)
        if self.accelerator.num_processes > 1:
            record.ratios = gather_object([ratio.cpu() for ratio in record.ratios])
        return record

    def curvature(self, batch: TrainBatch, rows: Tensor) -> MatrixVectorProduct:
        """The map v -> (F + damping) v over `rows` of the batch, one micro-batch at a time; equal on all processes."""
        micro_batches = self._micro_batches(batch, rows, token_budget=self.policy.chunk_size)
        count = batch.mask[rows].sum().clamp(min=1)

        def of(micro_batch: TrainBatch) -> MatrixVectorProduct:
            outputs, metric = self.policy.curvature(micro_batch.inputs, step_weights(micro_batch.mask, count))
            return fisher_vector_product(outputs, self.parameters, metric=metric)

        with torch.enable_grad():
            kept = of(micro_batches[0]) if len(micro_batches) == 1 else None  # several graphs at once would not fit

        def product(vector: Tensor) -> Tensor:
            total = torch.zeros_like(vector)
            with torch.enable_grad():
                for micro_batch in micro_batches:
                    total += (kept or of(micro_batch))(vector)
            return self._sum(total) + self.region.damping * vector

        return product

    def _gradient(self, micro_batches: list[TrainBatch], count: Tensor) -> tuple[Tensor, list[LossTerms]]:
        """Of the objective that is minimized, over the whole batch, with its terms."""
        total, found = torch.zeros_like(flatten(self.parameters)), []
        for micro_batch in micro_batches:
            terms = self._terms(micro_batch, count)
            gradients = torch.autograd.grad(terms.loss, self.parameters, allow_unused=True)
            total += flatten(gradients, like=self.parameters)
            found.append(LossTerms(loss=terms.loss.detach(), metrics=terms.metrics, ratio=terms.ratio))
        return self._sum(total), found

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
        """The accepted step with the terms behind it; or the terms before it."""
        start = flatten(self.parameters).clone()
        share = math.ceil(self.region.curvature_fraction * len(batch))
        rows = self.shuffle(len(batch), batch.mask.device)[:share]
        product = self.curvature(batch, rows)
        direction = conjugate_gradient(product, -gradient, iterations=self.region.cg_iterations)
        # The damping steadies the direction; it is no part of the KL, and would shorten the step many times over.
        curved = product(direction) - self.region.damping * direction
        del product
        bend = float(direction.dot(curved))
        if not (math.isfinite(bend) and bend > 0):
            return None, before
        step = trust_region_step(direction, curved, self.region.max_kl)
        distances = self.policy.kl_from_current([micro_batch.inputs for micro_batch in micro_batches])
        loss_before, after, region = self._reduced(before)["loss/total"], before, self.region

        def evaluate(candidate: Tensor) -> tuple[float, float]:
            nonlocal after
            self._write(candidate)
            after = [self._terms(micro_batch, count) for micro_batch in micro_batches]
            parts = [
                masked_mean(kl(), micro_batch.mask, count)
                for kl, micro_batch in zip(distances, micro_batches, strict=True)
            ]
            return loss_before - self._reduced(after)["loss/total"], float(self._sum(torch.stack(parts).sum()))

        found = line_search(
            evaluate, start, step,
            max_kl=1.5 * region.max_kl, shrink=region.shrink, max_backtracks=region.max_backtracks,
        )  # fmt: skip
        self._write(found.parameters)
        return found, after if found.accepted else before

    def _write(self, vector: Tensor) -> None:
        for parameter, value in zip(self.parameters, unflatten(vector, self.parameters), strict=True):
            parameter.copy_(value)

    def examine(self, batch: TrainBatch, rows: Tensor) -> DryRunStep:
        """Compute the policy's gradient on `rows` as an update would, and do not step along it."""
        gradient, terms = self._gradient(self._micro_batches(batch, rows), batch.mask[rows].sum().float())
        module: Any = self.policy
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        parts = zip(self.parameters, unflatten(gradient, self.parameters), strict=True)
        broken = [names[id(parameter)] for parameter, part in parts if not part.isfinite().all()]
        return DryRunStep(self._reduced(terms) | {"policy/grad_norm": float(gradient.norm())}, broken)

    def _usable(self, norm: float, batch: TrainBatch, rows: Tensor) -> bool:
        """Whether the gradient leads anywhere; nan and inf are counted."""
        broken = not math.isfinite(norm)
        self.skips_in_a_row = self.skips_in_a_row + 1 if broken else 0
        if broken and self.skips_in_a_row >= self.config.most_skips_in_a_row:
            raise NonFiniteUpdateError(
                f"expected finite gradients, got norm {norm} in {self.skips_in_a_row} updates in a row: nothing was "
                "learned from them, the policy is that of the last good one. Look for extreme scores.",
                batch=batch, rows=rows, metrics={"loss/total": norm, "policy/grad_norm": norm},
            )  # fmt: skip
        if broken:
            warnings.warn(f"Skipped a step whose gradient norm is {norm}; the policy did not move.", stacklevel=4)
        return not broken and norm > 0

    def _micro_batches(self, batch: TrainBatch, rows: Tensor, *, token_budget: int | None = None) -> list[TrainBatch]:
        budgets = [budget for budget in (self.config.token_budget, token_budget) if budget is not None]
        return local_micro_batches(
            batch, rows, size=self.config.micro_batch_size, token_budget=min(budgets, default=None),
            process=self.accelerator.process_index, processes=self.accelerator.num_processes,
        )  # fmt: skip

    def _reduced(self, terms: list[LossTerms]) -> dict[str, float]:
        names = list(terms[0].metrics)
        totals = torch.stack([torch.stack([term.metrics[name].float() for term in terms]).sum() for name in names])
        return dict(zip(names, self._sum(totals).tolist(), strict=True))

    def _sum(self, tensor: Tensor) -> Tensor:
        reduced: Tensor = self.accelerator.reduce(tensor, reduction="sum")
        return reduced
