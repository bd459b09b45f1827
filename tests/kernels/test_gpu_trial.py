"""A GPU kernel is used where it is right and faster; a clock of the tests says which of two is."""

from collections.abc import Callable
from itertools import chain, cycle, repeat
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from rlhf_ppo.kernels import gpu_trial
from rlhf_ppo.kernels.gpu_trial import try_kernel


def set_clock(monkeypatch: pytest.MonkeyPatch, *, plain: float, kernel: float) -> None:
    """Let every trial measure these seconds."""
    repeats = gpu_trial.REPEATS
    seconds = cycle(chain.from_iterable((0.0, took) for took in (*repeat(plain, repeats), *repeat(kernel, repeats))))
    monkeypatch.setattr(gpu_trial, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)


def results(factor: float = 1.0, dtype: torch.dtype = torch.float32) -> Callable[[], list[Tensor]]:
    return lambda: [torch.ones(3, dtype=dtype), factor * torch.arange(4, dtype=dtype)]


def fails() -> list[Tensor]:
    raise RuntimeError("no kernel image is available\nfor this card")


def test_a_right_kernel_is_used_where_it_is_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, plain=2.0, kernel=1.0)
    assert try_kernel(results(), results()) == (True, "a Triton kernel (2.00 times as fast)")
    for seconds in (1.0, 1.99):
        set_clock(monkeypatch, plain=2.0, kernel=seconds * 2)
        chosen, line = try_kernel(results(), results())
        assert not chosen
        assert line.startswith("torch (a Triton kernel is ")


def test_a_kernel_that_is_wrong_or_fails_is_not_used_however_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, plain=2.0, kernel=1.0)
    for word in ("", "triton"):
        monkeypatch.setenv("RLHF_PPO_GPU_KERNELS", word)
        for factor in (1.001, float("nan")):
            chosen, line = try_kernel(results(factor), results())
            assert not chosen
            assert "results differ by" in line
        assert not try_kernel(results(dtype=torch.bfloat16), results())[0]
        assert not try_kernel(lambda: results()()[:1], results())[0]
        assert try_kernel(fails, results()) == (
            False, "torch (a Triton kernel fails: RuntimeError: no kernel image is available)"
        )  # fmt: skip
    assert try_kernel(results(1.01, torch.bfloat16), results(1.0, torch.bfloat16))[0]
    assert try_kernel(results(1.01), results(), torch.bfloat16)[0]


def test_a_variable_keeps_to_torch_or_does_without_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, plain=1.0, kernel=2.0)
    monkeypatch.setenv("RLHF_PPO_GPU_KERNELS", " Triton ")
    assert try_kernel(results(), results()) == (True, "a Triton kernel (RLHF_PPO_GPU_KERNELS says so)")
    set_clock(monkeypatch, plain=2.0, kernel=1.0)
    monkeypatch.setenv("RLHF_PPO_GPU_KERNELS", "torch")
    assert try_kernel(fails, fails) == (False, "torch (RLHF_PPO_GPU_KERNELS says so)")
    monkeypatch.setenv("RLHF_PPO_GPU_KERNELS", "liger")
    with pytest.raises(ValueError, match=r"RLHF_PPO_GPU_KERNELS='liger' cannot be read: it takes 'torch'"):
        try_kernel(results(), results())
