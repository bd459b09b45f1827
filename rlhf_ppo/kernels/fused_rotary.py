"""Rotary positions of any architecture's attention, rotated in place: two walks over a tensor instead of seven.

The modules of `transformers` rotate by a function that they name `apply_rotary_pos_emb`. An attention class whose
function computes what ours does runs the same `forward`, in which that name stands for ours.
"""

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from rlhf_ppo.kernels.fused_layers import rotate
from rlhf_ppo.kernels.matmul import is_eager_float32_on_cpu

NAME = "apply_rotary_pos_emb"
CLOSE = 1e-5
"""How far rotated entries may differ in the trial, of entries between -1 and 1."""

Rotation: TypeAlias = Callable[..., tuple[Tensor, Tensor]]
"""(queries, keys, cosines, sines, unsqueeze_dim) -> (queries, keys)."""


def forward_with_fused_rotary(module: nn.Module) -> Callable[..., Any] | None:
    """The `forward` of an attention module with the fused rotary embedding; None if it computes something else."""
    plain, weight = plain_rotation(module), next(module.parameters(), torch.empty(0))
    if plain is None or not is_eager_float32_on_cpu(weight):
        return None
    if not isinstance(weight.data, FakeTensor) and not _rotates_alike(plain):  # a plan's weights: names must do
        return None
    return forward_with_rotation(module, _ours_where_it_fits(plain))


def plain_rotation(module: nn.Module) -> Rotation | None:
    """The function by which an attention module rotates; None for any other module."""
    forward = _own_forward(module)
    if not isinstance(forward, FunctionType) or NAME not in forward.__code__.co_names:
        return None
    return forward.__globals__.get(NAME)


def forward_with_rotation(module: nn.Module, rotation: Rotation) -> Callable[..., Any]:
    """The `forward` of an attention module that rotates by another function."""
    forward = _own_forward(module)
    names = forward.__globals__ | {NAME: rotation}
    ours = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    ours.__kwdefaults__ = forward.__kwdefaults__
    return ours


def _own_forward(module: nn.Module) -> Any:
    return inspect.unwrap(type(module).__dict__.get("forward", _no_forward))  # transformers 5.24 renames arguments


def _no_forward() -> None:
    """What a class has that inherits its `forward`."""


def _ours_where_it_fits(plain: Rotation) -> Rotation:
    def rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        whole = q.shape[-1] == k.shape[-1] == cos.shape[-1] == sin.shape[-1]
        if not whole or not is_eager_float32_on_cpu(q, k, cos, sin) or cos.requires_grad:
            return plain(q, k, cos, sin, unsqueeze_dim)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    return rotation


@torch.no_grad()
def _rotates_alike(plain: Rotation, width: int = 8) -> bool:
    """Whether `plain` gives what ours does, for sines and cosines that belong to no angle."""
    q, k, cos, sin = (torch.linspace(-1, stop, 6 * width).view(1, 2, 3, width).sin() for stop in (1, 2, 3, 4))
    given = (q, k, cos[:, 0], sin[:, 0])
    try:
        expected = plain(*given)
    except Exception:  # whatever a foreign function makes of these: it is none that we know
        return False
    found = _ours_where_it_fits(plain)(*given)
    return all(float((a - b).abs().max()) <= CLOSE for a, b in zip(found, expected, strict=True))
