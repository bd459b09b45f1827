"""Norms, SwiGLU and rotary positions of a model on a GPU, by Triton kernels of the package `liger-kernel`.

A class of modules is exchanged where a trial finds the same results and gradients in less time; `use_plain_layers`
undoes it. liger's own patches replace functions in `transformers` for all models of a process. Plain twin: its modules.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from rlhf_ppo.functional.masked import HALF_PRECISION
from rlhf_ppo.kernels.fused_modules import SILU, FusedModule, class_before, kernel_name, norm_eps
from rlhf_ppo.kernels.fused_rotary import Rotation, forward_with_rotation, plain_rotation
from rlhf_ppo.kernels.gpu_trial import level_of_missing_kernels, requested_kernels, trial_values, try_kernel

logger = logging.getLogger(__name__)

FUNCTIONS = {"norm": ("rms_norm", "RMSNorm"), "swiglu": ("swiglu", "SiLUMul"), "rotary": ("rope", "Rope")}
TRIAL_TOKENS = 8192
"""A GPU then needs longer than the host needs to launch the kernels."""
_TRIALS: dict[object, tuple[Any, str]] = {}
"""The classes that take the place of those tried, one for policy and reference; and who computes, and why."""


@cache
def liger_function(name: str) -> Any:
    """One of liger's autograd functions; None where it is not installed, or fails to import."""
    module, function = FUNCTIONS[name]
    try:
        return getattr(import_module(f"liger_kernel.ops.{module}"), f"Liger{function}Function")
    except Exception as refusal:
        logger.log(level_of_missing_kernels(), "layers on this GPU by torch (liger-kernel: %s)", refusal)
        return None


class _Once(torch.autograd.Function):
    """A function of liger's whose backward pass runs once: that of SwiGLU overwrites what it kept, unnoticed."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        ctx.name = arguments[-1]
        return liger_function(ctx.name).forward(ctx, *arguments[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors  # read once, for recomputed layers; torch refuses them after they were overwritten
        # That of the rotation overwrites the gradients that arrive, which others may read.
        grads = tuple(grad.clone() for grad in grads) if ctx.name == "rotary" else grads
        read = SimpleNamespace(**vars(ctx), saved_tensors=kept, needs_input_grad=ctx.needs_input_grad)
        gradients = liger_function(ctx.name).backward(read, *grads)
        if ctx.name == "swiglu":
            increment_version(kept)
        return *gradients, None


def _once(*arguments: Any) -> Any:
    return _Once.apply(*arguments)  # type: ignore[no-untyped-call]


class _LigerNorm(FusedModule):
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if not _has_rows(hidden_states) or hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)  # type: ignore[no-any-return,misc]
        settings = norm_eps(self), 0.0, "llama", False  # nothing added to the weight; gradients that arrive stay whole
        return _once(hidden_states, self.weight, *settings, "norm")  # type: ignore[no-any-return]


class _LigerGatedMLP(FusedModule):
    def forward(self: Any, x: Tensor) -> Tensor:
        if not _has_rows(x) or type(self.act_fn) not in SILU:
            return super().forward(x)  # type: ignore[no-any-return,misc]
        gate, up = self.gate_proj(x), self.up_proj(x)
        product = _once(gate, up, "swiglu") if gate.dtype == up.dtype else self.act_fn(gate) * up
        return self.down_proj(product)  # type: ignore[no-any-return]


def use_liger_layers(model: nn.Module, device: torch.device, compute: torch.dtype) -> None:
    """Exchange the norms, gated layers and attention of `model`, in place, that liger computes the same, faster.

    Logs one line. In half precision alone, the `compute` dtype of matrix products on the `device` where it runs: Fisher
    products, which differentiate twice, are in float32.

    Raises:
        ValueError: `RLHF_PPO_GPU_KERNELS` cannot be read.
    """
    requested_kernels()
    said: dict[str, None] = {}
    for module in list(model.modules()) if compute in HALF_PRECISION and liger_function("norm") else ():
        weight = next((weight for weight in module.parameters() if weight.is_floating_point()), None)
        name = kernel_name(module) or ("rotary" if plain_rotation(module) is not None else None)
        if name is None or weight is None or isinstance(module, FusedModule):
            continue
        key = (type(module), weight.dtype, weight.shape, device, compute)
        if key not in _TRIALS:
            _TRIALS[key] = _try(name, module, weight, device, compute)
        exchanged, line = _TRIALS[key]
        said[f"{type(module).__name__} by {line}"] = None
        module.__class__ = exchanged or type(module)
    if said:
        logger.info("layers on this GPU: %s", "; ".join(said))


def _try(name: str, module: Any, weight: Tensor, device: torch.device, compute: torch.dtype) -> tuple[Any, str]:
    """The class that takes the place of a module's own, None for nothing; and who computes, and why."""
    values, own = partial(trial_values, device=device), type(module)
    try:
        if name == "rotary":
            exchanged, inputs, *functions = _rotation_trial(module, weight, values, compute)
        else:
            exchanged = class_before(own, _LigerNorm if name == "norm" else _LigerGatedMLP)
            functions = [partial(kind.forward, module) for kind in (exchanged, own)]
            inputs = [values(1, TRIAL_TOKENS, weight.shape[-1], dtype=weight.dtype, seed=1).requires_grad_()]
            inputs += [weight] if name == "norm" and weight.requires_grad else []
        with torch.autocast(device.type, dtype=compute):
            slopes = [values(*out.shape, dtype=out.dtype, seed=2) for out in _call(functions[1], inputs)]
            ours, theirs = (partial(_results, function, inputs, slopes) for function in functions)
            chosen, line = try_kernel(ours, theirs, weight.dtype if name == "norm" else compute)
    except Exception as refusal:  # whatever a foreign class makes of what it gets
        return None, f"torch (a Triton kernel cannot be tried: {type(refusal).__name__})"
    return exchanged if chosen else None, line


