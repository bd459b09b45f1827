"""The functions of `trl.core` in TRL's classic (<= 0.11.4), with its arguments: masks are 0/1 tensors of any dtype."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import TopKLogitsWarper, TopPLogitsWarper

from rlhf_ppo.functional.logprobs import entropy_from_logits as entropy_from_logits
from rlhf_ppo.utils.timing import empty_cache_after

WANDB_PADDING = -1
"""What fills the rows that `stack_dicts` pads."""


class PPODecorators:
    """`empty_device_cache`, the decorator of the classic's methods."""

    optimize_device_cache: ClassVar[bool] = False

    @classmethod
    @contextmanager
    def empty_device_cache(cls) -> Iterator[None]:
        """Context manager and decorator: empty the device's cache afterwards, if `optimize_device_cache`."""
        with empty_cache_after(cls.optimize_device_cache):
            yield


def logprobs_from_logits(logits: Tensor, labels: Tensor | None, gather: bool = True) -> Tensor:
    """Log-probabilities of `labels`, [batch, time]; with `gather=False` those of the whole vocabulary."""
    logprobs = logits.log_softmax(dim=2)
    if not gather or labels is None:
        return logprobs
    return logprobs.gather(2, labels.unsqueeze(2)).squeeze(-1)


def masked_mean(values: Tensor, mask: Tensor, axis: int | None = None) -> Tensor:
    """Mean where the mask is 1, over everything or along `axis`."""
    if axis is None:
        return (values * mask).sum() / mask.sum()
    return (values * mask).sum(dim=axis) / mask.sum(dim=axis)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance where the mask is 1: 0 if it is 1 only once, a ValueError if nowhere."""
    count = mask.sum()
    if count == 0:
        raise ValueError("masked_var needs a mask with a 1 in it, got none: there is nothing to take a variance of.")
    variance = masked_mean((values - masked_mean(values, mask)).square(), mask)
    return variance * count / (count - 1).clamp(min=1) if unbiased else variance


def whiten(values: Tensor, shift_mean: bool = True) -> Tensor:
    """Values with mean 0 and variance 1; their own mean with `shift_mean=False`."""
    return masked_whiten(values, torch.ones_like(values), shift_mean)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """`whiten` with the moments of the entries where the mask is 1, applied to all entries."""
    mean = masked_mean(values, mask)
    whitened = (values - mean) * (masked_var(values, mask) + 1e-8).rsqrt()
    return whitened if shift_mean else whitened + mean


def clip_by_value(x: Tensor, tensor_min: Tensor, tensor_max: Tensor) -> Tensor:
    """`x` between two tensors."""
    return torch.max(torch.min(x, tensor_max), tensor_min)


def top_k_top_p_filtering(
    logits: Tensor,
    top_k: int = 0,
    top_p: float = 1.0,
    filter_value: float = -float("inf"),
    min_tokens_to_keep: int = 1,
) -> Tensor:
    """Logits [batch, vocabulary] with `filter_value` outside the top k tokens and outside the nucleus p."""
    settings: dict[str, Any] = {"filter_value": filter_value, "min_tokens_to_keep": min_tokens_to_keep}
    unused = torch.empty(0, dtype=torch.long)
    if top_k > 0:
        logits = TopKLogitsWarper(int(top_k), **settings)(unused, logits)
    if 0 <= top_p < 1.0:
        logits = TopPLogitsWarper(top_p, **settings)(unused, logits)
    return logits


def flatten_dict(nested: Mapping[str, Any], sep: str = "/") -> dict[str, Any]:
    """Nested dictionaries as one, keys joined by `sep`."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if sep in key:
            raise ValueError(f"separator {sep!r} not allowed to be in key {key!r}: two keys could become one.")
        if isinstance(value, Mapping):
            flat |= {f"{key}{sep}{name}": item for name, item in flatten_dict(value, sep).items()}
        else:
            flat[key] = value
    return flat


def stack_dicts(stats_dicts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of several dictionaries, flattened and stacked by name; short rows are padded with -1."""
    return {
        name: pad_sequence(
            [stats[name].flatten() for stats in stats_dicts], batch_first=True, padding_value=WANDB_PADDING
        )
        for name in (stats_dicts[0] if stats_dicts else ())
    }


def stats_to_np(stats_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors as NumPy arrays (bfloat16 as float32), single numbers as floats."""
    result: dict[str, Any] = {}
    for name, value in stats_dict.items():
        if isinstance(value, Tensor):
            value = (value.detach().float() if value.dtype == torch.bfloat16 else value.detach()).cpu().numpy()
        is_number = isinstance(value, int | float | np.number) or getattr(value, "shape", None) == ()
        result[name] = float(value) if is_number else value
    return result


def convert_to_scalar(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors and arrays of one number as that number."""
    return {
        name: value.item() if isinstance(value, Tensor | np.ndarray) and tuple(value.shape) in ((), (1,)) else value
        for name, value in stats.items()
    }
