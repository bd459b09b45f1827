"""Norms, gated layers and rotary attention of any architecture, exchanged for ones that walk less over the states.

Architectures of `transformers` bring classes of their own that compute the same. Which do is found out by trial: a
class is exchanged once a module of it has given what the fused one gives.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.activations import SiLUActivation

from rlhf_ppo.kernels.fused_layers import rms_norm, swiglu
from rlhf_ppo.kernels.fused_rotary import forward_with_fused_rotary
from rlhf_ppo.kernels.matmul import is_eager_float32_on_cpu

CLOSE = 1e-5
"""How far outputs may differ in the trial, relative to the largest."""

SILU = (nn.SiLU, SiLUActivation)
"""Classes of activations that are x · sigmoid(x)."""
_FUSED: dict[type[nn.Module], type[nn.Module]] = {}
"""Classes that have passed the trial, and what takes their place."""


class FusedModule:
    """Base class of fused modules; it comes before the plain class."""


class _FusedNorm(FusedModule):
    """An RMSNorm that keeps its input and one number a row."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        eps = norm_eps(self)
        if eps is None or not is_eager_float32_on_cpu(hidden_states, self.weight):
            return super().forward(hidden_states)  # type: ignore[no-any-return,misc]
        return rms_norm(hidden_states, self.weight, eps)


class _FusedGatedMLP(FusedModule):
    """SwiGLU layer that recomputes SiLU(gate) in the backward pass."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if type(self.act_fn) not in SILU or not is_eager_float32_on_cpu(x):
            return super().forward(x)  # type: ignore[no-any-return,misc]
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-any-return]


_MIXINS: dict[str | None, type[FusedModule]] = {"norm": _FusedNorm, "swiglu": _FusedGatedMLP}


def fused_class(module: nn.Module) -> type[nn.Module] | None:
    """The fused class that computes the same as the class of `module`; None if there is none."""
    kind = type(module)
    if kind not in _FUSED and not issubclass(kind, FusedModule):
        rotating, mixin = forward_with_fused_rotary(module), _MIXINS.get(kernel_name(module))
        if rotating is not None:
            _FUSED[kind] = class_before(kind, FusedModule, forward=rotating)
        elif mixin is not None and _computes_the_same(module, class_before(kind, mixin)):
            _FUSED[kind] = class_before(kind, mixin)
    fused = _FUSED.get(kind)
    # One class may have modules of several forms, such as norms with and without a weight.
    is_another = fused is not None and issubclass(fused, _FusedNorm | _FusedGatedMLP) and kernel_name(module) is None
    return None if is_another else fused


def class_before(kind: type[nn.Module], mixin: type, **members: Any) -> Any:
    """A class that is `kind` behind `mixin`."""
    return type(f"Fused{kind.__name__}", (mixin, kind), {"__module__": __name__, **members})


def plain_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that a fused module had before; None for any other module."""
    kind = type(module)
    return kind.__bases__[1] if issubclass(kind, FusedModule) else None


def kernel_name(module: nn.Module) -> Literal["norm", "swiglu"] | None:
    """Whether a module is an RMSNorm or a SwiGLU layer, by its names."""
    name = type(module).__name__
    if name.endswith("RMSNorm") and norm_eps(module) is not None and set(dict(module.named_parameters())) == {"weight"}:
        return "norm"
    parts = dict(module.named_children())
    is_gated = name.endswith("MLP") and set(parts) == {"gate_proj", "up_proj", "down_proj", "act_fn"}
    return "swiglu" if is_gated and type(parts["act_fn"]) in SILU else None


@torch.no_grad()
def _computes_the_same(module: Any, fused: Any) -> bool:
    weight = module.weight if hasattr(module, "weight") else module.gate_proj.weight
    if not is_eager_float32_on_cpu(weight):
        return False
    if isinstance(weight.data, FakeTensor):  # a plan's weights have no content: their names must do
        return True
    x = torch.linspace(-2, 3, 2 * weight.shape[-1]).to(weight).reshape(2, -1)
    expected, found = module(x), fused.forward(module, x)
    return bool((found - expected).abs().max() <= CLOSE * expected.abs().max())


def norm_eps(module: Any) -> float | None:
    """The norm's ε, by the name that its class has for it."""
    for name in ("variance_epsilon", "eps"):
        if isinstance(getattr(module, name, None), float):
            return float(getattr(module, name))
    return None
