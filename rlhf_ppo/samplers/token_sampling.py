"""Sample one token per row by inverting the cumulative distribution."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 256  # tokens per block of the two-level search; near the square root of a 50k-100k vocabulary


def sample_tokens(
    logits: Float[Tensor, "rows vocab"], uniforms: Float[Tensor, "rows"]
) -> tuple[Int[Tensor, "rows"], Float[Tensor, "rows"]]:
    """Sample token i with probability p_i = softmax(logits)_i, by inversion of the cumulative distribution.

        token = min { i : p_0 + ... + p_i > u },        u uniform on [0, 1)

    Needs one uniform per row, where `torch.multinomial` draws one random number per vocabulary entry, the most
    expensive part of a small model's decode step. A token with logit -inf is never sampled: its probability is
    exactly 0 and the inequality is strict.
    The search has two levels, blocks of 256 tokens and then one block, both summed in float64.

    Args:
        logits: float32. A row needs at least one finite logit; +inf and nan give nan log-probs.
        uniforms: float64 in [0, 1).

    Returns:
        The tokens, and log p of each, nats, float32.
    """
    vocab = logits.shape[1]
    weights = torch.softmax(logits, dim=1)  # a fifth of the time of exp(), which MKL computes
    full_width = vocab - vocab % BLOCK
    block_sums = weights[:, :full_width].unflatten(1, (-1, BLOCK)).sum(dim=-1, dtype=torch.float32).double()
    if full_width < vocab:
        block_sums = torch.cat([block_sums, weights[:, full_width:].sum(dim=1, keepdim=True).double()], dim=1)
    cumulative = block_sums.cumsum(dim=1)
    total = cumulative[:, -1]
    target = _clamp_below(uniforms.to(total) * total, total)
    block = _first_above(cumulative, target)

    sum_before = cumulative.gather(1, block[:, None]).squeeze(1) - block_sums.gather(1, block[:, None]).squeeze(1)
    columns = block[:, None] * BLOCK + torch.arange(BLOCK, device=logits.device)
    block_weights = weights.gather(1, columns.clamp(max=vocab - 1)).double().masked_fill_(columns >= vocab, 0.0)
    cumulative_in_block = block_weights.cumsum(dim=1)
    # Rounding in the first level may put the residual outside the block: clamp it.
    offset = _first_above(
        cumulative_in_block, _clamp_below((target - sum_before).clamp_(min=0.0), cumulative_in_block[:, -1])
    )
    weight = block_weights.gather(1, offset[:, None]).squeeze(1)
    return block * BLOCK + offset, (weight.log() - total.log()).float()


def _clamp_below(target: Float[Tensor, "rows"], bound: Float[Tensor, "rows"]) -> Float[Tensor, "rows"]:
    """Clamp `target` to the largest float below `bound`."""
    return torch.minimum(target, torch.nextafter(bound, torch.zeros_like(bound)))


def _first_above(cumulative: Float[Tensor, "rows n"], target: Float[Tensor, "rows"]) -> Int[Tensor, "rows"]:
    """First index whose cumulative sum exceeds the target; its summand is then positive."""
    return (cumulative <= target[:, None]).sum(dim=1).clamp_(max=cumulative.shape[1] - 1)


def greedy_tokens(logits: Float[Tensor, "rows vocab"]) -> tuple[Int[Tensor, "rows"], Float[Tensor, "rows"]]:
    """Most likely token of each row and its log-probability under softmax(logits), nats, float32."""
    tokens = logits.argmax(dim=1, keepdim=True)
    return tokens.squeeze(1), torch.log_softmax(logits, dim=1).gather(1, tokens).squeeze(1)
