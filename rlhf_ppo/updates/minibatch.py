"""K epochs of minibatch gradient steps on one batch (PPO; Schulman et al. 2017, Algorithm 1)."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from jaxtyping import Int
from torch import Tensor, nn
from torch.optim import Optimizer

from rlhf_ppo.batch import TrainBatch, split_into_micro_batches
from rlhf_ppo.kernels.linear_logprobs import LossGradient
from rlhf_ppo.kernels.memory import reuse_memory
from rlhf_ppo.models.scoring import TokenPolicy
from rlhf_ppo.updates.nonfinite import DryRunStep, NonFiniteUpdateError, nonfinite_gradients
from rlhf_ppo.updates.objective import (
    CompareWith,
    GradientFunction,
    LossTerms,
    Masked,
    Metrics,
    Objective,
    UpdateRecord,
    batch_statistics,
    count_actions,
    gather_ratios,
    no_comparison,
    read_scalars,
    select_actions,
    sum_metrics,
)
from rlhf_ppo.updates.optimizer_steps import AccelerateSteps, make_optimizer_steps
from rlhf_ppo.updates.sharding import all_gather_batch, local_micro_batches
from rlhf_ppo.updates.shuffle import UpdateState
from rlhf_ppo.updates.token_loss_gradients import reads_entropy, token_loss_gradients
from rlhf_ppo.utils.transfer import upload

OTHER_GRADIENT = "other gradient"
"""Counts the backward passes of a step in which another gradient arrived than the LM head had foreseen."""


@dataclass(frozen=True, kw_only=True)
class MinibatchConfig:
    """Epochs, minibatch and micro-batch sizes, and guards of an update. Sizes are rows per process."""

    epochs: int = 4
    """K: passes over the batch."""
    minibatch_size: int = 128
    """Rows per optimizer step."""
    micro_batch_size: int | None = None
    """Largest number of rows per forward and backward pass. Changes memory only, never a result."""
    token_budget: int | None = None
    """Largest number of padded tokens per forward and backward pass. Changes memory only, never a result."""
    max_grad_norm: float | None = None
    """Gradients are clipped to this global norm; None: not clipped."""
    ratio_threshold: float = 10.0
    """A minibatch whose mean probability ratio exceeds this is dropped: the optimizer takes no step."""
    target_kl: float | None = None
    """Stop after an epoch whose last minibatch has mean(log π_old - log π_θ) above 1.5 times this, nats."""
    most_skips_in_a_row: int = 5
    """Raise after this many minibatches in a row whose loss or gradient was not finite."""

    def micro_batches(self, costs: Int[Tensor, " rows"]) -> list[Int[Tensor, " micro_batch"]]:
        """Positions of the rows of each forward pass; see `split_into_micro_batches`."""
        return split_into_micro_batches(costs, size=self.micro_batch_size, token_budget=self.token_budget)

    def local_micro_batches(self, batch: TrainBatch, rows: Tensor, accelerator: Accelerator) -> list[TrainBatch]:
        """This process's micro-batches of an optimizer step on `rows`; see `sharding.local_micro_batches`."""
        return local_micro_batches(
            batch, rows, self.micro_batches, process=accelerator.process_index, processes=accelerator.num_processes
        )


