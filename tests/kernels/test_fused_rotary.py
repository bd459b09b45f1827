"""Which attention classes rotate by our function, and when that goes the plain way."""

from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as of_llama

from rlhf_ppo.kernels import fused_rotary
from rlhf_ppo.kernels.fused_modules import fused_class, plain_class
from rlhf_ppo.kernels.fused_rotary import forward_with_fused_rotary
from tests.support.tiny_models import tiny_llama

apply_rotary_pos_emb: Any = of_llama
"""Of the attention below; a test puts another in its place."""


def of_neighbors(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """GPT-J's and Cohere's: entries rotate with the one beside them, not with that of the other half."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def rotated(x: Tensor) -> Tensor:
        return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2) * sin

    return rotated(q), rotated(k)


def of_other_arguments(q: Tensor, k: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    return q * angles, k * angles


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        rotated: tuple[Tensor, Tensor] = apply_rotary_pos_emb(q * self.scale, k, cos, sin)
        return rotated


def queries_keys_and_angles(width: int = 8, rotated: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 5, width), (1, 2, 5, width), (1, 5, rotated), (1, 5, rotated))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    rotate = fused_rotary.rotate
    monkeypatch.setattr(fused_rotary, "rotate", lambda *given: calls.append(1) or rotate(*given))
    return calls


def test_a_forward_runs_as_it_is_with_our_rotation_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, module, given = counting(monkeypatch), Attention(), queries_keys_and_angles()
    forward = forward_with_fused_rotary(module)
    assert forward is not None
    calls.clear()  # the trial's
    assert_close(forward(module, *given), module(*given))
    assert calls == [1, 1]


def test_a_decorated_forward_is_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers 5.24 decorates it, to rename an argument."""
    plain = Attention.forward

    @wraps(plain)
    def decorated(*given: Any) -> Any:
        return plain(*given)

    monkeypatch.setattr(Attention, "forward", decorated)
    module, given = Attention(), queries_keys_and_angles()
    forward = forward_with_fused_rotary(module)
    assert forward is not None
    assert_close(forward(module, *given), module(*given))


@pytest.mark.parametrize("function", [of_neighbors, of_other_arguments, None])
def test_a_function_that_computes_something_else_stays(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "apply_rotary_pos_emb", function)
    assert forward_with_fused_rotary(Attention()) is None


def test_parts_of_a_head_learned_angles_and_half_precision_go_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, rotation = counting(monkeypatch), fused_rotary._ours_where_it_fits(lambda *given: of_llama(*given))
    q, k, cos, sin = queries_keys_and_angles()
    rotation(q, k, cos.requires_grad_(), sin)
    rotation(*(tensor.bfloat16() for tensor in (q, k, cos.detach(), sin)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rotation(q, k, cos.detach(), sin)
    with pytest.raises(RuntimeError, match="size"):
        rotation(*queries_keys_and_angles(width=8, rotated=4))  # this function's own error: no part of it is ours
    assert calls == []
    rotation(q, k, cos.detach(), sin)
    assert calls == [1, 1]


def test_the_class_that_was_comes_back() -> None:
    attention = tiny_llama().model.layers[0].self_attn
    kind = type(attention)
    fused = fused_class(attention)
    assert fused is not None and fused is not kind
    attention.__class__ = fused
    assert plain_class(attention) is kind
