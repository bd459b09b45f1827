"""Fit the passes of scoring and update into a GPU's memory, before the first step."""

import torch
from jaxtyping import Int
from torch import Tensor
from torch.optim import Optimizer

from rlhf_ppo.distributed.collectives import Processes
from rlhf_ppo.learner.prepare import enable_checkpointing
from rlhf_ppo.models import PreTrainedModelWrapper
from rlhf_ppo.models.device import free_memory
from rlhf_ppo.models.scoring import TokenPolicy
from rlhf_ppo.models.small_batch import is_sharded
from rlhf_ppo.updates.pass_memory import fit_pass, pass_memory, unallocated_state


def fitted_token_budget(
    processes: Processes,
    model: PreTrainedModelWrapper,
    policy: TokenPolicy,
    optimizer: Optimizer,
    costs: Int[Tensor, " rows"],
) -> int | None:
    """Tokens of a pass that the free memory holds; None on a CPU, or where processes shard the model. Collective.

    Switches gradient checkpointing on where the longest row would not fit otherwise, and says so.
    """
    accelerator = processes.accelerator
    if accelerator.device.type != "cuda" or is_sharded(policy):
        return None
    free = free_memory(accelerator.device) - unallocated_state(model, optimizer)
    extremes = torch.tensor([[-free, int(costs.max())]], dtype=torch.float64)  # over processes: less memory, longer row
    least, longest = processes.gather(extremes).amax(dim=0).tolist()
    size = fit_pass(pass_memory(policy), -least, int(longest), checkpointing=policy.checkpointing)
    if size.checkpointing and not policy.checkpointing:
        enable_checkpointing(model, policy)
    recomputed = ", activations recomputed (gradient_checkpointing)" if size.checkpointing else ""
    accelerator.print(
        f"memory: {-least / 2**30:.1f} GiB for passes of up to {size.tokens} tokens{recomputed}; token_budget= sets "
        "another number"
    )
    return size.tokens
