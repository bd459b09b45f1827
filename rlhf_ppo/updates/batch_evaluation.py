"""Evaluate a policy on a whole batch without an optimizer step: metrics of an objective, KL after an update."""

import torch
from accelerate import Accelerator
from torch import nn

from rlhf_ppo.batch import TrainBatch
from rlhf_ppo.functional import kl_estimate, masked_mean
from rlhf_ppo.updates.minibatch import MinibatchConfig
from rlhf_ppo.updates.objective import CompareWith, Objective, UpdateRecord, no_comparison
from rlhf_ppo.updates.sharding import all_gather_batch


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
    count, parts = batch.mask.sum().float(), config.local_micro_batches(batch, torch.arange(len(batch)), accelerator)
    terms = [objective(policy(part.inputs, with_entropy=True, **compare_with(part)), part, count) for part in parts]
    return UpdateRecord.of_batch(batch, terms, parts, accelerator)


@torch.no_grad()
def kl_after_update(policy: nn.Module, batch: TrainBatch, accelerator: Accelerator, config: MinibatchConfig) -> float:
    """Mean KL(π_old || π_θ) per action, nats, estimated without bias from actions sampled by π_old: E[ρ - 1 - log ρ].

    An update's own metrics do not contain it: each is measured *before* its optimizer step, on one minibatch.

    Args:
        policy: The prepared policy, after the update.
        batch: This process's rows of the batch.
    """
    batch = all_gather_batch(batch, accelerator)
    count, total = batch.mask.sum().float(), torch.zeros((), device=batch.mask.device)
    for micro_batch in config.local_micro_batches(batch, torch.arange(len(batch)), accelerator):
        # k3 of KL(p || q) needs actions sampled from p: exp(-k1) - 1 + k1 with k1 = log π_old - log π_θ.
        kl = kl_estimate(micro_batch.logprobs, policy(micro_batch.inputs).logprobs, "k3", mask=micro_batch.mask)
        total += masked_mean(kl, micro_batch.mask, count)
    return float(accelerator.reduce(total, reduction="sum"))
