"""float32 matrix products on a CPU by oneDNN, where it is faster than torch's own.

torch computes float32 products on CPUs with MKL, whose AVX-512 kernels stay off on processors of other makers than
Intel; oneDNN, which torch carries for convolutions and bfloat16, uses them. Which one is faster is measured once a
process, unless the environment variable `RLHF_PPO_MATMUL` says. Plain twin: `torch.mm`.
"""

import logging
import math
import os
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_ppo.functional.masked import HALF_PRECISION
from rlhf_ppo.kernels.allocator import limit_kernel_caches
from rlhf_ppo.kernels.scratch_buffer import ScratchBuffer

logger = logging.getLogger(__name__)

MIN_SPEEDUP = 1.25
"""Least speedup of oneDNN for it to be used: below, the choice could change with noise from run to run."""
CHOICES = (("torch", "onednn"), ("float32", "bfloat16"))
"""What `RLHF_PPO_MATMUL` may say: who computes float32 products, and the dtype of products under `bf16=True`."""


def choice_from_environment(choices: tuple[str, str]) -> bool | None:
    """Whether `RLHF_PPO_MATMUL` (such as `onednn,float32`) names the second of two choices; None: it names neither.

    Raises:
        ValueError: The variable holds another word, or both words of a choice.
    """
    words = {word.strip().lower() for word in os.environ.get("RLHF_PPO_MATMUL", "").split(",")} - {""}
    known = {word for pair in CHOICES for word in pair}
    if words - known or any(words >= set(pair) for pair in CHOICES):
        raise ValueError(
            f"RLHF_PPO_MATMUL={os.environ['RLHF_PPO_MATMUL']!r} cannot be read: it takes one of 'torch' and 'onednn', "
            "one of 'float32' and 'bfloat16', or one of each with a comma between. Unset it to have both measured."
        )
    return None if words.isdisjoint(choices) else choices[1] in words


@cache
def onednn_is_faster() -> bool:
    """Whether float32 products run on oneDNN here: it must be there, agree with torch, and win clearly.

    The result is logged, kept for the process, and costs some milliseconds. `RLHF_PPO_MATMUL` can force it.

    Raises:
        ValueError: `RLHF_PPO_MATMUL` asks for oneDNN, and this build of torch carries none.
    """
    forced = choice_from_environment(CHOICES[0])
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        if forced:
            raise ValueError(
                "RLHF_PPO_MATMUL asks for 'onednn', which this build of torch carries no linear kernel of: say 'torch'."
            )
        logger.info("float32 products: torch's own, since this build carries no oneDNN linear kernel")
        return False
    limit_kernel_caches()
    if forced is not None:
        logger.info("float32 products: %s, as RLHF_PPO_MATMUL says", CHOICES[0][forced])
        return forced
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 512, generator=generator), torch.randn(512, 768, generator=generator))
    try:
        error = float((_by_onednn(a, b) - a @ b).abs().max() / (a @ b).abs().max())
        ours, theirs = measure_seconds(lambda: _by_onednn(a, b), lambda: a @ b)
    except RuntimeError as refusal:
        logger.warning("float32 products: torch's own, since oneDNN refused one: %s", refusal)
        return False
    chosen = error < 1e-5 and theirs / ours > MIN_SPEEDUP
    logger.info(
        "float32 products: %s (oneDNN takes 1/%.2f of the time of torch's own, relative difference %.1e)",
        "oneDNN" if chosen else "torch's own", theirs / ours, error,
    )  # fmt: skip
    return chosen


@cache
def bfloat16_is_faster() -> bool:
    """Whether bfloat16 products beat float32 ones here: on CPUs with AVX-512-BF16 or AMX they do, elsewhere not.

    `RLHF_PPO_MATMUL` can force it.
    """
    limit_kernel_caches()
    forced = choice_from_environment(CHOICES[1])
    if forced is not None:
        logger.info("products: %s, as RLHF_PPO_MATMUL says", CHOICES[1][forced])
        return forced
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(256, 512, generator=generator), torch.randn(512, 768, generator=generator)
    low = a.bfloat16(), b.bfloat16()
    ours, theirs = measure_seconds(lambda: low[0] @ low[1], lambda: matmul(a, b))
    logger.info("bfloat16 products take 1/%.2f of the time of float32 ones", theirs / ours)
    return theirs / ours > MIN_SPEEDUP


def is_eager_float32_on_cpu(*tensors: Tensor | None) -> bool:
    """Whether all are float32 on the CPU, outside of `torch.compile` and autocast: what our CPU kernels need."""
    return (
        all(t is None or (t.dtype == torch.float32 and t.device.type == "cpu" and t.numel() > 0) for t in tensors)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


def matmul(
    a: Float[Tensor, "n k"],
    b: Float[Tensor, "k m"],
    bias: Float[Tensor, " m"] | None = None,
    *,
    scratch: ScratchBuffer | None = None,
) -> Float[Tensor, "n m"]:
    """A B + bias without a gradient of its own: either operand may be a transposed view.

    On a GPU the result of half-precision operands is float32: added up in it, and not rounded at the end.
    It lies in `scratch`, where that is given and the product is torch's own.
    """
    if is_eager_float32_on_cpu(a, b, bias) and onednn_is_faster():
        return _by_onednn(a, b, bias)
    if a.device.type == "cuda" and a.dtype in HALF_PRECISION and "dtype" in torch.ops.aten.mm.overloads():
        product = torch.mm(a, b, out_dtype=torch.float32)  # since torch 2.8; before, results are rounded
        return product if bias is None else product.add_(bias)
    out = None if scratch is None else scratch.empty((a.shape[0], b.shape[1]), a.dtype)
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def onednn_linear(
    x: Float[Tensor, "*batch k"],
    weight: Float[Tensor, "m k"] | Float[Tensor, "k m"],
    bias: Float[Tensor, " m"] | None,
    *,
    transposed: bool = False,
) -> Float[Tensor, "*batch m"]:
    """X W^T + b, or x W + b where `transposed`: `F.linear` and GPT-2's Conv1D by oneDNN, with gradients."""
    if torch.is_grad_enabled():
        # Outside of the function, so that the result is no view made in it: some layers change it in place.
        rows: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias, transposed)  # type: ignore[no-untyped-call]
        return rows.view(*x.shape[:-1], rows.shape[-1])
    flat = _by_onednn(x.reshape(-1, x.shape[-1]), weight if transposed else weight.t(), bias)
    return flat.view(*x.shape[:-1], flat.shape[-1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.transposed = transposed
        return _by_onednn(x, weight if transposed else weight.t(), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        # A second derivative is wanted where grad mode is on: torch's own products have one.
        times: Callable[[Tensor, Tensor], Tensor] = torch.matmul if torch.is_grad_enabled() else _by_onednn
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = times(grad, weight.t() if ctx.transposed else weight)
        if ctx.needs_input_grad[1]:
            grad_weight = times(x.t(), grad) if ctx.transposed else times(grad.t(), x)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(dim=0)
        return grad_x, grad_weight, grad_bias, None


def _by_onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return result


def measure_seconds(*functions: Callable[[], object], repeats: int = 7) -> list[float]:
    """CPU time of this thread for each, the least of some calls: other jobs on the machine then count little.

    They take turns, because such a machine changes its pace for longer than all calls of one function take.
    """
    for function in functions:
        function()
    least = [math.inf] * len(functions)
    for _ in range(repeats):
        for index, function in enumerate(functions):
            start = time.thread_time()
            function()
            least[index] = min(least[index], time.thread_time() - start)
    return [max(seconds, 1e-9) for seconds in least]
