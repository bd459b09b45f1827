"""Norms, gated layers and rotary attention that walk less over the states compute what each architecture's own do."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from rlhf_ppo.kernels import fused_layers, linear_layers
from rlhf_ppo.kernels.fused_layers import rms_norm, rotate, swiglu
from rlhf_ppo.kernels.fused_modules import fused_class
from rlhf_ppo.kernels.linear_layers import use_fast_layers, use_plain_layers
from tests.samplers.test_decode_loop import ARCHITECTURES
from tests.support.tiny_models import tiny_gpt2, tiny_llama


def inputs(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


def functions() -> list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Each with what it is a function of; cosines and sines belong to no angle."""
    x, weight, gate, up, heads = inputs((2, 3, 5), (5,), (4, 6), (4, 6), (2, 3, 4))
    cos, sin = (tensor.detach() for tensor in inputs((3, 4), (3, 4)))
    return [
        (lambda a, b: rms_norm(a, b, 1e-6), (x, weight)),
        (swiglu, (gate, up)),
        (lambda a: rotate(a, cos, sin), (heads,)),
    ]


def test_gradients_and_second_derivatives_are_those_of_finite_differences() -> None:
    for function, arguments in functions():
        assert torch.autograd.gradcheck(function, arguments)
        assert torch.autograd.gradgradcheck(function, arguments)


def test_outputs_are_those_of_the_definition() -> None:
    x, weight, gate, up = inputs((2, 3, 5), (5,), (4, 6), (4, 6))
    plain = x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt() * weight
    assert_close(rms_norm(x, weight, 1e-2), plain)
    assert_close(swiglu(gate, up), gate * torch.sigmoid(gate) * up)
    heads, cos, sin = inputs((2, 3, 4), (3, 4), (3, 4))
    halves_exchanged = torch.cat([-heads[..., 2:], heads[..., :2]], dim=-1)
    assert_close(rotate(heads, cos, sin), heads * cos + halves_exchanged * sin)


def test_the_way_without_a_second_derivative_gives_the_same_and_leaves_what_came_alone() -> None:
    for function, arguments in functions():
        output = function(*arguments)
        grad = torch.randn(output.shape, dtype=output.dtype)
        before = [tensor.detach().clone() for tensor in (grad, *arguments)]
        expected = torch.autograd.grad(output, arguments, grad, create_graph=True)
        found = torch.autograd.grad(output, arguments, grad)
        assert_close(found, tuple(tensor.detach() for tensor in expected))
        assert_close([grad, *arguments], before)


EXCHANGED = {"llama": 2 * 4 + 1, "mistral": 2 * 4 + 1, "qwen2": 2 * 4 + 1, "qwen3": 2 * 6 + 1, "gemma": 2, "neox": 2}


@pytest.mark.parametrize("name", EXCHANGED)
def test_norms_gated_layers_and_rotary_attention_are_exchanged_where_they_compute_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma's norm multiplies by 1 + weight, its gate is a GELU; NeoX has neither, and rotates a part of each head."""
    monkeypatch.setattr(linear_layers, "onednn_is_faster", lambda: False)
    plain: Any = ARCHITECTURES[name]()
    fused = copy.deepcopy(plain)
    with torch.no_grad():
        for module in (plain, fused):
            for norm in (part for part in module.modules() if type(part).__name__.endswith("RMSNorm")):
                norm.weight.copy_(torch.linspace(0.5, 1.5, len(norm.weight)))
    assert use_fast_layers(fused) == EXCHANGED[name]
    ids, found = torch.randint(2, 90, (3, 11), generator=torch.Generator().manual_seed(1)), []
    for model in (plain, fused):
        logprobs = torch.log_softmax(model(input_ids=ids).logits, dim=-1)
        logprobs[..., 5].sum().backward()
        found.append([logprobs, *(parameter.grad for parameter in model.parameters())])
    assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found[1][1:], found[0][1:], strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max()))
    use_plain_layers(fused)
    assert [type(module) for module in fused.modules()] == [type(module) for module in plain.modules()]


def test_a_class_that_computes_something_else_stays() -> None:
    class OtherRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.linspace(0.5, 1.5, 8)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return x / x.abs().mean(-1, keepdim=True) * self.weight

    assert fused_class(OtherRMSNorm()) is None
    assert fused_class(tiny_gpt2()) is None


def test_half_precision_traces_and_autocast_go_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    use_fast_layers(model)
    norm, gated = model.model.norm, model.model.layers[0].mlp
    calls: list[int] = []
    monkeypatch.setattr(fused_layers._RMSNorm, "apply", lambda *a: calls.append(1) or a[0])
    x = torch.randn(2, norm.weight.shape[0])
    norm(x)
    assert calls == [1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norm(x)
        assert gated(x).dtype == torch.bfloat16
    norm.bfloat16()(x.bfloat16())
    assert calls == [1]


def test_a_gated_layer_keeps_one_tensor_less() -> None:
    gate, up = torch.randn(64, 256, requires_grad=True), torch.randn(64, 256, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        torch.nn.functional.silu(gate) * up
        plain = len(set(kept))
        kept.clear()
        swiglu(gate, up)
    assert (plain, len(set(kept))) == (3, 2)
