"""K epochs of minibatch gradient steps: how PPO reuses a batch (Schulman et al. 2017, Algorithm 1)."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from torch.optim import Optimizer

from rlhf_ppo.batch import TrainBatch
from rlhf_ppo.kernels.head_walk import Slopes
from rlhf_ppo.kernels.memory import pages_kept
from rlhf_ppo.models.scoring import TokenPolicy
from rlhf_ppo.updates.nonfinite import DryRunStep, NonFiniteUpdateError, broken_gradients
from rlhf_ppo.updates.objective import (
    CompareWith,
    Gradients,
    LossTerms,
    Objective,
    UpdateRecord,
    batch_statistics,
    count_actions,
    no_comparison,
)
from rlhf_ppo.updates.sharding import all_gather_batch, local_micro_batches
from rlhf_ppo.updates.shuffle import UpdateState
from rlhf_ppo.updates.steps import AccelerateSteps, make_optimizer_steps
from rlhf_ppo.updates.token_loss_gradients import slopes_of


@dataclass(frozen=True, kw_only=True)
class MinibatchConfig:
    """How a batch is cut and how often it is passed over. Sizes are rows of one process."""

    epochs: int = 4
    """K: passes over the batch."""
    minibatch_size: int = 128
    """Rows of one optimizer step."""
    micro_batch_size: int | None = None
    """Most rows of one forward and backward pass. Never changes a result, only memory."""
    token_budget: int | None = None
    """Most padded tokens of one forward and backward pass. Never changes a result, only memory."""
    max_grad_norm: float | None = None
    """Gradients are scaled down to this norm."""
    ratio_threshold: float = 10.0
    """A minibatch whose mean probability ratio exceeds this is dropped: the optimizer does not move."""
    target_kl: float | None = None
    """Stop after an epoch whose last minibatch has mean(log π_old - log π_θ) above 1.5 times this, nats."""
    most_skips_in_a_row: int = 5
    """Raise after this many minibatches in a row whose loss or gradient was not finite."""


class MinibatchUpdate(UpdateState):
    """Minimize an objective over shuffled minibatches.

    An optimizer step depends neither on its cut into micro-batches nor on the number of processes: minibatches are
    drawn from the rows of all processes, and each micro-batch divides its sums by the action count of the whole step.

    Args:
        policy: The prepared module that scores a batch: `policy(inputs, with_entropy=...) -> PolicyOutput`.
        optimizer: The prepared optimizer of its parameters.
        accelerator: Processes, precision, gradient synchronization.
        objective: What is minimized.
        config: Gives the sizes and guards; asked at each call, so that a user may change them between steps.
        seed: Of the shuffles. The same on all processes.
        with_entropy: Whether the objective reads the entropy.
        gradients: Another way to the gradients of an optimizer step; None: passes over micro-batches with autograd.
        compare_with: Further arguments of the policy for a micro_batch: whom to measure an exact KL to.
        count: What an optimizer step's sums are divided by, from the mask of its rows.
    """

    def __init__(
        self,
        *,
        policy: nn.Module,
        optimizer: Optimizer,
        accelerator: Accelerator,
        objective: Objective,
        config: Callable[[], MinibatchConfig],
        seed: int,
        with_entropy: bool = True,
        gradients: Gradients | None = None,
        compare_with: CompareWith = no_comparison,
        count: Callable[[Tensor], Tensor] = count_actions,
    ) -> None:
        super().__init__(seed)
        self.policy = policy
        self.steps = make_optimizer_steps(policy, optimizer, accelerator)
        self.accelerator = accelerator
        self.objective = objective
        self._read_config = config
        self.config = config()
        self.with_entropy = with_entropy
        self.gradients = gradients or self._passes
        self.compare_with = compare_with
        self.count = count

    def __call__(self, batch: TrainBatch) -> UpdateRecord:
        """Run the epochs; π_old ← π_θ is left to the caller, who collects the next rollout."""
        self.config = self._read_config()
        record = UpdateRecord()
        batch = all_gather_batch(batch, self.accelerator)
        with pages_kept():
            self._epochs(batch, record)
        if self.accelerator.num_processes > 1:
            record.ratios = gather_object([ratio.cpu() for ratio in record.ratios])
        return record

    def _epochs(self, batch: TrainBatch, record: UpdateRecord) -> None:
        for _ in range(self.config.epochs):
            for rows in self._shuffled(len(batch), batch.mask.device):
                self._step(batch, rows, record)
            if self._moved_too_far(record):
                record.stopped_early = True
                break

    def _shuffled(self, rows: int, device: torch.device) -> list[Tensor]:
        return list(self.shuffle(rows, device).split(self.config.minibatch_size * self.accelerator.num_processes))

    def examine(self, batch: TrainBatch, rows: Tensor) -> DryRunStep:
        """Compute the optimizer step on `rows` as an update would, and do not take it."""
        metrics, _ = self._gradient(batch, rows)
        found = DryRunStep(metrics, broken_gradients(self.policy))
        self.steps.drop()
        return found

    def _gradient(self, batch: TrainBatch, rows: Tensor) -> tuple[dict[str, float], list[Tensor]]:
        metrics, ratios = self.gradients(self.objective, batch, rows)
        metrics["policy/grad_norm"] = self.steps.clip(self.config.max_grad_norm)
        return metrics, ratios

    def _step(self, batch: TrainBatch, rows: Tensor, record: UpdateRecord) -> None:
        metrics, ratios = self._gradient(batch, rows)
        if self._accept(batch, rows, metrics):
            metrics["policy/grad_norm"] = self.steps.apply()
            record.skipped += math.isinf(metrics["policy/grad_norm"])
        else:
            self.steps.drop()
            record.skipped += 1
            for name in ("loss/policy", "loss/value", "loss/total"):
                metrics[name] = 0.0
        record.metrics.append(metrics | batch_statistics(batch, rows))
        record.ratios.extend(ratios)
        record.advantages.append(batch.advantages[rows][batch.mask[rows]])

    def _passes(self, objective: Objective, batch: TrainBatch, rows: Tensor) -> tuple[dict[str, float], list[Tensor]]:
        micro_batches = local_micro_batches(
            batch, rows, size=self.config.micro_batch_size, token_budget=self.config.token_budget,
            process=self.accelerator.process_index, processes=self.accelerator.num_processes,
        )  # fmt: skip
        count = self.count(batch.mask[rows]).float()
        last = len(micro_batches) - 1
        terms = [
            self._backward(objective, micro_batch, count, last=index == last)
            for index, micro_batch in enumerate(micro_batches)
        ]
        return self._reduced(terms), [term.ratio for term in terms]

    def _backward(self, objective: Objective, micro_batch: TrainBatch, count: Tensor, *, last: bool) -> LossTerms:
        processes = self.accelerator.num_processes
        with self.steps.micro_batch(last=last):
            others = self.compare_with(micro_batch) or self._foreseen(objective, micro_batch, count)
            output = self.policy(micro_batch.inputs, with_entropy=self.with_entropy, **others)
            terms = objective(output, micro_batch, count)
            # Gradients are averaged over processes; shares of a global count must be summed, hence the factor.
            loss = terms.loss * processes
            if processes > 1:  # DDP waits for a gradient of the value head even where no critic is trained
                loss = loss + 0.0 * output.values.sum()
            self.steps.backward(loss)
        return terms

    def _foreseen(self, objective: Objective, micro_batch: TrainBatch, count: Tensor) -> dict[str, Slopes]:
        """What lets a language model's head take its gradients in the forward pass, where its weight is whole."""
        whole = isinstance(self.steps, AccelerateSteps) and self.accelerator.distributed_type != DistributedType.FSDP
        by_token = self.count is count_actions  # another count is no divisor of single tokens
        if whole and by_token and isinstance(self.accelerator.unwrap_model(self.policy), TokenPolicy):
            return {"slopes": slopes_of(objective, micro_batch, count)}
        return {}

    def _accept(self, batch: TrainBatch, rows: Tensor, metrics: dict[str, float]) -> bool:
        broken = not math.isfinite(metrics["loss/total"])
        broken |= self.steps.norm_is_known and not math.isfinite(metrics["policy/grad_norm"])
        self.skips_in_a_row = self.skips_in_a_row + 1 if broken else 0
        if broken and self.skips_in_a_row >= self.config.most_skips_in_a_row:
            self.steps.drop()
            raise NonFiniteUpdateError(
                f"expected finite losses and gradients, got loss {metrics['loss/total']} and gradient norm "
                f"{metrics['policy/grad_norm']} in {self.skips_in_a_row} minibatches in a row: nothing was learned "
                "from them, the parameters are those of the last good one. Lower the learning rate, set "
                "`max_grad_norm`, or look for extreme scores.",
                batch=batch, rows=rows, metrics=metrics,
            )  # fmt: skip
        if broken:
            warnings.warn(
                f"Skipped a minibatch whose loss ({metrics['loss/total']}) or gradient norm "
                f"({metrics['policy/grad_norm']}) is not finite; the optimizer did not move.",
                stacklevel=4,
            )
            return False
        if metrics["policy/ratio_mean"] > self.config.ratio_threshold:
            warnings.warn(
                f"The average ratio of batch ({metrics['policy/ratio_mean']:.2f}) exceeds threshold "
                f"{self.config.ratio_threshold:.2f}. Skipping batch; the optimizer did not move.",
                stacklevel=4,
            )
            return False
        return True

    def _moved_too_far(self, record: UpdateRecord) -> bool:
        if self.config.target_kl is None or not record.metrics:
            return False
        return record.metrics[-1]["policy/policykl"] > 1.5 * self.config.target_kl

    def _reduced(self, terms: list[LossTerms]) -> dict[str, float]:
        names = list(terms[0].metrics)
        totals = torch.stack([torch.stack([term.metrics[name].float() for term in terms]).sum() for name in names])
        return dict(zip(names, self._sum(totals).tolist(), strict=True))

    def _sum(self, tensor: Tensor) -> Tensor:
        reduced: Tensor = self.accelerator.reduce(tensor, reduction="sum")
        return reduced
