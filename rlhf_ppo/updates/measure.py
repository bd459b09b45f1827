"""How far an update has moved the policy, over the whole batch and after its last step."""

import torch
from accelerate import Accelerator
from torch import nn

from rlhf_ppo.batch import TrainBatch
from rlhf_ppo.functional import kl_estimate, masked_mean
from rlhf_ppo.updates.shares import everyones, own_pieces


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

    The statistics of an update do not know it: each was measured *before* its optimiser step, on one minibatch.

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
