"""A trial of a GPU kernel before it is used: results and gradients are those of the plain computation, in less time."""

import logging
import math
import os
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MIN_SPEEDUP = 1.03
"""Least speedup of a kernel for it to be used: below, the choice could change with noise from run to run."""
TOLERANCES = {torch.float32: 5e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""How far results and gradients of a dtype may differ, relative to the largest."""
CALLS, REPEATS = 5, 7


def requested_kernels() -> str:
    """What `RLHF_PPO_GPU_KERNELS` says: "torch", "triton", or "" where kernels are measured.

    Raises:
        ValueError: It holds another word.
    """
    word = os.environ.get("RLHF_PPO_GPU_KERNELS", "").strip().lower()
    if word not in ("", "torch", "triton"):
        raise ValueError(
            f"RLHF_PPO_GPU_KERNELS={word!r} cannot be read: it takes 'torch' for torch's own kernels, or 'triton' for "
            "Triton kernels wherever their results are right. Unset it to have both measured."
        )
    return word


def level_of_missing_kernels() -> int:
    """The level at which to log that a kernel is not installed: a warning to those who asked for it."""
    return logging.WARNING if requested_kernels() == "triton" else logging.INFO


def try_kernel(
    kernel: Callable[[], Sequence[Tensor]], plain: Callable[[], Sequence[Tensor]], dtype: torch.dtype | None = None
) -> tuple[bool, str]:
    """Whether a kernel is used, and who computes and why, as a phrase; both functions return results and gradients.

    They are compared in the precision of `dtype`, or else of each result. `requested_kernels` may keep to torch, or to
    what is right without timing it.
    """
    word = requested_kernels()
    if word == "torch":
        return False, "torch (RLHF_PPO_GPU_KERNELS says so)"
    try:
        for expected, found in zip(plain(), kernel(), strict=True):  # the kernel may write over its inputs
            gap = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
            if found.dtype != expected.dtype or not gap <= TOLERANCES[dtype or expected.dtype]:
                return False, f"torch (a Triton kernel's results differ by {gap:.1e} of the largest)"
        speedup = math.inf if word else _seconds(plain) / _seconds(kernel)
    except Exception as refusal:  # whatever a driver, a card, a compiler or a build refuses
        return (
            False,
            f"torch (a Triton kernel fails: {type(refusal).__name__}: {(str(refusal) or '-').splitlines()[0]})",
        )
    if speedup > MIN_SPEEDUP:
        return True, f"a Triton kernel ({'RLHF_PPO_GPU_KERNELS says so' if word else f'{speedup:.2f} times as fast'})"
    return False, f"torch (a Triton kernel is {speedup:.2f} times as fast)"


def trial_values(*shape: int, device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    """Values between -2 and 2 in no order, made on the device; no random stream moves."""
    steps = torch.arange(math.prod(shape), dtype=torch.float32, device=device)
    return ((steps % 9973) * (1.7 + seed)).sin().mul(2).to(dtype).view(shape)


def _seconds(computation: Callable[[], object]) -> float:
    """Seconds of some calls in a row, the least of some repeats."""
    least = math.inf
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            computation()
        torch.cuda.synchronize()
        least = min(least, time.perf_counter() - start)
    return max(least, 1e-9)
