"""What a policy is like on a whole batch, without a step: how far it has moved, and what an objective says of it."""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from rlhf_ppo.batch import TrainBatch
from rlhf_ppo.functional import kl_estimate, masked_mean
from rlhf_ppo.updates.minibatch import MinibatchConfig
from rlhf_ppo.updates.objective import Objective, UpdateRecord, batch_statistics
from rlhf_ppo.updates.sharding import everyones, own_pieces


@torch.no_grad()
def standing_record(
    policy: nn.Module, batch: TrainBatch, objective: Objective, accelerator: Accelerator, config: MinibatchConfig
) -> UpdateRecord:
    """The record of an update that took no step on the policy; `batch` holds the rows of all processes."""
    rows = torch.arange(len(batch), device=batch.mask.device)
    count = batch.mask.sum().float()
    pieces = own_pieces(
        batch, rows, size=config.micro_batch_size, token_budget=config.token_budget,
        process=accelerator.process_index, processes=accelerator.num_processes,
    )  # fmt: skip
    terms = [objective(policy(piece.inputs, with_entropy=True), piece, count) for piece in pieces]
    totals = {name: torch.stack([term.metrics[name].float() for term in terms]).sum() for name in terms[0].metrics}
    record = UpdateRecord()
    record.metrics.append(
        {name: float(accelerator.reduce(total, reduction="sum")) for name, total in totals.items()}
        | batch_statistics(batch, rows)
    )
    record.ratios.extend(term.ratio for term in terms)
    if accelerator.num_processes > 1:
        record.ratios = gather_object([ratio.cpu() for ratio in record.ratios])
    record.advantages.append(batch.advantages[batch.mask])
    return record


@torch.no_grad()
def reached_kl(
    policy: nn.Module,
    batch: TrainBatch,
    accelerator: Accelerator,
    *,
    size: int | None = None,
    token_budget: int | None = None,
) -> float:
    """Mean KL(π_old || π_θ) per action, nats, from the actions that π_old drew: E[ρ - 1 - log ρ], which is unbiased.

    The statistics of an update do not know it: each was measured *before* its optimizer step, on one minibatch.

    Args:
        policy: The prepared policy, after the update.
        batch: This process's rows of the batch.
        accelerator: Of the policy.
        size: Most rows of one pass.
        token_budget: Most padded tokens of one pass.
    """
    batch = everyones(batch, accelerator)
    pieces = own_pieces(
        batch, torch.arange(len(batch)), size=size, token_budget=token_budget,
        process=accelerator.process_index, processes=accelerator.num_processes,
    )  # fmt: skip
    count = batch.mask.sum().float()
    total = torch.zeros((), device=batch.mask.device)
    for piece in pieces:
        drawn_by_old = kl_estimate(piece.logprobs, policy(piece.inputs).logprobs, "k3", mask=piece.mask)
        # k3 of KL(p || q) wants actions of p: exp(-k1) - 1 + k1 with k1 = log π_old - log π_θ.
        total += masked_mean(drawn_by_old, piece.mask, count)
    return float(accelerator.reduce(total, reduction="sum"))
