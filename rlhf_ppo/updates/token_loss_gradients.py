"""dL/d log π(a_t) and dL/dH_t of an objective per token, computed before the loss of the micro-batch is known."""

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_ppo.batch import PolicyOutput, TokenInputs, TrainBatch
from rlhf_ppo.kernels.linear_logprobs import LossGradient
from rlhf_ppo.updates.objective import Objective


def token_loss_gradients(objective: Objective, batch: TrainBatch, count: Tensor) -> LossGradient:
    """Derivatives of `objective` with respect to log-probability and entropy, for any slice of the tokens of `batch`.

    Correct for every objective that is a sum over tokens divided by `count`; the fused head detects others. Whether the
    objective reads the entropy is tested once, with an entropy of nan.

    Args:
        objective: The objective to minimize.
        batch: A micro-batch; its inputs are `TokenInputs`.
        count: Number of actions in the whole optimizer step.
    """
    inputs = batch.inputs
    assert isinstance(inputs, TokenInputs)
    lengths = inputs.response_lengths().to(batch.mask.device)
    is_token = torch.arange(batch.mask.shape[1], device=lengths.device) < lengths[:, None]
    columns = {item.name: getattr(batch, item.name) for item in fields(batch)}
    flat: dict[str, Any] = {name: value[is_token] for name, value in columns.items() if isinstance(value, Tensor)}

    def loss_at(logprobs: Tensor, entropy: Tensor | None, part: TrainBatch) -> Tensor:
        output = PolicyOutput(
            logprobs=logprobs[None],
            values=torch.cat([part.values, part.values.new_zeros(1, 1)], dim=1),
            entropy=None if entropy is None else entropy[None],
        )
        return objective(output, part, count).loss

    def loss_gradient(logprobs: Tensor, entropy: Tensor | None, tokens: slice) -> tuple[Tensor, Tensor | None]:
        part = replace(batch, **{name: value[tokens][None] for name, value in flat.items()})
        leaves = [leaf.detach().requires_grad_() for leaf in (logprobs, entropy) if leaf is not None]
        with torch.enable_grad():
            loss = loss_at(leaves[0], leaves[1] if len(leaves) > 1 else None, part)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else (None,) * len(leaves)
        by_logprob, *rest = (torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True))
        return by_logprob, rest[0] if rest else None

    with torch.no_grad():
        all_tokens = replace(batch, **{name: value[None] for name, value in flat.items()})
        # A loss that reads this entropy, with or without gradient, is nan.
        loss = loss_at(flat["logprobs"], torch.full_like(flat["logprobs"], torch.nan), all_tokens)
    return LossGradient(loss_gradient, reads_entropy=bool(loss.isnan()))
