"""TensorFlow's Adam, and a linear learning-rate schedule to zero."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR


def learning_rate(optimizer: Optimizer) -> float:
    """Rate of the first parameter group; nan where the optimizer finds its own (Adafactor with `lr=None`)."""
    rate = optimizer.param_groups[0]["lr"]
    return math.nan if rate is None else float(rate)


class TensorFlowAdam(Optimizer):
    """Adam with ε beside the *uncorrected* second moment (Kingma & Ba 2015, the form at the end of §2).

        θ ← θ - lr · √(1 - β₂ᵗ) / (1 - β₁ᵗ) · m / (√v + ε)

    PyTorch divides by √v / √(1 - β₂ᵗ) + ε: the same at ε = 0, but at the first steps its ε has up to 30 times less
    effect, which makes early updates of PPO larger (Huang et al. 2024).

    Args:
        eps: ε; 1e-5 in the implementations of 2019.

    Raises:
        ValueError: ε is not positive.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-5
    ) -> None:
        if not eps > 0:
            raise ValueError(f"eps must be > 0, got {eps}: a weight without gradient is divided by it. Usual: 1e-5")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; parameters without gradient are skipped."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update_parameter(parameter, group)
        return loss

    def _update_parameter(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, (first, second) = self.state[parameter], group["betas"]
        if not state:
            zeros = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state.update(step=torch.zeros(()), exp_avg=zeros, exp_avg_sq=zeros.clone())
        state["step"] += 1
        steps = float(state["step"])
        state["exp_avg"].lerp_(parameter.grad, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
        rate = group["lr"] * math.sqrt(1 - second**steps) / (1 - first**steps)
        parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-rate)


def linear_to_zero(optimizer: Optimizer, iterations: int) -> LambdaLR:
    """Learning-rate schedule lr (1 - i / iterations) for iteration i = 0, 1, ...; it reaches 0 after the last one.

    Raises:
        ValueError: `iterations` is below 1.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    return LambdaLR(optimizer, lambda step: max(0.0, 1 - step / iterations))


def adam(
    parameters: list[Any], *, lr: float, eps: float = 1e-8, tensorflow: bool = False, fused: bool = True
) -> Optimizer:
    """Adam over parameters or groups of them: PyTorch's, fused on request, or TensorFlow's."""
    if tensorflow:
        return TensorFlowAdam(parameters, lr, eps=eps)
    return Adam(parameters, lr=lr, eps=eps, fused=fused or None)
