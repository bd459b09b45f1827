"""Adam as TensorFlow had it and a learning rate that falls to zero, two tricks of the first implementations; and where
Adam's moments come to lie in memory.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR


class TensorFlowAdam(Optimizer):
    """Adam with ε beside the *uncorrected* second moment (Kingma & Ba 2015, the form at the end of §2).

        θ ← θ - lr · √(1 - β₂ᵗ) / (1 - β₁ᵗ) · m / (√v + ε)

    PyTorch divides by √v / √(1 - β₂ᵗ) + ε: the same at ε = 0, but at the first steps its ε weighs up to 30 times less,
    and early updates of PPO are the larger for it (Huang et al. 2024).

    Args:
        params: What is trained.
        lr: Learning rate.
        betas: β₁, β₂.
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
        """One step on the gradients that are there."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
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
    """The learning rate of iteration i, from 0: lr (1 - i / iterations). It reaches 0 only after the last one.

    Raises:
        ValueError: There is no iteration.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    return LambdaLR(optimizer, lambda step: max(0.0, 1 - step / iterations))


def adam(
    parameters: list[torch.nn.Parameter], *, lr: float, eps: float = 1e-8, tensorflow: bool = False, fused: bool = True
) -> Optimizer:
    """Adam over `parameters`: PyTorch's, fused where they allow it, or TensorFlow's."""
    if tensorflow:
        return TensorFlowAdam(parameters, lr, eps=eps)
    fused = fused and all(parameter.is_floating_point() for parameter in parameters)
    return Adam(parameters, lr=lr, eps=eps, fused=fused or None)


def create_moments(optimizer: Optimizer) -> None:
    """Let Adam's moments come to life now instead of at the first step, behind the first gradients.

    A gradient that comes to lie below them in memory leaves a hole when it is forgotten, into which activations and
    logits go first, and no gradient of that size any more. Values and steps are the same. Other optimizers, and moments
    that are there already, are left alone.
    """
    plain = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    if type(plain) not in (Adam, AdamW):
        return
    for group in plain.param_groups:
        if group["amsgrad"] or group["capturable"]:
            continue
        for parameter in group["params"]:
            if parameter.requires_grad and not plain.state.get(parameter):
                zeros = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                plain.state[parameter] = {
                    "step": torch.tensor(0.0), "exp_avg": zeros, "exp_avg_sq": zeros.clone(),
                }  # fmt: skip
