"""Helpers of classic scripts: random lengths and plain sampling."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper


class LengthSampler:
    """Samples a length uniformly from `min_value`, ..., `max_value - 1`, by numpy's global generator.

    Args:
        min_value: Smallest length.
        max_value: Largest length + 1.

    Raises:
        ValueError: `min_value` is not below `max_value`.
    """

    def __init__(self, min_value: int, max_value: int) -> None:
        if min_value >= max_value:
            raise ValueError(
                f"LengthSampler needs min_value < max_value, got {min_value} and {max_value}: max_value itself is "
                "never drawn, so there is no length to draw. For a fixed length n pass (n, n + 1)."
            )
        self.values = list(range(min_value, max_value))

    def __call__(self) -> int:
        return int(np.random.choice(self.values))


@torch.no_grad()
def respond_to_batch(
    model: Any, queries: Int[Tensor, "batch prompt"], txt_len: int = 20, top_k: int = 0, top_p: float = 1.0
) -> Int[Tensor, "batch response"]:
    """Sample `txt_len` tokens after queries of one length, without a cache and without a stop token.

    Args:
        model: Called as `model(input_ids)`; the first of its outputs are the logits [batch, time, vocabulary].
        queries: Tokens of the prompts.
        txt_len: Number of tokens to sample.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens with this probability; 1 keeps all.
    """
    input_ids = queries
    for _ in range(txt_len):
        logits = _filter_logits(model(input_ids)[0][:, -1, :], top_k=top_k, top_p=top_p)
        token = torch.multinomial(logits.softmax(dim=-1), num_samples=1)
        input_ids = torch.cat([input_ids, token], dim=-1)
    return input_ids[:, queries.shape[1] :]


def _filter_logits(
    logits: Float[Tensor, "batch vocabulary"], *, top_k: int, top_p: float
) -> Float[Tensor, "batch vocabulary"]:
    unused = torch.empty(0, dtype=torch.long)
    if top_k > 0:
        logits = TopKLogitsWarper(top_k)(unused, logits)
    if top_p < 1.0:
        logits = TopPLogitsWarper(top_p)(unused, logits)
    return logits
