"""Sparse token scores as a dense vector."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor


def token_scores(sparse: Mapping[int, float], length: int) -> Float[Tensor, " tokens"]:
    """Expand sparse token scores to one number per response token, 0 elsewhere, as `step()` takes them.

    Args:
        sparse: Position -> score. Negative positions count from the end: -1 is the last token.
        length: Number of tokens of the response.

    Raises:
        ValueError: A position is outside the response, or two positions are the same token.
    """
    scores, seen = torch.zeros(length), set()
    for position, score in sparse.items():
        index = position + length if position < 0 else position
        if not 0 <= index < length or index in seen:
            raise ValueError(
                f"expected positions of different tokens in a response of {length}, got {sorted(sparse)}: a score "
                "would be lost, or counted at another token. Use 0 to length - 1, or -1 for the last."
            )
        seen.add(index)
        scores[index] = score
    return scores
