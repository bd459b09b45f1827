"""What an objective will send back for each token, known before the whole loss is."""

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_ppo.batch import PolicyOutput, TokenInputs, TrainBatch
from rlhf_ppo.kernels.head_walk import Slopes
from rlhf_ppo.updates.objective import Objective


def slopes_of(objective: Objective, batch: TrainBatch, count: Tensor) -> Slopes:
    """The derivatives of `objective` at some tokens of `batch`, taken as if those tokens were all there are.

    Whether they depend on the entropy is tried once, with one that is not a number.

    Right for every objective that is a sum over tokens divided by `count`; for another the fused head notices.

    Args:
        objective: What is minimized.
        batch: A micro-batch; its inputs are `TokenInputs`.
        count: Of actions in the whole optimizer step.
    """
    inputs = batch.inputs
    assert isinstance(inputs, TokenInputs)
    lengths = inputs.response_lengths().to(batch.mask.device)
    real = torch.arange(batch.mask.shape[1], device=lengths.device) < lengths[:, None]
    columns = {item.name: getattr(batch, item.name) for item in fields(batch)}
    row: dict[str, Any] = {name: value[real] for name, value in columns.items() if isinstance(value, Tensor)}

    def loss_at(logprobs: Tensor, entropy: Tensor | None, part: TrainBatch) -> Tensor:
        output = PolicyOutput(
            logprobs=logprobs[None],
            values=torch.cat([part.values, part.values.new_zeros(1, 1)], dim=1),
            entropy=None if entropy is None else entropy[None],
        )
        return objective(output, part, count).loss

    def slopes(logprobs: Tensor, entropy: Tensor | None, tokens: slice) -> tuple[Tensor, Tensor | None]:
        part = replace(batch, **{name: value[tokens][None] for name, value in row.items()})
        leaves = [leaf.detach().requires_grad_() for leaf in (logprobs, entropy) if leaf is not None]
        with torch.enable_grad():
            loss = loss_at(leaves[0], leaves[1] if len(leaves) > 1 else None, part)
        found = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else (None,) * len(leaves)
        first, *others = (torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True))
        return first, others[0] if others else None

    with torch.no_grad():
        everywhere = replace(batch, **{name: value[None] for name, value in row.items()})
        # Whatever reads this entropy, in a graph or beside it, is not a number either.
        loss = loss_at(row["logprobs"], torch.full_like(row["logprobs"], torch.nan), everywhere)
    return Slopes(slopes, read_entropy=bool(loss.isnan()))
