"""dL/d log π(a_t) and dL/dH_t of an objective per token, computed before the loss of the micro-batch is known."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlhf_ppo.batch import PolicyOutput, TokenInputs, TrainBatch
from rlhf_ppo.kernels.linear_logprobs import LossGradient
from rlhf_ppo.updates.objective import Objective
from rlhf_ppo.utils.transfer import upload


def token_loss_gradients(
    objective: Objective,
    batch: TrainBatch,
    count: Tensor,
    entropy_is_read: bool | None = None,
    differs: list[Tensor] | None = None,
) -> LossGradient:
    """Derivatives of `objective` with respect to log-probability and entropy, for any slice of the tokens of `batch`.

    Correct for every objective that is a sum over tokens divided by `count`; the fused head detects others.

    Args:
        batch: A micro-batch; its inputs are `TokenInputs`.
        count: Number of actions in the whole optimizer step.
        entropy_is_read: Whether the objective reads the entropy; None: find out.
    """
    flat = _flat_columns(batch)

    def loss_gradient(logprobs: Tensor, entropy: Tensor | None, tokens: slice) -> tuple[Tensor, Tensor | None]:
        part = replace(batch, **{name: value[tokens][None] for name, value in flat.items()})
        leaves = [leaf.detach().requires_grad_() for leaf in (logprobs, entropy) if leaf is not None]
        with torch.enable_grad():
            loss = _loss_at(objective, leaves[0], leaves[1] if len(leaves) > 1 else None, part, count)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else (None,) * len(leaves)
        by_logprob, *rest = (torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True))
        return by_logprob, rest[0] if rest else None

    if entropy_is_read is None:
        entropy_is_read = reads_entropy(objective, batch, count)
    return LossGradient(loss_gradient, reads_entropy=entropy_is_read, differs=differs)


@torch.no_grad()
def reads_entropy(objective: Objective, batch: TrainBatch, count: Tensor) -> bool:
    """Whether a loss reads the entropy, with gradient or without: it is then nan at an entropy of nan."""
    flat = _flat_columns(batch)
    flat["mask"] = torch.ones_like(flat["mask"])  # a micro-batch may have no actions
    all_tokens = replace(batch, **{name: value[None] for name, value in flat.items()})
    entropy = torch.full_like(flat["logprobs"], torch.nan)
    return bool(_loss_at(objective, flat["logprobs"], entropy, all_tokens, count).isnan())


def _flat_columns(batch: TrainBatch) -> dict[str, Any]:
    """The tensors of a batch at its response tokens, one after the other."""
    inputs = batch.inputs
    assert isinstance(inputs, TokenInputs)
    lengths, width = inputs.response_lengths(), batch.mask.shape[1]
    is_token = torch.arange(width) < lengths[:, None]
    index = upload(is_token.flatten().nonzero().squeeze(1), batch.mask.device)
    return batch.map_tensors(lambda value: value.flatten(0, 1)[index])


def _loss_at(objective: Objective, logprobs: Tensor, entropy: Tensor | None, part: TrainBatch, count: Tensor) -> Tensor:
    output = PolicyOutput(
        logprobs=logprobs[None],
        values=torch.cat([part.values, part.values.new_zeros(1, 1)], dim=1),
        entropy=None if entropy is None else entropy[None],
    )
    return objective(output, part, count).loss
