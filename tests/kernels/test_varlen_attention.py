"""Packed rows by a variable-length kernel: its CPU twin, written out here, stands for the one that needs a GPU."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import MistralConfig, MistralForCausalLM

from rlhf_ppo.kernels import packing, varlen_attention
from rlhf_ppo.kernels.packing import packed_hidden, padded_hidden
from tests.support.tiny_models import tiny_gpt2, tiny_llama

ROWS = [torch.arange(5, 5 + length) for length in (7, 3, 7, 12, 1)]


def reference(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor, longest_q: int, longest_k: int,
    *, scale: float | None, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """softmax(scale Q K^T) V within rows, by the definition: [tokens, heads, width]."""
    bounds = starts.tolist()
    assert longest_q == longest_k == max(end - begin for begin, end in pairwise(bounds))
    assert enable_gqa == (q.shape[1] != k.shape[1])
    outputs = []
    for begin, end in pairwise(bounds):
        queries, keys, values = (tensor[begin:end].transpose(0, 1) for tensor in (q, k, v))
        keys, values = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=0) for tensor in (keys, values))
        logits = queries @ keys.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        steps = torch.arange(end - begin, device=q.device)
        distance = steps[:, None] - steps
        hidden = (distance < 0) | (distance > window_size[0] if window_size[0] >= 0 else distance < 0)
        outputs.append((logits.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def _kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen_attention, "kernel", lambda: reference)
    monkeypatch.setattr(packing, "applies_to", lambda query: True)


def windowed() -> Any:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, initializer_range=0.2,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, windowed], ids=["grouped heads", "gpt2", "sliding window"])
def test_packed_rows_have_the_states_and_gradients_of_padded_ones(build: Any) -> None:
    layers = build().base_model
    found, gradients = [], []
    for arrange in (packed_hidden, padded_hidden):
        hidden = arrange(layers, ROWS)
        rows = [hidden.states[start : start + len(row)] for start, row in zip(hidden.starts, ROWS, strict=True)]
        states = torch.cat(rows)
        found.append(states.detach())
        loss = (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum()
        gradients.append(torch.autograd.grad(loss, [weight for weight in layers.parameters() if weight.dim() > 1]))
    assert_close(found[0], found[1])
    for packed, padded in zip(*gradients, strict=True):
        assert_close(packed, padded, rtol=1e-4, atol=1e-4)


def test_a_kernel_that_differs_or_fails_is_declined_with_a_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cpu, half = torch.device("cpu"), torch.bfloat16
    monkeypatch.setattr(varlen_attention, "kernel", lambda: reference)
    assert varlen_attention.matches_plain_attention(cpu, half)
    assert not varlen_attention.matches_plain_attention(cpu, torch.float32)

    def wrong(*args: Any, **settings: Any) -> Tensor:
        return 1.1 * reference(*args, **settings)

    monkeypatch.setattr(varlen_attention, "kernel", lambda: wrong)
    assert not varlen_attention.matches_plain_attention(cpu, half)

    def fails(*_: object, **__: object) -> Tensor:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(varlen_attention, "kernel", lambda: fails)
    assert not varlen_attention.matches_plain_attention(cpu, half)
    monkeypatch.setattr(varlen_attention, "kernel", lambda: None)
    assert not varlen_attention.matches_plain_attention(cpu, half)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.startswith("rows of unequal length are padded on this GPU") for line in lines] == [True] * 4
    assert "differ by" in lines[1]
    assert "no kernel image" in lines[2]
    assert "torch 2.11 has" in lines[3]


def test_an_older_torch_packs_by_flash_attention_where_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"kernels"}
    monkeypatch.setattr(varlen_attention, "find_spec", lambda name: name if name in installed else None)

    def flash(*given: Any, softmax_scale: float | None, causal: bool, window_size: tuple[int, int]) -> Tensor:
        assert causal
        grouped = given[0].shape[1] != given[1].shape[1]
        return reference(*given, scale=softmax_scale, window_size=window_size, enable_gqa=grouped)

    def load(name: str) -> tuple[tuple[Any, ...], None]:
        assert name == "flash_attention_2"
        return (None, flash, None, None, None), None

    def offline(name: str) -> Any:
        raise OSError("cannot reach the hub")

    for function, packs in ((load, True), (offline, False)):
        varlen_attention.kernel.cache_clear()
        monkeypatch.setattr(varlen_attention, "lazy_import_flash_attention", function)
        assert varlen_attention.matches_plain_attention(torch.device("cpu"), torch.bfloat16) == packs
    installed.clear()
    varlen_attention.kernel.cache_clear()
    monkeypatch.setattr(varlen_attention, "lazy_import_flash_attention", load)
    assert varlen_attention.kernel() is None
    varlen_attention.kernel.cache_clear()
