"""Log-probabilities and entropy of given tokens, in float32, one chunk of logits at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf_ppo.functional.kl import categorical_kl
from rlhf_ppo.functional.masked import at_least_float32

Head: TypeAlias = Callable[[Tensor], Tensor]
"""Hidden states [n, H] -> logits [n, V]."""


@dataclass(frozen=True)
class TokenStatistics:
    """Log-probabilities and entropies of N tokens."""

    logprobs: Float[Tensor, " tokens"]
    """log π(token), nats."""
    entropy: Float[Tensor, " tokens"] | None
    """Entropy of the full distribution at each token, nats; None where not requested."""


def token_logprobs(
    logits: Float[Tensor, "*shape vocab"], tokens: Int[Tensor, "*shape"], *, temperature: float = 1.0
) -> Float[Tensor, "*shape"]:
    """Log-probability log π(token) under softmax(logits / temperature), nats, at least float32.

    Args:
        logits: Raw scores of the vocabulary at the position *before* each token.
        tokens: Ids in [0, vocab).
        temperature: The sampler's, so that ratios compare the distribution that was sampled from (Ziegler et al. 2019).

    Raises:
        ValueError: The temperature is not positive.
    """
    logprobs = torch.log_softmax(_divide_by_temperature(logits, temperature), dim=-1)
    return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def entropy_from_logits(logits: Float[Tensor, "*shape vocab"]) -> Float[Tensor, "*shape"]:
    """Entropy of softmax(logits), nats, at least float32; tokens at -inf contribute 0.

    The entropy of the full distribution, whose gradient -p (log p + H) an entropy bonus needs: the sampled -log p has a
    gradient of mean zero.
    """
    logprobs = torch.log_softmax(at_least_float32(logits), dim=-1)
    return _entropy(logprobs)


def chunked_token_statistics(
    head: Head,
    hidden: Float[Tensor, "tokens hidden"],
    tokens: Int[Tensor, " tokens"],
    *,
    temperature: float = 1.0,
    chunk_size: int = 1024,
    with_entropy: bool = True,
) -> TokenStatistics:
    """Log-probability and entropy of each token, with at most chunk_size x vocab logits in memory.

    Logits are computed from the hidden states chunk by chunk and again in the backward pass, so neither pass holds
    the [tokens, vocab] matrix. Results and gradients equal those of the plain computation.

    Args:
        head: The LM head, with or without gradient.
        hidden: Hidden states at the positions before the tokens.
        tokens: Token ids.
        temperature: Divides the logits, for log-probabilities and entropy.
        chunk_size: Tokens at a time.
        with_entropy: Also compute the entropy, which costs one more pass over each chunk.

    Raises:
        ValueError: The temperature or the chunk size is not positive, or the lengths differ.
    """
    if len(tokens) != len(hidden):
        raise ValueError(
            f"hidden and tokens must describe the same positions, got {len(hidden)} states and {len(tokens)} tokens: "
            "log-probabilities would belong to other tokens. Select both with the same mask."
        )

    def statistics(hidden_chunk: Tensor, tokens_chunk: Tensor) -> tuple[Tensor, ...]:
        logprobs = torch.log_softmax(_divide_by_temperature(head(hidden_chunk), temperature), dim=-1)
        chosen = logprobs.gather(-1, tokens_chunk.unsqueeze(-1)).squeeze(-1)
        return (chosen, _entropy(logprobs)) if with_entropy else (chosen,)

    columns = _map_chunks(statistics, hidden, tokens, chunk_size=chunk_size)
    return TokenStatistics(logprobs=columns[0], entropy=columns[1] if with_entropy else None)


def chunked_categorical_kl(
    head: Head,
    hidden: Float[Tensor, "tokens hidden"],
    ref_head: Head,
    ref_hidden: Float[Tensor, "tokens ref_hidden"],
    *,
    temperature: float = 1.0,
    chunk_size: int = 1024,
) -> Float[Tensor, " tokens"]:
    """Exact KL(π || reference) over the full vocabulary at each token, nats, one chunk of logits at a time.

    Either side may carry a gradient. With the old policy first and the new one as `ref_head` it is the
    KL(π_old || π_θ) of PPO's penalty and of TRPO.

    Args:
        head: LM head of π.
        hidden: Hidden states of π.
        ref_head: LM head of the reference.
        ref_hidden: Hidden states of the reference at the same positions.
        temperature: Divides both logits.
        chunk_size: Tokens at a time.

    Raises:
        ValueError: The temperature or the chunk size is not positive.
    """

    def divergence(hidden_chunk: Tensor, ref_chunk: Tensor) -> tuple[Tensor, ...]:
        p_logits = _divide_by_temperature(head(hidden_chunk), temperature)
        return (categorical_kl(p_logits, _divide_by_temperature(ref_head(ref_chunk), temperature)),)

    return _map_chunks(divergence, hidden, ref_hidden, chunk_size=chunk_size)[0]


def _divide_by_temperature(logits: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise ValueError(
            f"temperature must be > 0, got {temperature}: at 0 the policy is deterministic and has no log-probability "
            "gradient. Sample greedily with do_sample=False and score at temperature 1.0."
        )
    logits = at_least_float32(logits)
    return logits if temperature == 1.0 else logits / temperature


def _entropy(logprobs: Tensor) -> Tensor:
    # p log p -> 0 as p -> 0, but 0 * -inf is nan: so such logarithms become 0 before the product.
    return -(logprobs.exp() * logprobs.masked_fill(logprobs == -torch.inf, 0)).sum(-1)


def _map_chunks(
    function: Callable[[Tensor, Tensor], tuple[Tensor, ...]], first: Tensor, second: Tensor, *, chunk_size: int
) -> list[Tensor]:
    """Apply `function` to row chunks of two tensors and concatenate; with gradient, backward recomputes each chunk."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 token, got {chunk_size}: pass for example 1024.")
    chunks = []
    for start in range(0, max(len(first), 1), chunk_size):  # no rows: one empty chunk keeps the graph connected
        rows = slice(start, start + chunk_size)
        if torch.is_grad_enabled():
            chunks.append(checkpoint(function, first[rows], second[rows], use_reentrant=False))
        else:
            chunks.append(function(first[rows], second[rows]))
    return [torch.cat(column) for column in zip(*chunks, strict=True)]
