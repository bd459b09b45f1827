"""Keep small derivatives in the range of float16, whose smallest number is 6e-8.

The scale of the loss would come too late: the fused LM head multiplies its gradients by it at the end.
"""

import torch
from torch import Tensor

from rlhf_ppo.functional.masked import at_least_float32


def divide_by_largest(
    dtype: torch.dtype, grad_logprobs: Tensor, grad_entropy: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """For float16 operands, the derivatives' largest size and both divided by it; otherwise None and both as they are.

    The size is a tensor, so that the host does not wait for a GPU.
    """
    if dtype != torch.float16:
        return None, grad_logprobs, grad_entropy
    sizes = [gradient.abs().amax() for gradient in (grad_logprobs, grad_entropy) if gradient is not None]
    largest = torch.stack(sizes).amax()
    unit = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    return unit, grad_logprobs / unit, None if grad_entropy is None else grad_entropy / unit


def multiply_by(unit: Tensor | None, gradient: Tensor) -> Tensor:
    """A product of operands that were divided by `unit`, in float32, in place where it has that dtype."""
    return gradient if unit is None else at_least_float32(gradient).mul_(unit)
