"""Evaluate a policy on a whole batch without an optimizer step: metrics of an objective, KL after an update."""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from rlhf_ppo.batch import TrainBatch
from rlhf_ppo.functional import kl_estimate, masked_mean
from rlhf_ppo.updates.minibatch import MinibatchConfig
from rlhf_ppo.updates.objective import (
    CompareWith,
    Objective,
    UpdateRecord,
    batch_statistics,
    no_comparison,
    read_scalars,
    select_actions,
    sum_metrics,
)
from rlhf_ppo.updates.sharding import all_gather_batch, local_micro_batches


@torch.no_grad()
def record_without_step(
    policy: nn.Module,
    batch: TrainBatch,
    objective: Objective,
    accelerator: Accelerator,
    config: MinibatchConfig,
    compare_with: CompareWith = no_comparison,
) -> UpdateRecord:
    """Evaluate `objective` on `batch`, the rows of all processes, and return it as the record of an update."""
    rows = torch.arange(len(batch), device=batch.mask.device)
    count = batch.mask.sum().float()
    micro_batches = local_micro_batches(
        batch, rows, size=config.micro_batch_size, token_budget=config.token_budget,
        process=accelerator.process_index, processes=accelerator.num_processes,
    )  # fmt: skip
    terms = [
        objective(policy(micro_batch.inputs, with_entropy=True, **compare_with(micro_batch)), micro_batch, count)
        for micro_batch in micro_batches
    ]
    totals = sum_metrics(terms, accelerator)
    record = UpdateRecord()
    record.metrics.append(read_scalars(totals | batch_statistics(batch, rows)))
    pairs = zip(terms, micro_batches, strict=True)
    record.ratios.append(select_actions([(term.ratio, micro_batch.mask) for term, micro_batch in pairs]))
    if accelerator.num_processes > 1:
        record.ratios = gather_object([ratio.cpu() for ratio in record.ratios])
    record.advantages.append(batch.advantages[batch.mask])
    return record


@torch.no_grad()
def kl_after_update(
    policy: nn.Module,
    batch: TrainBatch,
    accelerator: Accelerator,
    *,
    size: int | None = None,
    token_budget: int | None = None,
) -> float:
    """Mean KL(π_old || π_θ) per action, nats, estimated without bias from actions sampled by π_old: E[ρ - 1 - log ρ].

    An update's own metrics do not contain it: each is measured *before* its optimizer step, on one minibatch.

    Args:
        policy: The prepared policy, after the update.
        batch: This process's rows of the batch.
        accelerator: The accelerator that prepared it.
        size: Largest number of rows per pass.
        token_budget: Largest number of padded tokens per pass.
    """
    batch = all_gather_batch(batch, accelerator)
    micro_batches = local_micro_batches(
        batch, torch.arange(len(batch)), size=size, token_budget=token_budget,
        process=accelerator.process_index, processes=accelerator.num_processes,
    )  # fmt: skip
    count = batch.mask.sum().float()
    total = torch.zeros((), device=batch.mask.device)
    for micro_batch in micro_batches:
        # k3 of KL(p || q) needs actions sampled from p: exp(-k1) - 1 + k1 with k1 = log π_old - log π_θ.
        kl = kl_estimate(micro_batch.logprobs, policy(micro_batch.inputs).logprobs, "k3", mask=micro_batch.mask)
        total += masked_mean(kl, micro_batch.mask, count)
    return float(accelerator.reduce(total, reduction="sum"))
