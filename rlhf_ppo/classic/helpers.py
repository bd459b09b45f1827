"""Helpers of classic scripts: random lengths, plain sampling, a model as `generate` needs it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from rlhf_ppo.classic.core_functions import top_k_top_p_filtering
from rlhf_ppo.distributed.collectives import Processes

Rewards: TypeAlias = Sequence[Any] | Tensor | np.ndarray
"""Scores of several samples, in any form of numbers."""


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


def exact_div(a: int, b: int, custom_error_message: str = "") -> int:
    """A / b; a ValueError unless b divides a."""
    if a % b:
        raise ValueError(f"{custom_error_message}, inexact division: {a} / {b} = {a / b}")
    return a // b


@contextmanager
def unwrap_model_for_generation(model: Any, accelerator: Any, is_peft_model: bool = False) -> Iterator[Any]:
    """Context manager: yields the model without wrappers; under ZeRO-3 every process holds all of it while active.

    Args:
        is_peft_model: Whether to switch its adapters off.
    """
    unwrapped = accelerator.unwrap_model(model)
    without_adapters = unwrapped.pretrained_model.disable_adapter() if is_peft_model else nullcontext()
    with without_adapters, Processes(accelerator).gathered_parameters(unwrapped, model):
        yield unwrapped


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
        logits = top_k_top_p_filtering(model(input_ids)[0][:, -1, :], top_k=top_k, top_p=top_p)
        token = torch.multinomial(logits.softmax(dim=-1), num_samples=1)
        input_ids = torch.cat([input_ids, token], dim=-1)
    return input_ids[:, queries.shape[1] :]


def reward_totals(rewards: Rewards) -> list[float]:
    """The total of each sample's scores.

    Args:
        rewards: Samples along the first dimension; of one sample: a number, a 0-dim tensor, or one score per token.

    Raises:
        ValueError: Something that is not made of numbers.
    """
    totals = []
    for index, reward in enumerate(rewards):
        try:
            scores = reward.detach() if isinstance(reward, Tensor) else torch.as_tensor(np.asarray(reward, np.float64))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"rewards[{index}] must be a number or one number per response token, got {reward!r:.80}: it has no "
                "sum to log. Pass what step() was given."
            ) from error
        totals.append(float(scores.double().sum()))
    return totals
