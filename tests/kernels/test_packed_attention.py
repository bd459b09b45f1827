"""Attention over rows that stand side by side against the definition, row by row."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from rlhf_ppo.kernels.packed_attention import RowGroups, can_use_flash_kernel, grouped_attention


def tensors(positions: int, heads: int, kv_heads: int, width: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(positions)
    return [
        torch.randn(n, positions, width, generator=generator, requires_grad=True) for n in (heads, kv_heads, kv_heads)
    ]


def by_definition(query: Tensor, key: Tensor, value: Tensor, runs: RowGroups, scale: float) -> Tensor:
    """Each row alone, in float64, with its scores written out: [positions, heads, width]."""
    group, outputs, start = len(query) // len(key), [], 0
    key, value = (tensor.repeat_interleave(group, dim=0) for tensor in (key, value))
    for length in (length for count, length in runs for _ in range(count)):
        q, k, v = (tensor[:, start : start + length].double() for tensor in (query, key, value))
        unseen = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = (scale * q @ k.transpose(1, 2)).masked_fill(unseen, -math.inf)
        outputs.append((scores.softmax(dim=-1) @ v).transpose(0, 1))
        start += length
    return torch.cat(outputs)


@settings(max_examples=25, deadline=None)
@given(
    runs=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 40)), min_size=1, max_size=3),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    scale=st.sampled_from([None, 0.3]),
)
def test_outputs_and_gradients_are_those_of_each_row_alone(
    runs: list[tuple[int, int]], heads: tuple[int, int], scale: float | None
) -> None:
    given = tensors(sum(count * length for count, length in runs), *heads)
    found = grouped_attention(*given, runs, scale=scale)
    expected = by_definition(*given, runs, scale or given[0].shape[-1] ** -0.5)
    assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = torch.autograd.grad(found, given, grad), torch.autograd.grad(expected, given, grad.double())
    assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_half_precision_other_devices_and_a_forbidden_kernel_do_not_fit() -> None:
    given = tensors(5, 2, 2)
    assert can_use_flash_kernel(*given)
    assert not can_use_flash_kernel(*(tensor.bfloat16() for tensor in given))
    assert not can_use_flash_kernel(*(tensor.to("meta") for tensor in given))
    assert not can_use_flash_kernel(*given[:2], given[2][..., :2])
    with sdpa_kernel(SDPBackend.MATH):  # so does whoever wants a second derivative
        assert not can_use_flash_kernel(*given)


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    given = tensors(5, 2, 2)
    output = grouped_attention(*given, [(1, 5)])
    (slope,) = torch.autograd.grad(output.square().sum(), given[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.sum().backward()