class MinibatchUpdate(UpdateState):
    """Minimize an objective over shuffled minibatches.

    An optimizer step depends neither on the micro-batch size nor on the number of processes: minibatches are sampled
    from the rows of all processes, and each micro-batch divides its sums by the action count of the whole step.

    Args:
        policy: The prepared module that scores a batch: `policy(inputs, with_entropy=True) -> PolicyOutput`.
        accelerator: Processes, precision, gradient synchronization.
        config: Returns sizes and guards; called at each update, so that they can change between steps.
        seed: Seeds the row order; the same on all processes.
        compute_gradients: Replaces the passes over micro-batches with autograd; None: autograd.
        compare_with: Returns further arguments of the policy for a micro-batch: the policy to measure an exact KL to.
        count: Divisor of an optimizer step's sums, from the mask of its rows.
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
        compute_gradients: GradientFunction | None = None,
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
        self.compute_gradients = compute_gradients or self._autograd_gradients
        self.compare_with = compare_with
        self.count = count
        unsharded = isinstance(self.steps, AccelerateSteps) and accelerator.distributed_type != DistributedType.FSDP
        per_token = count is count_actions  # another count does not divide single tokens
        self._fuses_head = unsharded and per_token and isinstance(accelerator.unwrap_model(policy), TokenPolicy)
        self.checks_at_once = False
        """Whether each backward pass compares the gradient that arrives with the one it foresaw, and waits for that."""
        self._ratios: list[Masked] = []
        self._rows: list[Tensor] = []
        self._acts = torch.empty(0, dtype=torch.bool)  # of each row, whether it has an action
        self._differs: list[Tensor] | None = None
        self._reads_entropy: bool | None = None

    def __call__(self, batch: TrainBatch) -> UpdateRecord:
        """Run the epochs. π_old ← π_θ happens when the caller collects the next rollout."""
        self.config = self._read_config()
        record = UpdateRecord()
        batch = all_gather_batch(batch, self.accelerator)
        self._ratios, self._rows, self._reads_entropy = [], [], None
        self._acts = batch.mask.any(dim=1).cpu()
        self.steps.begin()
        with reuse_memory():
            self._epochs(batch, record)
        if self._rows:
            rows = upload(torch.cat(self._rows), batch.mask.device)
            record.ratios = [select_actions(self._ratios)]
            record.advantages.append(select_actions([(batch.advantages[rows], batch.mask[rows])]))
        self._ratios = []
        record.ratios = gather_ratios(record.ratios, self.accelerator)
        return record

    def _epochs(self, batch: TrainBatch, record: UpdateRecord) -> None:
        for _ in range(self.config.epochs):
            for rows in self._minibatches(len(batch)):
                self._step(batch, rows, record)
            if self._exceeds_target_kl(record):
                record.stopped_early = True
                break

    def _minibatches(self, rows: int) -> list[Tensor]:
        order = self.shuffle(rows, torch.device("cpu"))  # on the host, which cuts it
        return list(order.split(self.config.minibatch_size * self.accelerator.num_processes))

    def dry_run(self, batch: TrainBatch, rows: Tensor) -> DryRunStep:
        """Compute the loss and gradients of an optimizer step on `rows`, without taking the step."""
        metrics, _ = self._gradient(batch, rows.cpu())
        dry_run = DryRunStep(metrics, nonfinite_gradients(self.policy))
        self.steps.drop()
        return dry_run

    def _gradient(self, batch: TrainBatch, rows: Tensor) -> tuple[dict[str, float], list[Masked]]:
        """Gradients of the rows, clipped; the metrics in the only transfer of a step that the host waits for."""
        metrics, ratios = self.compute_gradients(self.objective, batch, rows)
        metrics["policy/grad_norm"] = self.steps.clip(self.config.max_grad_norm)
        metrics |= batch_statistics(batch, upload(rows, batch.mask.device))
        numbers = read_scalars(metrics)
        if numbers.pop(OTHER_GRADIENT, 0.0) > 0:  # the loss is no sum over tokens
            self.steps.drop()
            self.checks_at_once = True
            return self._gradient(batch, rows)
        return numbers, ratios

    def _step(self, batch: TrainBatch, rows: Tensor, record: UpdateRecord) -> None:
        if not self._acts[rows].any():
            return  # no action, so no loss: momentum alone would move the parameters
        metrics, ratios = self._gradient(batch, rows)
        if self._accept(batch, rows, metrics):
            norm = self.steps.apply()
            if not self.steps.norm_is_known:
                metrics["policy/grad_norm"] = norm
                record.skipped += math.isinf(norm)
        else:
            self.steps.drop()
            record.skipped += 1
            for name in ("loss/policy", "loss/value", "loss/total"):
                metrics[name] = 0.0
        record.metrics.append(metrics)
        self._ratios.extend(ratios)
        self._rows.append(rows)

    def _autograd_gradients(
        self, objective: Objective, batch: TrainBatch, rows: Tensor
    ) -> tuple[Metrics, list[Masked]]:
        micro_batches = self.config.local_micro_batches(batch, rows, self.accelerator)
        count = self.count(batch.mask[upload(rows, batch.mask.device)]).float()
        last = len(micro_batches) - 1
        self._differs = None if self.checks_at_once or batch.mask.device.type == "cpu" else []
        terms = [
            self._backward(objective, micro_batch, count, last=index == last)
            for index, micro_batch in enumerate(micro_batches)
        ]
        metrics = sum_metrics(terms, self.accelerator)
        if self._differs:
            metrics[OTHER_GRADIENT] = self.accelerator.reduce(torch.stack(self._differs).sum(), reduction="sum")
        pairs = zip(terms, micro_batches, strict=True)
        return metrics, [(term.ratio, micro_batch.mask) for term, micro_batch in pairs]

    def _backward(self, objective: Objective, micro_batch: TrainBatch, count: Tensor, *, last: bool) -> LossTerms:
        processes = self.accelerator.num_processes
        with self.steps.micro_batch(last=last):
            extra = self.compare_with(micro_batch) or self._fused_head_argument(objective, micro_batch, count)
            output = self.policy(micro_batch.inputs, with_entropy=True, **extra)
            terms = objective(output, micro_batch, count)
            # Gradients are averaged over processes; sums divided by a global count must be added up, hence the factor.
            loss = terms.loss * processes
            if processes > 1:  # DDP waits for a gradient of the value head even without a critic
                loss = loss + 0.0 * output.values.sum()
            self.steps.backward(loss)
        return terms

    def _fused_head_argument(
        self, objective: Objective, micro_batch: TrainBatch, count: Tensor
    ) -> dict[str, LossGradient]:
        """The policy argument that lets an unsharded LM head compute its gradients in the forward pass, or {}."""
        if self._fuses_head:
            if self._reads_entropy is None:
                self._reads_entropy = reads_entropy(objective, micro_batch, count)
            read, differs = self._reads_entropy, self._differs
            return {"loss_gradient": token_loss_gradients(objective, micro_batch, count, read, differs)}
        return {}

    def _accept(self, batch: TrainBatch, rows: Tensor, metrics: dict[str, float]) -> bool:
        broken = not math.isfinite(metrics["loss/total"])
        broken |= self.steps.norm_is_known and not math.isfinite(metrics["policy/grad_norm"])
        if broken and self.steps.can_overflow():
            return False  # a part of float16's search for its scale, no fault of the batch
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

    def _exceeds_target_kl(self, record: UpdateRecord) -> bool:
        if self.config.target_kl is None or not record.metrics:
            return False
        return record.metrics[-1]["policy/policykl"] > 1.5 * self.config.target_kl