def _rotation_trial(module: Any, weight: Tensor, values: Callable[..., Tensor], compute: torch.dtype) -> list[Any]:
    """The class that would rotate by liger's kernel, what it is tried on, and both rotations."""
    width, plain = getattr(module, "head_dim", 64), plain_rotation(module)
    assert plain is not None  # its name is "rotary"
    ours, angles = _rotation_for(plain), values(1, TRIAL_TOKENS, width // 2, dtype=torch.float32, seed=1)
    cos, sin = (torch.cat([half, half], dim=-1).to(weight.dtype) for half in (angles.cos(), angles.sin()))
    heads = (values(1, TRIAL_TOKENS, count, width, dtype=compute, seed=count) for count in (16, 4))
    inputs = [x.transpose(1, 2).requires_grad_() for x in heads]
    exchanged = class_before(type(module), FusedModule, forward=forward_with_rotation(module, ours))
    return [exchanged, inputs, *(lambda q, k, turn=turn: turn(q, k, cos, sin) for turn in (ours, plain))]


def _call(function: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    output = function(*(x for x in inputs if x.dim() > 1))
    return output if isinstance(output, tuple) else (output,)


def _results(function: Callable[..., Any], inputs: Sequence[Tensor], slopes: Sequence[Tensor]) -> list[Tensor]:
    """What a function returns, and the gradients of a weighted sum of it."""
    outputs = _call(function, inputs)
    with torch.autocast(slopes[0].device.type, enabled=False):
        return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, inputs, slopes)]


def _rotation_for(plain: Rotation) -> Rotation:
    """`plain` by liger's kernel, where that takes the arguments."""

    def rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        fits = q.shape[-1] == k.shape[-1] == cos.shape[-1] and cos.dim() == 3 and unsqueeze_dim == 1
        promotes = cos.dtype in (q.dtype, torch.float32) and q.dtype == k.dtype and not cos.requires_grad
        if not (fits and promotes and _has_rows(q, 2)):
            return plain(q, k, cos, sin, unsqueeze_dim)
        # Copies in the dtype of the plain results: the kernel writes over what it gets.
        return _once(*(x.to(cos.dtype, copy=True) for x in (q, k)), cos, sin, "rotary")  # type: ignore[no-any-return]

    return rotation


def _has_rows(x: Tensor, dim: int = 1) -> bool:
    """Whether x is on a GPU, with several positions a row: launching takes longer than computing one (decoding)."""
    return x.device.type == "cuda" and x.dim() > 2 and x.shape[dim] > 1 and not torch.compiler.is_compiling()
