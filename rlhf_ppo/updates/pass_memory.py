"""How many tokens a forward and backward pass may have in a GPU's memory, and whether activations are recomputed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rlhf_ppo.batch import TokenInputs
from rlhf_ppo.kernels.chunk_sizes import GPU_SIZES
from rlhf_ppo.models.scoring import TokenPolicy

SHARE = 0.8
"""Share of the free memory that passes are planned into: the count below sees neither kernels' work spaces nor what the
allocator cannot hand out again."""
TRIAL_TOKENS = (16, 32)
"""Tokens of the two rows whose activations are counted."""
WORKING_LAYERS = 2
"""Layers whose activations come again as gradients, or are recomputed, beside those that are kept."""


@dataclass(frozen=True, kw_only=True)
class PassMemory:
    """Bytes of a pass beyond weights, gradients and optimizer."""

    kept: float
    """Per token, where activations are kept for the backward pass."""
    recomputed: float
    """Per token, where each layer's are recomputed in it; a separate critic's are kept."""
    fixed: float
    """However many tokens there are: a chunk of logits, weights in the dtype of the products."""


@dataclass(frozen=True)
class PassSize:
    """The largest pass that fits into memory."""

    tokens: int
    """Padded tokens of a pass."""
    checkpointing: bool
    """Whether activations are recomputed in the backward pass."""


def fit_pass(memory: PassMemory, available: float, longest: int, *, checkpointing: bool) -> PassSize:
    """The largest pass in `available` bytes; activations are recomputed where the longest row would not fit otherwise.

    Args:
        available: Bytes that nothing else will take.
        longest: Tokens of the longest row, which a pass has at least.
        checkpointing: Whether they are recomputed anyway.
    """
    room = max(SHARE * available - memory.fixed, 0.0)
    if not checkpointing and (tokens := int(room / memory.kept)) >= longest:
        return PassSize(tokens, False)
    return PassSize(max(int(room / memory.recomputed), longest), True)


def pass_memory(policy: TokenPolicy) -> PassMemory:
    """What a pass of `policy` needs: its layers' saved tensors are counted in two short passes.

    The graph of a separate critic is alive beside the policy's until the backward pass, so both are counted.
    """
    policy.paths  # noqa: B018  # proved before anything is counted
    saved = _saved_per_token(policy.critic_states, policy)
    critic = policy.separate_critic
    of_critic = 0.0 if critic is None else _saved_per_token(policy.critic_values, policy)
    critic_config = getattr(critic, "backbone", policy).config  # one on the policy's base has the policy's layers
    weights = sum(weight.numel() for weight in policy.parameters() if weight.dtype == torch.float32)
    copies = 0 if policy.trunk.autocast is None else weights * policy.trunk.autocast.itemsize
    critic_layer = of_critic / critic_config.get_text_config().num_hidden_layers
    return pass_memory_from_saved(saved, policy.config, copies=copies, critic=of_critic, critic_layer=critic_layer)


def pass_memory_from_saved(
    saved: float, config: Any, *, copies: float, critic: float = 0.0, critic_layer: float = 0.0
) -> PassMemory:
    """What a pass needs, from what its layers save.

    Args:
        saved: Bytes per token.
        copies: Bytes of weights in the dtype of the products.
        critic: Bytes per token that a separate critic's layers save.
        critic_layer: Those of one of its layers.
    """
    shape = config.get_text_config()
    layers, hidden = shape.num_hidden_layers, shape.hidden_size * torch.float32.itemsize
    working = WORKING_LAYERS * max(saved / layers, critic_layer)  # one backward pass runs after the other
    return PassMemory(
        kept=saved + critic + working, recomputed=layers * hidden + saved / layers + critic + working,
        fixed=2.0 * GPU_SIZES.whole_logits + copies,
    )  # fmt: skip


def unallocated_state(model: nn.Module, optimizer: Optimizer) -> int:
    """Bytes of gradients and of Adam's moments that the next step will allocate."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    gradients = sum(weight.nbytes for weight in trained if weight.grad is None)
    has_state = bool(getattr(optimizer, "optimizer", optimizer).state)
    return gradients + (0 if has_state else 2 * sum(weight.nbytes for weight in trained))


def _saved_per_token(run: Callable[[TokenInputs], object], policy: TokenPolicy) -> float:
    """Bytes that a row's pass keeps for the backward pass, per token; weights are the same for every length."""
    few, many = (_saved_bytes(run, tokens, policy) for tokens in TRIAL_TOKENS)
    return (many - few) / (TRIAL_TOKENS[1] - TRIAL_TOKENS[0])


def _saved_bytes(run: Callable[[TokenInputs], object], tokens: int, policy: TokenPolicy) -> int:
    device = next(policy.parameters()).device
    row = torch.ones(tokens // 2, dtype=torch.long, device=device)
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        kept = run(TokenInputs(prompts=[row], responses=[row]))
    assert kept  # until here, so that no address is given twice
    return sum(saved.values())
